"""Turns verified blocks into padded tensors, and a draft's forward pass into rows to judge.

A block is forwarded once, whole: the record at absolute position p is predicted by the hidden state
at index p - first_position - 1.  Attention is causal, so padding on the right changes nothing.  The
context of a block may start later than its request did; the draft then sees less than it will when
serving.  Called by `distill.tuning` and `distill.gate`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adapter.contracts import Verdict, VerifiedBlock


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded blocks and the positions they judge.

    Shapes (b blocks, t tokens, n records, k): token_ids, position_ids [b, t]; row, column [n] index
    the hidden states; topk_ids, topk_logprobs [n, k] falling; weights [n], sum one; temperature [n].
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    topk_ids: torch.Tensor
    topk_logprobs: torch.Tensor
    weights: torch.Tensor
    temperature: torch.Tensor


def collate(blocks: Sequence[VerifiedBlock], *, rejected_weight: float = 1.0) -> Batch:
    """Pad blocks to one length; with unequal top-k the smallest wins and the rest joins the tail."""
    columns = [block.array("positions").astype(np.int64) - block.first_position - 1 for block in blocks]
    used = [int(column.max()) + 1 for column in columns]
    token_ids = np.zeros((len(blocks), max(used)), dtype=np.int64)
    for i, block in enumerate(blocks):
        token_ids[i, : used[i]] = block.array("token_ids")[: used[i]]
    first = torch.tensor([block.first_position for block in blocks])
    k = min(block.top_k for block in blocks)
    weights = _join([block.array("verdicts") == Verdict.REJECTED for block in blocks]).float()
    weights = 1.0 + (rejected_weight - 1.0) * weights
    sizes = torch.tensor([block.num_records for block in blocks])
    temperatures = torch.tensor([block.sampling.temperature for block in blocks])
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        position_ids=first[:, None] + torch.arange(max(used)),
        row=torch.arange(len(blocks)).repeat_interleave(sizes),
        column=_join(columns),
        topk_ids=_join([block.array("topk_ids")[:, :k].astype(np.int64) for block in blocks]),
        topk_logprobs=_join([block.array("topk_logprobs")[:, :k].astype(np.float32) for block in blocks]),
        weights=weights / weights.sum(),
        temperature=temperatures.repeat_interleave(sizes),
    )


def judged_states(model: Any, batch: Batch) -> torch.Tensor:
    """Run a causal language model's body and return what its head would read at every record.

    Shapes: result [n, h], in the model's dtype.
    """
    out = model.model(input_ids=batch.token_ids, position_ids=batch.position_ids, use_cache=False)
    return out.last_hidden_state[batch.row, batch.column]  # type: ignore[no-any-return]


def plan_batches(tokens: Sequence[int], batch_tokens: int, seed: str) -> list[list[int]]:
    """Group items so that a padded group holds at most `batch_tokens`, in a seeded order.

    Lengths are sorted within shuffled windows: little padding, and still a different mix every time.
    """
    pick = random.Random(seed)
    order = list(range(len(tokens)))
    pick.shuffle(order)
    window = 64
    order = [i for at in range(0, len(order), window) for i in sorted(order[at : at + window], key=lambda i: tokens[i])]
    groups: list[list[int]] = []
    for i in order:
        longest = max([tokens[i]] + [tokens[j] for j in groups[-1]]) if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    pick.shuffle(groups)
    return groups


def _join(parts: Sequence[np.ndarray[Any, Any]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))
