"""The offline gate: would the candidate be accepted more often than what is live, on the same positions?

The candidate is the stored artifact, loaded from disk and merged as serving would merge it, with the
weights rounded to the pair's dtype and the arithmetic in float32.  Acceptance of a position is the
chance that draft and target agree under the coupling in force (`kernels.acceptance`), at the
request's temperature.  Two approximations, equal for both sides: what lies outside the logged top-k
is one symbol, which makes sampled acceptance an upper bound; and top-k/top-p of a request are ignored.
Called by `distill.trainer`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapter import artifacts
from adapter.contracts import ArtifactError, Coupling, VerifiedBlock
from adapter.lora import base_weights, load_factors, merge
from adapter.models import DTYPES, load_draft
from adapter.pairs import Pair, expected_tensors
from distill.batches import Batch, collate, judged_states, plan_batches
from kernels.acceptance import gumbel_acceptance, maximal_acceptance

_RESAMPLES = 2000
_CHUNK_ROWS = 256
_BATCH_TOKENS = 4096
_TINY = 1e-9


@dataclass(frozen=True, slots=True)
class GateRules:
    """What a candidate must show. `segment_margin`: certain losses beyond it in one segment are a no."""

    coupling: Coupling
    min_gain: float
    confidence: float
    min_requests: int
    segment_margin: float
    max_norm_ratio: float
    seed: int


def judge(
    pair: Pair,
    root: Path,
    *,
    candidate: str,
    live: str | None,
    blocks: Sequence[VerifiedBlock],
    rules: GateRules,
    trainer_score: float | None = None,
) -> dict[str, Any]:
    """Compare two artifacts of `root` (None is the base draft) on held-out blocks.

    The result is JSON: passed, verdict, live, candidate, difference, interval, requests, positions,
    by_segment, parity (candidate minus the trainer's own score of the unmerged factors).
    """
    model = load_draft(pair, DTYPES[pair.dtype])
    pristine = base_weights(model, list(pair.lora_shapes))
    try:
        after = _score_artifact(model, pristine, pair, root, candidate, blocks, rules)
    except ArtifactError as error:
        return {"passed": False, "verdict": f"Rejected: {error}.", "requests": 0, "positions": 0}
    before = _score_artifact(model, pristine, pair, root, live, blocks, rules)
    result = compare(blocks, before, after, rules)
    score = _mean(after)
    result["parity"] = None if trainer_score is None or score is None else score - trainer_score
    return result


def compare(
    blocks: Sequence[VerifiedBlock], before: Sequence[NDArray[Any]], after: Sequence[NDArray[Any]], rules: GateRules
) -> dict[str, Any]:
    """Judge per-position acceptances of live and candidate; `before[i]` and `after[i]` belong to `blocks[i]`."""
    overall = _paired(blocks, before, after, rules)
    segments = {
        segment: _paired([blocks[i] for i in chosen], [before[i] for i in chosen], [after[i] for i in chosen], rules)
        for segment, chosen in _by_segment(blocks).items()
    }
    losing = [
        name
        for name, part in segments.items()
        if part["requests"] >= rules.min_requests and part["interval"][1] < -rules.segment_margin
    ]
    passed, why = True, "Passed"
    if overall["requests"] < rules.min_requests:
        passed, why = False, f"Undecided, {rules.min_requests} held-out requests are needed"
    elif overall["interval"][0] <= rules.min_gain:
        passed, why = False, f"Rejected, the gain is not certain to exceed {rules.min_gain:+.3f}"
    elif losing:
        passed, why = False, f"Rejected, segment {losing[0]} loses {-segments[losing[0]]['difference']:.3f}"
    return {"passed": passed, "verdict": f"{why}: {_sentence(overall)}", **overall, "by_segment": segments}


def score_blocks(
    model: Any, head: torch.Tensor, blocks: Sequence[VerifiedBlock], coupling: Coupling
) -> list[NDArray[Any]]:
    """Return the acceptance of every record, one float64 array a block."""
    scores: list[NDArray[Any]] = [np.empty(0)] * len(blocks)
    for group in plan_batches([len(block.token_ids) // 4 for block in blocks], _BATCH_TOKENS, "score"):
        batch = collate([blocks[i] for i in group])
        with torch.inference_mode():
            values = position_acceptance(judged_states(model, batch), head, batch, coupling).numpy()
        ends = np.cumsum([blocks[i].num_records for i in group])[:-1]
        for i, part in zip(group, np.split(values, ends), strict=True):
            scores[i] = part
    return scores


def position_acceptance(hidden: torch.Tensor, head: torch.Tensor, batch: Batch, coupling: Coupling) -> torch.Tensor:
    """Return the acceptance of each record: closed form where it samples, equal top-1 where it is greedy.

    Shapes: hidden [n, h]; head [vocab, h]; result [n] float64.
    """
    closed_form = gumbel_acceptance if coupling == "gumbel" else maximal_acceptance
    found = torch.empty(hidden.shape[0], dtype=torch.float64)
    for at in range(0, hidden.shape[0], _CHUNK_ROWS):
        part = slice(at, at + _CHUNK_ROWS)
        logits = hidden[part].to(head.dtype) @ head.t()
        ids, logprobs, temperature = batch.topk_ids[part], batch.topk_logprobs[part], batch.temperature[part]
        values = (logits.argmax(-1) == _target_top1(ids, logprobs)).double()
        hot = temperature > 0
        if hot.any():
            p, q = tempered_laws(logits[hot], ids[hot], logprobs[hot], temperature[hot])
            values[hot] = closed_form(p, q)
        found[part] = values
    return found


def tempered_laws(
    logits: torch.Tensor, topk_ids: torch.Tensor, topk_logprobs: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return target and draft law over the top-k and one tail symbol, at each row's temperature.

    The draft's is exact.  The target's tail is known only as a mass m of tokens no likelier than the
    k-th, p_k: it is tempered as if it were m / p_k tokens of that probability, the most it can weigh
    below temperature 1 and the least above.

    Shapes: logits [n, vocab]; ids and log-probs [n, k]; temperature [n] > 0; results [n, k + 1] float64.
    """
    heat = temperature.double()[:, None]
    logp = topk_logprobs.double()
    tail = (1.0 - logp.exp().sum(-1, keepdim=True)).clamp_min(_TINY)
    least = torch.minimum(logp.min(-1, keepdim=True).values, tail.log())
    log_tail = tail.log() - least + least / heat  # log(count · p_k^(1/T)) with count = tail / p_k >= 1
    p = torch.softmax(torch.cat([logp / heat, log_tail], dim=-1), dim=-1)
    log_q = torch.log_softmax(logits / heat.to(logits.dtype), dim=-1).gather(1, topk_ids).double()
    q = log_q.exp()
    return p, torch.cat([q, (1.0 - q.sum(-1, keepdim=True)).clamp_min(_TINY)], dim=-1)


def _target_top1(ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    # float16 makes ties; the list is falling, so its first entry is the top-1 among them
    slot = torch.where(logprobs[:, 0] >= logprobs.amax(-1), 0, logprobs.argmax(-1))
    return ids.gather(1, slot[:, None]).squeeze(1)


def _score_artifact(
    model: Any,
    pristine: dict[str, torch.Tensor],
    pair: Pair,
    root: Path,
    sha256: str | None,
    blocks: Sequence[VerifiedBlock],
    rules: GateRules,
) -> list[NDArray[Any]]:
    model.to(DTYPES[pair.dtype])
    factors, scale = {}, 1.0
    if sha256 is not None:
        manifest = artifacts.load_manifest(root, sha256)
        path = artifacts.verify(
            root,
            sha256,
            target_fingerprint=pair.target_fingerprint,
            base_fingerprint=pair.base_fingerprint,
            expected=expected_tensors(pair, manifest.rank),
        )
        factors, scale = load_factors(path), manifest.scale
    merge(model, pristine, factors, scale, max_norm_ratio=rules.max_norm_ratio)
    model.float()
    return score_blocks(model, model.get_output_embeddings().weight.detach(), blocks, rules.coupling)


def _paired(
    blocks: Sequence[VerifiedBlock], before: Sequence[NDArray[Any]], after: Sequence[NDArray[Any]], rules: GateRules
) -> dict[str, Any]:
    """Summarise both sides; the interval resamples whole requests, whose tokens hang together."""
    sums: dict[str, NDArray[Any]] = defaultdict(lambda: np.zeros(3))
    for block, old, new in zip(blocks, before, after, strict=True):
        sums[block.request_id] += (old.sum(), new.sum(), len(new))
    table = np.array(list(sums.values())).reshape(-1, 3)
    positions = int(table[:, 2].sum())
    if not positions:
        return {"live": None, "candidate": None, "difference": 0.0, "interval": [0.0, 0.0], "requests": 0,
                "positions": 0}  # fmt: skip
    chosen = np.random.default_rng(rules.seed).integers(len(table), size=(_RESAMPLES, len(table)))
    drawn = table[chosen].sum(1)
    edge = (1 - rules.confidence) / 2
    interval = np.quantile((drawn[:, 1] - drawn[:, 0]) / drawn[:, 2], [edge, 1 - edge])
    live, candidate = (float(table[:, side].sum() / positions) for side in (0, 1))
    return {
        "live": live,
        "candidate": candidate,
        "difference": candidate - live,
        "interval": [float(edge) for edge in interval],
        "requests": len(table),
        "positions": positions,
    }


def _by_segment(blocks: Sequence[VerifiedBlock]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for i, block in enumerate(blocks):
        found[block.segment].append(i)
    return dict(sorted(found.items()))


def _sentence(part: dict[str, Any]) -> str:
    if not part["positions"]:
        return "no held-out positions."
    low, high = part["interval"]
    gain = f"{part['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
    return (
        f"acceptance {part['live']:.3f} → {part['candidate']:.3f} ({gain}) "
        f"on {part['requests']} held-out requests, {part['positions']:,} positions."
    )


def _mean(scores: Sequence[NDArray[Any]]) -> float | None:
    joined = np.concatenate(scores) if scores else np.empty(0)
    return float(joined.mean()) if len(joined) else None
