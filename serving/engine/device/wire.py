"""What crosses between host and device in a step: one packed array each way.

Both are int32 matrices with one row a request.  Columns that hold other types hold their bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from adapter.contracts import Sampling

# Columns of the array that goes out; the block table follows.
FRESH, LENGTH, BEFORE_LAST, LAST, CAPACITY, LIMIT, GAMMA, SLOT, TOP_K = range(9)
TEMPERATURE, TOP_P, MIN_P, SEED_LOW, SEED_HIGH = range(9, 14)
TABLE = 14


def sampling_columns(sampling: Sampling) -> np.ndarray:
    """Return columns TOP_K to SEED_HIGH of a request's row."""
    reals = np.array([sampling.temperature, sampling.top_p, sampling.min_p], np.float32).view(np.int32)
    seed = np.array([sampling.seed], np.uint64).view(np.int32)
    return np.concatenate((np.array([sampling.top_k], np.int32), reals, seed))


@dataclass(frozen=True, slots=True)
class Received:
    """A step's input as tensors.

    Shapes: all [batch] but `last` [batch, 2], the last two committed tokens, and `tables` [batch, width].
    Where `fresh` is not set, length and last tokens are those the device knows.  `limit` is the longest a request
    may become by a draft: gamma is cut to it, by the length the device knows.
    """

    fresh: torch.Tensor
    length: torch.Tensor
    last: torch.Tensor
    capacity: torch.Tensor
    limit: torch.Tensor
    gamma: torch.Tensor
    slot: torch.Tensor
    top_k: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    tables: torch.Tensor


def receive(packed: torch.Tensor) -> Received:
    """Take a packed input apart.  Shapes: packed [batch, TABLE + width] int32."""
    reals = packed[:, TEMPERATURE : MIN_P + 1].contiguous().view(torch.float32)
    return Received(
        fresh=packed[:, FRESH] != 0, length=packed[:, LENGTH].long(), last=packed[:, BEFORE_LAST : LAST + 1].long(),
        capacity=packed[:, CAPACITY].long(), limit=packed[:, LIMIT].long(), gamma=packed[:, GAMMA].long(),
        slot=packed[:, SLOT].long(), top_k=packed[:, TOP_K].long(),
        temperature=reals[:, 0], top_p=reals[:, 1], min_p=reals[:, 2],
        seeds=(packed[:, SEED_HIGH].long() << 32) | (packed[:, SEED_LOW].long() & 0xFFFFFFFF),
        tables=packed[:, TABLE:].contiguous(),
    )  # fmt: skip


_FIGURES = 5  # columns of the output that are one number a request


@dataclass(frozen=True, slots=True)
class Sent:
    """The columns of a step's output for draft length `gamma` and `top_k` recorded tokens a position."""

    gamma: int
    top_k: int

    @property
    def width(self) -> int:
        """How many columns there are."""
        rows = self.gamma + 1
        return _FIGURES + 2 * self.gamma + 2 * rows * self.top_k

    def pack(
        self, accepted: torch.Tensor, tokens: torch.Tensor, finite: torch.Tensor, sound: torch.Tensor,
        drafted: torch.Tensor, drafts: torch.Tensor, draft_logprobs: torch.Tensor, topk_ids: torch.Tensor | None,
        topk_logprobs: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """Put the results of a step into one array.

        Shapes: accepted, tokens, finite (the target's logits are numbers), sound (the draft's are) and drafted (how
        many were judged) [batch]; drafts and draft_logprobs [batch, gamma]; the top k [batch * (gamma + 1), k];
        result [batch, width] int32.
        """
        batch = len(accepted)
        parts = [item[:, None].int() for item in (accepted, tokens, finite, sound, drafted)] + [drafts.int()]
        parts.append(draft_logprobs.float().view(torch.int32))
        if topk_ids is not None and topk_logprobs is not None:
            parts += [topk_ids.reshape(batch, -1).int(), topk_logprobs.float().view(torch.int32).reshape(batch, -1)]
        return torch.cat(parts, dim=1)

    def unpack(self, packed: np.ndarray) -> Landing:
        """Read what `pack` wrote."""
        gamma, rows = self.gamma, self.gamma + 1
        ends = np.cumsum([_FIGURES, gamma, gamma, rows * self.top_k, rows * self.top_k])
        drafts, logprobs, ids, values = (packed[:, a:b] for a, b in pairwise(ends))
        batch = len(packed)
        accepted, tokens, finite, sound, drafted = packed[:, :_FIGURES].T.tolist()
        return Landing(
            accepted, tokens, finite, sound, drafted, drafts.tolist(),
            np.ascontiguousarray(logprobs).view(np.float32).tolist(),
            np.ascontiguousarray(ids).view("<u4").reshape(batch, rows, self.top_k),
            np.ascontiguousarray(values).view(np.float32).astype("<f2").reshape(batch, rows, self.top_k),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Landing:
    """A step's results on the host; shapes as `Sent.pack` has them, the top k [batch, gamma + 1, k]."""

    accepted: list[int]
    tokens: list[int]
    finite: list[int]
    sound: list[int]
    drafted: list[int]
    drafts: list[list[int]]
    draft_logprobs: list[list[float]]
    topk_ids: np.ndarray
    topk_logprobs: np.ndarray
