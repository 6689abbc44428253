"""The layers of a Llama-shaped model in compiled code: what they need of a step, laid out for them.

Called by `serving.engine.llama`, where a C compiler was found, and by the draft loop.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kernels.cpu.drafting import Drafter, Scorer
from kernels.cpu.forward import Batch, Layers
from kernels.cpu.packing import PackedWeight
from serving.engine.attention import KVPool, Row


class CompiledLlama:
    """Compiled layers and the rotary tables they read.

    Args:
        rotary: the model's own rotary module.
    """

    def __init__(self, layers: Layers, rotary: Any) -> None:
        self._layers = layers
        self._rotary = rotary
        self._drafter: Drafter | None = None  # goes when this does: weights packed anew are another object's
        self._tables = (torch.empty(0, dtype=torch.float32), torch.empty(0, dtype=torch.float32))

    def states(self, x: torch.Tensor, pool: KVPool, rows: list[Row], wanted: torch.Tensor | None) -> torch.Tensor:
        """Write the caches of the new tokens and return the normed states of the wanted ones; None wants all.

        Shapes: x [tokens, hidden], embeddings in any dtype, overwritten if float32; wanted [rows];
        result [rows, hidden] in that dtype.
        """
        batch = _batch(rows, pool, torch.arange(len(x)) if wanted is None else wanted)
        return self._layers.states(x.float(), batch, *self._tables_to(batch.longest)).to(x.dtype)

    def drafter(
        self, embedding: torch.Tensor, head: PackedWeight, token_ids: torch.Tensor | None, width: int, pool: KVPool,
        end: int,
    ) -> Drafter:  # fmt: skip
        """Return what drafts whole rounds up to `end` positions on this pool; the one made last is kept.

        Shapes: see `kernels.cpu.drafting.Scorer`.
        """
        made = self._drafter
        if (
            made is None or made.positions < end or made.keys is not pool.token_keys
            or made.scorer.head is not head or made.scorer.width != width
        ):  # fmt: skip
            scorer, tables = Scorer(embedding, head, token_ids, width), self._tables_to(end)
            made = self._drafter = Drafter(
                self._layers, scorer, pool.token_keys, pool.token_values, pool.block_tokens, *tables
            )
        return made

    def _tables_to(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        tables = self._tables  # one reference: another thread may replace it by a shorter one
        if end > len(tables[0]):
            tables = self._tables = rotary_tables(self._rotary, end, tables[0])
        return tables


def rotary_tables(rotary: Any, end: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines, their first half negated, of at least `end` positions.

    Shapes: both [positions, dim], in the dtype of `like`.
    """
    cos, sin = rotary(like, torch.arange(1 << (end - 1).bit_length(), device=like.device)[None])
    sin = sin[0].clone()
    sin[:, : sin.shape[1] // 2].neg_()
    return cos[0].contiguous(), sin


def _batch(rows: list[Row], pool: KVPool, wanted: torch.Tensor) -> Batch:
    lengths = np.array([row.length for row in rows])
    starts = np.array([row.start for row in rows])
    longest = int((starts + lengths).max())
    width = -(-longest // pool.block_tokens)
    tables = np.zeros((len(rows), width), dtype=np.int32)
    for i, row in enumerate(rows):
        used = row.block_table[: -(-(row.start + row.length) // pool.block_tokens)]
        if len(used) * pool.block_tokens < row.start + row.length:
            raise IndexError(f"{len(used)} blocks do not hold {row.start + row.length} tokens")
        tables[i, : len(used)] = used
    if tables.min() < 0 or tables.max() >= len(pool.keys[0]):
        raise IndexError(f"block numbers must be 0 to {len(pool.keys[0]) - 1}")
    requests = np.repeat(np.arange(len(rows), dtype=np.int32), lengths)
    positions = np.arange(len(requests)) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    slots = tables[requests, positions // pool.block_tokens].astype(np.int64) * pool.block_tokens
    slots += positions % pool.block_tokens
    return Batch(
        torch.from_numpy(positions), torch.from_numpy(slots), torch.from_numpy(requests), torch.from_numpy(tables),
        wanted, pool.token_keys, pool.token_values, pool.block_tokens, longest,
    )  # fmt: skip
