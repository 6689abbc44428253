"""Turns verified blocks into rows for a draft's forward pass, and its states into rows to judge.

Sequences lie end to end in one row and nothing is padded (`distill.packing`).  Blocks of one request that
continue each other become one sequence, so a token is forwarded once however many blocks carry it as
context.  The record at absolute position p is predicted by the state of the token before it.  The context
of a block may start later than its request did; the draft then sees less than it will when serving.
Called by `distill.tuning` and `distill.scoring`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapter.contracts import Verdict, VerifiedBlock
from distill.grouping import places_by_request
from distill.packing import use_packed_attention


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences end to end and the positions they judge, in the order of the blocks and their records.

    Shapes (t tokens, n records, k): token_ids, position_ids [1, t]; `lengths` sum to t; place [n] indexes the
    hidden states; topk_ids, topk_logprobs [n, k] falling, natural, at temperature 1; weights [n], sum one unless the
    blocks are a part of more;
    temperature, top_p, min_p [n] and top_k [n] int64 as the request asked for.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: list[int]
    place: torch.Tensor
    topk_ids: torch.Tensor
    topk_logprobs: torch.Tensor
    weights: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor


@dataclass(frozen=True, slots=True)
class RowWeights:
    """What a record counts in the loss, by its verdict; `accepted` is for everything that was not rejected.

    (1, 1) learns from all verified positions alike, (1, 0) from rejections only as OSD does (arXiv 2310.07177).
    """

    rejected: float = 1.0
    accepted: float = 1.0


EQUAL = RowWeights()


def collate(
    blocks: Sequence[VerifiedBlock], weights: RowWeights = EQUAL, part_of: Sequence[VerifiedBlock] | None = None
) -> Batch:
    """Lay blocks end to end; with unequal top-k the smallest wins and the rest joins the tail.

    Rows are weighted by their verdict and by one over the chance that they were logged.  Where the blocks are a part
    of more, the weights of all parts together sum to one, and all have the same top-k.
    """
    everything = blocks if part_of is None else part_of
    sequences = _join_requests(blocks)
    starts = np.cumsum([0] + [len(item.token_ids) for item in sequences])
    places, owner = [], {i: (n, item) for n, item in enumerate(sequences) for i in item.blocks}
    for i, block in enumerate(blocks):
        n, item = owner[i]
        places.append(block.array("positions").astype(np.int64) - item.first_position - 1 + starts[n])
    k = min(block.top_k for block in everything)
    rows = np.concatenate([_row_weights(block, weights) for block in blocks])
    total = rows.sum() if part_of is None else sum(_row_weights(block, weights).sum() for block in part_of)
    sizes = torch.tensor([block.num_records for block in blocks])
    positions = [np.arange(len(item.token_ids)) + item.first_position for item in sequences]

    def asked(values: list[float] | list[int]) -> torch.Tensor:
        return torch.tensor(values).repeat_interleave(sizes)

    return Batch(
        token_ids=_join([item.token_ids for item in sequences])[None],
        position_ids=_join(positions)[None],
        lengths=[len(item.token_ids) for item in sequences],
        place=_join(places),
        topk_ids=_join([block.array("topk_ids")[:, :k].astype(np.int64) for block in blocks]),
        topk_logprobs=_join([block.array("topk_logprobs")[:, :k].astype(np.float32) for block in blocks]),
        weights=torch.from_numpy(rows / max(total, np.finfo(np.float64).tiny)).float(),
        temperature=asked([block.sampling.temperature for block in blocks]),
        top_p=asked([block.sampling.top_p for block in blocks]),
        top_k=asked([block.sampling.top_k for block in blocks]),
        min_p=asked([block.sampling.min_p for block in blocks]),
    )


def judged_states(model: Any, batch: Batch) -> torch.Tensor:
    """Run a causal language model's body and return what its head would read at every record.

    Shapes: result [n, h], in the model's dtype.
    """
    use_packed_attention(model)
    out = model.model(
        input_ids=batch.token_ids, position_ids=batch.position_ids, use_cache=False, lengths=batch.lengths
    )
    return out.last_hidden_state[0, batch.place]  # type: ignore[no-any-return]


def plan_batches(tokens: Sequence[int], batch_tokens: int, seed: str) -> list[list[int]]:
    """Group items, in a seeded order, so that a group holds at most `batch_tokens` unless one item alone is longer."""
    order = list(range(len(tokens)))
    random.Random(seed).shuffle(order)
    groups: list[list[int]] = []
    room = 0
    for i in order:
        if not groups or tokens[i] > room:
            groups.append([])
            room = batch_tokens
        groups[-1].append(i)
        room -= tokens[i]
    return groups


def by_request(blocks: Sequence[VerifiedBlock]) -> list[list[VerifiedBlock]]:
    """Put the blocks of each request together, oldest first, requests in the order in which they first come."""
    groups = [[blocks[i] for i in places] for places in places_by_request(blocks)]
    return [sorted(group, key=lambda block: block.first_position + len(block.token_ids)) for group in groups]


def num_tokens(blocks: Sequence[VerifiedBlock]) -> int:
    """Return how many tokens `collate` would lay down for blocks."""
    return sum(len(item.token_ids) for item in _join_requests(blocks))


@dataclass(slots=True)
class _Sequence:
    first_position: int
    token_ids: NDArray[np.int64]
    blocks: list[int]


def _join_requests(blocks: Sequence[VerifiedBlock]) -> list[_Sequence]:
    """Join blocks of one request where the later one's context lies in or right behind what came before.

    Tokens behind a block's last record are left out: nothing is judged there.
    """
    order = sorted(range(len(blocks)), key=lambda i: (blocks[i].request_id, int(blocks[i].array("positions")[-1])))
    joined: dict[str, _Sequence] = {}
    done: list[_Sequence] = []
    for i in order:
        block, first = blocks[i], blocks[i].first_position
        used = int(block.array("positions").max()) - first
        tokens = block.array("token_ids")[:used].astype(np.int64)
        before = joined.get(block.request_id)
        if before is not None and before.first_position <= first <= before.first_position + len(before.token_ids):
            known = before.first_position + len(before.token_ids) - first
            before.token_ids = np.concatenate([before.token_ids, tokens[known:]])
            before.blocks.append(i)
            continue
        joined[block.request_id] = _Sequence(first, tokens, [i])
        done.append(joined[block.request_id])
    return done


def _row_weights(block: VerifiedBlock, weights: RowWeights) -> NDArray[np.float64]:
    rejected = block.array("verdicts") == Verdict.REJECTED
    return block.row_weights() * np.where(rejected, weights.rejected, weights.accepted)


def _join(parts: Sequence[NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))
