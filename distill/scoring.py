"""How often a draft would be accepted at each logged position.

Acceptance is the chance that draft and target agree under the coupling in force (`kernels.acceptance`), at the
request's temperature and after its top-k, top-p and min-p; where it was greedy, whether the likeliest tokens are
the same.  Serving shapes the draft's logits with the request's parameters as it does the target's, so both laws
are cut here, each by itself, and where the draft scores a trimmed vocabulary its law lives on that alone.

What is approximate, and equally so for every draft that is compared:

- The target is known by its logged top-k.  What lies outside is one symbol, which makes the acceptance an upper
  bound; it is exact once the request's own cut lies inside the logged top-k, for then nothing lies outside.
- Where it does not, a nucleus keeps of the symbol what its mass lacks, and a longer top-k or a min-p below the
  last logged token keeps it whole.
- Penalties, logit biases and the rules of structured output are not known here.

Knows nothing about artifacts or rules.  Called by `distill.gate`, `distill.tuning` and `distill.job`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapter.contracts import Coupling, VerifiedBlock
from distill.batches import Batch, collate, judged_states, num_tokens, plan_batches
from distill.grouping import places_by_request
from distill.vocabulary import Vocabulary
from kernels.acceptance import gumbel_acceptance, maximal_acceptance
from kernels.sampling import RowParams, shape_logits

_CHUNK_ROWS = 256
BATCH_TOKENS = 4096
_TINY = 1e-9


def score_blocks(
    model: Any,
    head: torch.Tensor,
    blocks: Sequence[VerifiedBlock],
    coupling: Coupling,
    allowed: torch.Tensor | None = None,
) -> list[NDArray[Any]]:
    """Return the acceptance of every record, one float64 array a block.

    Args:
        head: the draft's whole output head.  Shapes: [vocab, h].
        allowed: ids of the trimmed vocabulary in force, int64, ascending; None scores all tokens.

    Raises:
        ValueError: the draft has a row for none of the allowed tokens.
    """
    vocabulary = Vocabulary(allowed, len(head))
    scored = vocabulary.head_of(head)
    scores: list[NDArray[Any]] = [np.empty(0)] * len(blocks)
    requests = places_by_request(blocks)  # read in one row, a request's blocks need their context once
    sizes = [num_tokens([blocks[i] for i in group]) for group in requests]
    for chosen in plan_batches(sizes, BATCH_TOKENS, "score"):
        group = [i for request in chosen for i in requests[request]]
        batch = collate([blocks[i] for i in group])
        with torch.inference_mode():
            values = _acceptance(judged_states(model, batch), scored, vocabulary, batch, coupling).numpy()
        ends = np.cumsum([blocks[i].num_records for i in group])[:-1]
        for i, part in zip(group, np.split(values, ends), strict=True):
            scores[i] = part
    return scores


def weighted_mean(blocks: Sequence[VerifiedBlock], scores: Sequence[NDArray[Any]]) -> float | None:
    """Return the mean acceptance of all verified positions, records that stand for several counting as often."""
    weights = [block.row_weights() for block in blocks]
    total = sum(float(part.sum()) for part in weights)
    return sum(float(part @ score) for part, score in zip(weights, scores, strict=True)) / total if total else None


def position_acceptance(
    hidden: torch.Tensor, head: torch.Tensor, batch: Batch, coupling: Coupling, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the acceptance of each record: closed form where it samples, equal top-1 where it is greedy.

    Shapes: hidden [n, h]; head [vocab, h]; result [n] float64, NaN where the draft's logits are no numbers.
    """
    vocabulary = Vocabulary(allowed, len(head))
    return _acceptance(hidden, vocabulary.head_of(head), vocabulary, batch, coupling)


def target_law(topk_logprobs: torch.Tensor, rows: RowParams) -> torch.Tensor:
    """Return the law the target draws from, over its logged top-k and one tail symbol.

    The tail is known only as a mass m of tokens no likelier than the k-th, p_k: it is tempered as if it were
    m / p_k tokens of that probability, the most it can weigh below temperature 1 and the least above.  Then it
    is cut as `kernels.sampling.shape_logits` cuts: to top-k, to the nucleus of what is left, to min-p.

    Shapes: topk_logprobs [n, k] falling; result [n, k + 1] float64, rows sum to one.
    """
    heat = rows.temperature.double()[:, None]
    logp = topk_logprobs.double()
    outside = (1.0 - logp.exp().sum(-1, keepdim=True)).clamp_min(_TINY)
    least = torch.minimum(logp.min(-1, keepdim=True).values, outside.log())
    log_tail = outside.log() - least + least / heat  # log(count · p_k^(1/T)) with count = outside / p_k >= 1
    law = torch.softmax(torch.cat([logp / heat, log_tail], dim=-1), dim=-1)
    top, tail = law[:, :-1], law[:, -1:]
    rank = torch.arange(top.shape[1])[None]
    asked = rows.top_k[:, None]
    within = (asked > 0) & (asked <= top.shape[1])
    top, tail = top * (~within | (rank < asked)), tail * ~within
    nucleus = rows.top_p.double()[:, None] * (top.sum(-1, keepdim=True) + tail)
    before = top.cumsum(-1) - top
    lacking = (nucleus - top.sum(-1, keepdim=True)).clamp_min(0.0)
    tail = torch.where(rows.top_p[:, None] < 1, torch.minimum(tail, lacking), tail)
    top = top * ((before < nucleus) | (rank == 0))
    if rows.min_p is not None:
        border = rows.min_p.double()[:, None] * law[:, :-1].amax(-1, keepdim=True)
        tail = tail * (law[:, :-1].min(-1, keepdim=True).values >= border)
        top = top * (law[:, :-1] >= border)
    return torch.cat([top, tail], -1) / (top.sum(-1, keepdim=True) + tail)


def _acceptance(
    hidden: torch.Tensor, head: torch.Tensor, vocabulary: Vocabulary, batch: Batch, coupling: Coupling
) -> torch.Tensor:
    closed_form = gumbel_acceptance if coupling == "gumbel" else maximal_acceptance
    found, asked = torch.empty(hidden.shape[0], dtype=torch.float64), row_params(batch)
    for at in range(0, hidden.shape[0], _CHUNK_ROWS):
        part = slice(at, at + _CHUNK_ROWS)
        logits = (hidden[part].to(head.dtype) @ head.t()).float()
        ids, logprobs = batch.topk_ids[part], batch.topk_logprobs[part]
        values = (logits.argmax(-1) == vocabulary.find(_target_top1(ids, logprobs))).double()
        hot = torch.nonzero(batch.temperature[part] > 0).squeeze(1)
        if len(hot):
            rows = asked.rows(hot + at)
            values[hot] = closed_form(
                target_law(logprobs[hot], rows), _draft_law(logits[hot], vocabulary.find(ids[hot]), rows)
            )
        values[~logits.isfinite().all(-1)] = torch.nan
        found[part] = values
    return found


def _draft_law(logits: torch.Tensor, columns: torch.Tensor, rows: RowParams) -> torch.Tensor:
    """Return the law the draft draws from, over given columns and what is left.  A column of -1 has no chance."""
    law = torch.softmax(shape_logits(logits, rows), dim=-1)
    q = torch.where(columns < 0, 0.0, law.gather(1, columns.clamp_min(0))).double()
    return torch.cat([q, (1.0 - q.sum(-1, keepdim=True)).clamp_min(_TINY)], dim=-1)


def row_params(batch: Batch) -> RowParams:
    """Return how the records of a batch were sampled; without seeds, for nothing is drawn."""
    return RowParams(
        temperature=batch.temperature.float(), top_p=batch.top_p.float(), top_k=batch.top_k,
        seeds=torch.zeros_like(batch.top_k), positions=torch.zeros_like(batch.top_k), min_p=batch.min_p.float(),
    )  # fmt: skip


def _target_top1(ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    # float16 makes ties; the list is falling, so its first entry is the top-1 among them
    slot = torch.where(logprobs[:, 0] >= logprobs.amax(-1), 0, logprobs.argmax(-1))
    return ids.gather(1, slot[:, None]).squeeze(1)
