"""The gate's rules: per-position acceptances in, one sentence with numbers out.

A candidate passes when the lower bound of its gain over what is live exceeds the least gain, and nothing else is
certain to be worse than its margin: against the floor, in any segment, against the champion of a segment, on the
anchor set, in predicted goodput.  Before that its stored file must score what the trainer said (parity).  One that
does not pass may still be certain to gain in single segments; there it can draft beside what is live.  Each
comparison is paired, position by position, on the same requests; records count as often as they stand for
(`VerifiedBlock.row_weights`).

A promotion that is false is to happen with a probability of (1 - confidence) / 2 at most.  That holds for one
candidate judged on blocks that chose nothing: of several that were trained the trainer picks by the validation
blocks, and only the chosen one comes here.  Where the same held-out requests judge once more, in another cycle,
`looks` counts how often in all, and the level is divided by it (Bonferroni).  Refusals are not corrected so: to
look more often must not make a loss harder to see.  Knows nothing about models or files.  Called by `distill.gate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapter.contracts import Coupling, VerifiedBlock
from distill.goodput import WALKED, Costs, compare_goodput
from distill.resampling import ratio_interval, sum_by

Scores = Sequence[NDArray[Any]]  # of each block, the acceptance of every record
Part = dict[str, Any]

_FAR = 5.0  # parity margins beyond which no number of requests is too few

CHAMPION = "champion:"


@dataclass(frozen=True, slots=True)
class GateRules:
    """What a candidate must show.

    Margins are losses that are tolerated: `segment_margin` of acceptance in a segment and against floor and
    champions, `anchor_margin` on the anchor set, `goodput_margin` of tokens per second, relative;
    `parity_margin` is how far the stored file may be from what the trainer measured, to either side.
    """

    coupling: Coupling
    min_gain: float
    confidence: float
    min_requests: int
    segment_margin: float
    max_norm_ratio: float
    seed: int
    anchor_margin: float = 0.02
    goodput_margin: float = 0.01
    parity_margin: float = 0.03
    looks: int = 1

    @property
    def promotion_confidence(self) -> float:
        """Confidence of the interval that promotes."""
        return 1 - (1 - self.confidence) / max(1, self.looks)


@dataclass(frozen=True, slots=True)
class Anchor:
    """The anchor set and what candidate and live score on it."""

    blocks: Sequence[VerifiedBlock]
    candidate: Scores
    live: Scores


def compare(
    blocks: Sequence[VerifiedBlock],
    candidate: Scores,
    references: Mapping[str, Scores],
    rules: GateRules,
    *,
    anchor: Anchor | None = None,
    trainer: Scores | None = None,
    costs: Costs | None = None,
) -> dict[str, Any]:
    """Judge the acceptances of a candidate; item i of every score belongs to `blocks[i]`.

    Args:
        references: by name. "live" must be there; "floor" where that is another draft; "champion:<segment>" with
            scores of that segment's blocks alone, in their order.
        trainer: what the trainer scored on the same blocks with factors that were never merged or stored.
        costs: None leaves goodput unjudged.

    The result is JSON: passed, wins (segments in which it gains for certain though it did not pass), outcome
    ("passed", "rejected" or "undecided"), verdict (one sentence), reasons (every rule that said no), looks, what is
    said of the comparison with live (live, candidate, difference, interval, confidence, requests, positions,
    judged), and by_segment, floor, champions, anchor, goodput and parity in the same
    manner.  `judged` is False where too few requests say too little; what was not compared at all is None.
    """
    live = references["live"]
    overall = _paired(blocks, live, candidate, rules, confidence=rules.promotion_confidence)
    result: dict[str, Any] = {
        **overall,
        "looks": max(1, rules.looks),
        "by_segment": {
            name: _paired(*_of_segment(name, blocks, live, candidate), rules)
            for name in sorted({block.segment for block in blocks})
        },
        "floor": _paired(blocks, references["floor"], candidate, rules, "floor") if "floor" in references else None,
        "champions": _champions(blocks, candidate, references, rules),
        "anchor": _paired(anchor.blocks, anchor.live, anchor.candidate, rules) if anchor else None,
        "goodput": _goodput(blocks, live, candidate, rules, costs) if overall["positions"] else None,
        "parity": _paired(blocks, trainer, candidate, rules, "trainer") if trainer is not None else None,
    }
    broken = sum(int((~np.isfinite(part)).sum()) for part in (*candidate, *(anchor.candidate if anchor else ())))
    reasons = _reasons(result, rules, broken)
    result["reasons"] = [text for _, text in reasons]
    result["outcome"], why = reasons[0] if reasons else ("passed", "")
    result["passed"] = not reasons
    result["wins"] = _wins(blocks, live, candidate, result, rules) if reasons and not broken else []
    result["verdict"] = f"{result['outcome'].capitalize()}{', ' if why else ''}{why}: {_sentence(result)}"
    return result


def unscored(outcome: str, why: str) -> dict[str, Any]:
    """Return the result where a draft could not be scored: "rejected" for the candidate, "undecided" for live."""
    return {
        "passed": False, "wins": [], "outcome": outcome, "verdict": f"{outcome.capitalize()}: {why}.", "reasons": [why],
        "requests": 0, "positions": 0,
    }  # fmt: skip


def _reasons(result: dict[str, Any], rules: GateRules, broken: int) -> list[tuple[str, str]]:
    """Return every rule that says no, as (outcome, words), the weightiest first."""
    found = []
    if broken:
        found.append(("rejected", f"its logits are no numbers at {broken:,} positions"))
    if (parity := result["parity"]) is not None and _far_off(parity, rules):
        text = f"the stored file scores {parity['candidate']:.3f} where the trainer measured {parity['trainer']:.3f}"
        found.append(("rejected", f"{text} ({_change(parity)})"))
    if result["requests"] < rules.min_requests:
        return [*found, ("undecided", f"{rules.min_requests} held-out requests are needed")]
    if result["interval"][1] < 0:
        found.append(("rejected", "it is accepted less often than live"))
    elif not result["interval"][0] > rules.min_gain:
        found.append(("rejected", f"the gain is not certain to exceed {rules.min_gain:+.3f}"))
    named = [("the floor", result["floor"], rules.segment_margin)]
    named += [(f"live in segment {name}", part, rules.segment_margin) for name, part in result["by_segment"].items()]
    named += [(f"the champion of {name}", part, rules.segment_margin) for name, part in result["champions"].items()]
    named.append(("live on the anchor set", result["anchor"], rules.anchor_margin))
    for name, part, margin in named:
        if part is not None and _loses(part, margin):
            found.append(("rejected", f"it loses {-part['difference']:.3f} against {name} ({_change(part)})"))
    if _loses_goodput(result, rules):
        found.append(("rejected", f"predicted goodput falls by {_share(-result['goodput']['change'])}"))
    return found


def _wins(
    blocks: Sequence[VerifiedBlock], live: Scores, candidate: Scores, result: dict[str, Any], rules: GateRules
) -> list[str]:  # fmt: skip
    """Return the segments in which the candidate is certain to gain; the level is shared by all that are looked at.

    None where it is not what the trainer measured, or loses to the floor or in goodput: then it fits nobody.
    """
    if (result["parity"] is not None and _far_off(result["parity"], rules)) or _loses_goodput(result, rules):
        return []
    if _loses(result["floor"], rules.segment_margin):
        return []
    judged = [name for name, part in result["by_segment"].items() if part["judged"]]
    found = []
    for name in judged:
        level = 1 - (1 - rules.promotion_confidence) / len(judged)
        part = _paired(*_of_segment(name, blocks, live, candidate), rules, confidence=level)
        beaten = _loses(result["champions"].get(name), rules.segment_margin)
        if part["interval"][0] > rules.min_gain and not beaten:
            found.append(name)
    return found


def _loses(part: Part | None, margin: float) -> bool:
    """Whether a comparison certainly ends below its margin."""
    return part is not None and part["judged"] and bool(part["interval"][1] < -margin)


def _loses_goodput(result: Part, rules: GateRules) -> bool:
    goodput = result["goodput"]
    return goodput is not None and goodput["interval"] is not None and goodput["interval"][1] < -rules.goodput_margin


def _far_off(parity: Part, rules: GateRules) -> bool:
    """Whether the stored file certainly, or by far, scores something else than the trainer said; NaN is far."""
    low, high = parity["interval"]
    near = abs(parity["difference"]) <= _FAR * rules.parity_margin
    return bool(parity["positions"]) and not (near and low <= rules.parity_margin and high >= -rules.parity_margin)


def _sentence(result: dict[str, Any]) -> str:
    if not result["positions"]:
        return "no held-out positions."
    said = [
        f"acceptance {result['live']:.3f} → {result['candidate']:.3f} ({_change(result)}) "
        f"on {result['requests']} held-out requests, {result['positions']:,} positions"
    ]
    goodput, anchor, missing = result["goodput"], result["anchor"], []
    for name in result["wins"]:
        said.append(f"it gains in segment {name} ({_change(result['by_segment'][name])})")
    if goodput is not None:
        how = "" if goodput["method"] == WALKED else f" ({goodput['method']})"
        said.append(f"predicted goodput {_share(goodput['change'], sign='+')}{how}")
    else:
        missing.append("goodput (no cost table)")
    if anchor is not None and anchor["judged"]:
        said.append(f"anchor set {anchor['difference']:+.3f}")
    else:
        missing.append(f"the anchor set ({anchor['requests'] if anchor else 0} requests)")
    if result["parity"] is None:
        missing.append("parity")
    if missing:
        said.append(f"not judged: {', '.join(missing)}")
    return "; ".join(said) + "."


def _paired(
    blocks: Sequence[VerifiedBlock],
    before: Scores,
    after: Scores,
    rules: GateRules,
    name: str = "live",
    confidence: float | None = None,
) -> Part:
    """Summarise a reference, called `name`, and the candidate on the same positions, weighted.

    Where a reference's logits are no numbers nothing of it would be accepted.
    """
    level = rules.confidence if confidence is None else confidence
    sums = sum_by(
        [block.request_id for block in blocks],
        [float(block.row_weights() @ np.nan_to_num(old)) for block, old in zip(blocks, before, strict=True)],
        [float(block.row_weights() @ np.nan_to_num(new)) for block, new in zip(blocks, after, strict=True)],
        [float(block.row_weights().sum()) for block in blocks],
    )
    old, new, weights = sums[sums[:, 2] > 0].T
    part = {
        name: None, "candidate": None, "difference": 0.0, "interval": [0.0, 0.0], "confidence": level,
        "requests": len(weights), "positions": sum(block.num_records for block in blocks),
        "judged": len(weights) >= rules.min_requests,
    }  # fmt: skip
    if not len(weights):
        return part
    means = {name: float(old.sum() / weights.sum()), "candidate": float(new.sum() / weights.sum())}
    interval = ratio_interval(new - old, weights, confidence=level, seed=rules.seed)
    part |= means | {
        "difference": means["candidate"] - means[name],
        "interval": [min(1.0, max(-1.0, edge)) for edge in interval],  # where differences of acceptances lie
    }
    return part


def _champions(
    blocks: Sequence[VerifiedBlock], candidate: Scores, references: Mapping[str, Scores], rules: GateRules
) -> dict[str, Part]:
    found = {}
    for name, scores in references.items():
        if name.startswith(CHAMPION):
            segment = name.removeprefix(CHAMPION)
            theirs, own, _ = _of_segment(segment, blocks, candidate, candidate)
            found[segment] = _paired(theirs, scores, own, rules, "champion")
    return found


def _of_segment(
    segment: str, blocks: Sequence[VerifiedBlock], old: Scores, new: Scores
) -> tuple[list[VerifiedBlock], Scores, Scores]:
    """Return the blocks of a segment and the scores that belong to them."""
    chosen = [i for i, block in enumerate(blocks) if block.segment == segment]
    return [blocks[i] for i in chosen], [old[i] for i in chosen], [new[i] for i in chosen]


def _goodput(
    blocks: Sequence[VerifiedBlock], live: Scores, candidate: Scores, rules: GateRules, costs: Costs | None
) -> Part | None:
    if costs is None:
        return None
    old, new = ([np.nan_to_num(part) for part in scores] for scores in (live, candidate))
    return compare_goodput(blocks, old, new, costs, confidence=rules.confidence, seed=rules.seed)


def _change(part: Part) -> str:
    low, high = part["interval"]
    return f"{part['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _share(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} %"
