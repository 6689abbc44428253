"""What a draft is taught at each record: the law the target's token was really drawn from.

The log holds the target's likeliest tokens at temperature 1.  A request at another temperature, or with
top-k, top-p or min-p, draws from another law, and matching that one is what acceptance counts.  A greedy
request has no law but a winner; it is taught at a temperature of its own, which keeps what the runners-up
tell.  The draft scores the tokens of its vocabulary only, so the others join the tail.  Knows nothing about
models.  Called by `distill.tuning`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from distill.batches import Batch
from distill.scoring import row_params, target_law
from distill.vocabulary import Vocabulary

_TINY = 1e-9


@dataclass(frozen=True, slots=True)
class Lesson:
    """One law a record.

    Shapes: ids [n, k] int64, distinct in a row, places in the draft's own head; logprobs [n, k] natural, what they
    leave over is the tail; heat [n]: the draft's logits are divided by it.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    heat: torch.Tensor


def lesson(batch: Batch, vocabulary: Vocabulary, greedy_temperature: float) -> Lesson:
    """Return what each record of a batch teaches."""
    heat = torch.where(batch.temperature > 0, batch.temperature, greedy_temperature).float()
    law = target_law(batch.topk_logprobs, row_params(replace(batch, temperature=heat)))
    ids, logprobs = vocabulary.translate(batch.topk_ids, law[:, :-1].clamp_min(_TINY).log().float())
    return Lesson(ids, logprobs, heat)
