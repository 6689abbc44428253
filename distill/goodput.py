"""What a change of acceptance is worth: tokens per second, predicted from held-out requests and the cost table.

A draft can be accepted more often and bring nothing, where the positions it gained are not the ones that end
rounds.  So every held-out request is decoded again on paper: with γ tokens drafted a round and acceptance a_i at
position i, the expected number of rounds F(i) that its tokens from i on take follows from

    F(i) = 1 + Σ_{t=1..γ} a_i … a_{i+t-2} (1 - a_{i+t-1}) F(i+t)  +  a_i … a_{i+γ-1} F(i+γ+1)

(a round commits what was accepted and one token more), and rounds times what a round takes are its seconds.
Each draft has the γ that suits it best, none included.  Records that were kept by chance only leave no runs to
walk; there the geometric formula of Leviathan et al. (arXiv 2211.17192), (1 - α^(γ+1)) / (1 - α) tokens a round,
stands in with the request's mean acceptance.  Knows nothing about models.  Called by `distill.verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapter.contracts import VerifiedBlock
from distill.grouping import places_by_request
from distill.resampling import Floats, ratio_interval

WALKED = "walked"


@dataclass(frozen=True, slots=True)
class Costs:
    """What a round takes: knots of both curves, in rows of a forward and seconds, and what every step adds.

    A row of the draft's curve is a request; it runs one forward a drafted token.  `batches` are the numbers of
    requests decoded together at which drafts are compared, `gamma_max` the most tokens drafted a round.
    """

    target_rows: tuple[float, ...]
    target_s: tuple[float, ...]
    draft_rows: tuple[float, ...]
    draft_s: tuple[float, ...]
    overhead_s: float
    batches: tuple[int, ...]
    gamma_max: int

    def __post_init__(self) -> None:
        """Refuse what cannot be a cost table.

        Raises:
            ValueError: no knots, times that are not positive, no batch size, or a length below one.
        """
        for rows, seconds in ((self.target_rows, self.target_s), (self.draft_rows, self.draft_s)):
            good = len(rows) == len(seconds) > 0 and all(a < b for a, b in pairwise(rows))
            if not good or not all(math.isfinite(item) and item > 0 for item in (*rows, *seconds)):
                raise ValueError(f"a cost curve needs rising rows and positive seconds, not {rows} and {seconds}")
        if not self.batches or min(self.batches) < 1 or self.gamma_max < 1 or not 0 <= self.overhead_s < math.inf:
            raise ValueError(
                f"batches {self.batches}, gamma_max {self.gamma_max} and overhead_s {self.overhead_s}: at least one "
                "batch of one request, one drafted token and no negative time are needed"
            )

    def round_s(self, batch: int) -> Floats:
        """Return the seconds of a round with 0, 1, … gamma_max tokens drafted.  Shapes: result [gamma_max + 1]."""
        gammas = range(self.gamma_max + 1)
        target = np.array([_at(self.target_rows, self.target_s, batch * (gamma + 1)) for gamma in gammas])
        seconds: Floats = target + np.array(gammas) * _at(self.draft_rows, self.draft_s, batch) + self.overhead_s
        return seconds


def costs_of(document: dict[str, Any] | None, gamma_max: int) -> Costs | None:
    """Read the engine's document (`adapter.facts.ENGINE`); None where it tells no costs of a draft model.

    Only an adaptive controller measures them.  The batch is the engine's median one, one request where it served
    none yet.
    """
    if document is None:
        return None
    try:
        known = document["controller"]["costs"]
        target, draft = ([np.array(known["table"][name][key], float) for key in ("rows", "ms")]
                         for name in ("target", "draft"))  # fmt: skip
        factors = {name: float(known["corrections"][name]["factor"]) for name in ("target", "draft")}
        return Costs(
            target_rows=tuple(target[0]), target_s=tuple(target[1] * 1e-3 * factors["target"]),
            draft_rows=tuple(draft[0]), draft_s=tuple(draft[1] * 1e-3 * factors["draft"]),
            overhead_s=1e-3 * float(known["overhead_ms"]), batches=(max(1, round(document["median_batch"] or 1)),),
            gamma_max=gamma_max,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return None


def compare_goodput(
    blocks: Sequence[VerifiedBlock],
    live: Sequence[NDArray[Any]],
    candidate: Sequence[NDArray[Any]],
    costs: Costs,
    *,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Predict by how much a candidate changes tokens per second, against live, on the same requests.

    The result is JSON: live and candidate (speed-up over no speculation), change (relative) and its interval,
    gammas (the best for each, by batch), requests, method ("walked", "geometric" or "partly geometric").  The
    interval is None below two requests.
    """
    requests = _requests(blocks)
    before, tokens = _rounds(blocks, live, requests, costs.gamma_max)
    after, _ = _rounds(blocks, candidate, requests, costs.gamma_max)
    old_s, old_gammas = _seconds(before, costs)
    new_s, new_gammas = _seconds(after, costs)
    low, high = ratio_interval(old_s - new_s, new_s, confidence=confidence, seed=seed)
    return {
        "live": float(tokens.sum() / old_s.sum()),
        "candidate": float(tokens.sum() / new_s.sum()),
        "change": float(old_s.sum() / new_s.sum() - 1),
        "interval": [low, high] if math.isfinite(low) else None,
        "gammas": {
            str(batch): {"live": old, "candidate": new}
            for batch, old, new in zip(costs.batches, old_gammas, new_gammas, strict=True)
        },
        "requests": len(requests),
        "method": _method(blocks),
    }


def expected_rounds(acceptance: Floats, gamma_max: int) -> Floats:
    """Return how many rounds a run of positions takes, for 0, 1, … gamma_max tokens drafted a round.

    Shapes: acceptance [n], of consecutive positions; result [gamma_max + 1].
    """
    lengths = np.arange(gamma_max + 1)
    fresh = np.zeros(gamma_max + 1)  # rounds from the next position on, by γ
    within = np.zeros((gamma_max + 1, gamma_max + 1))  # the same inside a round: by γ and drafted tokens left
    for chance in acceptance[::-1]:
        within[:, 1:] = chance * within[:, :-1] + (1 - chance) * fresh[:, None]
        within[:, 0] = fresh
        fresh = 1 + within[lengths, lengths]
    return fresh


def _rounds(
    blocks: Sequence[VerifiedBlock], scores: Sequence[NDArray[Any]], requests: list[list[int]], gamma_max: int
) -> tuple[Floats, Floats]:
    """Return expected rounds and tokens of every request.  Shapes: [requests, gamma_max + 1] and [requests]."""
    rounds, tokens = np.zeros((len(requests), gamma_max + 1)), np.zeros(len(requests))
    for row, group in enumerate(requests):
        positions = np.concatenate([blocks[i].array("positions").astype(np.int64) for i in group])
        values = np.concatenate([scores[i] for i in group])
        if all(blocks[i].keep_probability >= 1 for i in group):
            _, first = np.unique(positions, return_index=True)  # sorted, and nothing twice
            positions, values = positions[first], values[first]
            runs = np.split(values, np.flatnonzero(np.diff(positions) != 1) + 1)
            rounds[row] = sum((expected_rounds(run, gamma_max) for run in runs), np.zeros(gamma_max + 1))
            tokens[row] = len(values)
        else:
            weights = np.concatenate([blocks[i].row_weights() for i in group])
            tokens[row] = weights.sum()
            mean = min(1.0, float(weights @ values / weights.sum()))
            rounds[row] = weights.sum() / np.cumsum(mean ** np.arange(gamma_max + 1))
    return rounds, tokens


def _seconds(rounds: Floats, costs: Costs) -> tuple[Floats, list[int]]:
    """Return each request's time in units of a plain round, mean over batches, and the best γ of each batch."""
    total, gammas = np.zeros(len(rounds)), []
    for batch in costs.batches:
        relative = costs.round_s(batch)
        relative = relative / relative[0]
        gammas.append(int((rounds.sum(0) * relative).argmin()))
        total += rounds[:, gammas[-1]] * relative[gammas[-1]] / len(costs.batches)
    return total, gammas


def _requests(blocks: Sequence[VerifiedBlock]) -> list[list[int]]:
    places = [[i for i in group if blocks[i].num_records] for group in places_by_request(blocks)]
    return [group for group in places if group]


def _method(blocks: Sequence[VerifiedBlock]) -> str:
    sampled = {block.request_id for block in blocks if block.keep_probability < 1}
    whole = {block.request_id for block in blocks} - sampled
    return "partly geometric" if sampled and whole else "geometric" if sampled else WALKED


def _at(rows: Sequence[float], seconds: Sequence[float], wanted: float) -> float:
    """Interpolate; beyond the last knot go on with the slope of the upper half, as one stair is no slope."""
    if wanted <= rows[-1] or len(rows) < 2:
        return float(np.interp(wanted, rows, seconds))
    half = min(next(i for i, size in enumerate(rows) if 2 * size >= rows[-1]), len(rows) - 2)
    slope = (seconds[-1] - seconds[half]) / (rows[-1] - rows[half])
    return seconds[-1] + slope * (wanted - rows[-1])
