"""The lean forward on a device: every length is read from device memory, so one program serves all steps.

Runs the fused weights of `serving.engine.llama.LeanLlama` through `kernels.dispatch`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import embedding

from kernels import dispatch
from serving.engine.attention import KVPool
from serving.engine.llama import LeanLlama
from serving.engine.work import Work


@dataclass(frozen=True, slots=True)
class Places:
    """Where the new tokens of a forward lie.

    Shapes: positions and slots [tokens] int64, a slot of -1 writes nothing; tables [requests, width] int32;
    starts [requests + 1] int32; lengths [requests] int32, cached tokens with the new ones.  `longest` is the
    most new tokens a request can have.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    longest: int


def places_of(work: list[Work], block_tokens: int, device: torch.device) -> Places:
    """Lay out a ragged batch that the host knows."""
    counts = np.array([len(item.token_ids) for item in work])
    lengths = np.array([item.start for item in work]) + counts
    width = -(-int(lengths.max()) // block_tokens)
    tables = np.zeros((len(work), width), np.int32)
    for row, item in zip(tables, work, strict=True):
        used = item.block_table[:width]
        row[: len(used)] = used
    requests = np.repeat(np.arange(len(work)), counts)
    ends = np.cumsum(counts)
    positions = np.arange(len(requests)) + np.repeat(lengths - ends, counts)
    slots = tables[requests, positions // block_tokens].astype(np.int64) * block_tokens + positions % block_tokens
    starts = np.concatenate(([0], ends)).astype(np.int32)
    arrays = (positions, slots, tables, starts, lengths.astype(np.int32))
    positions_on, slots_on, tables_on, starts_on, lengths_on = (torch.from_numpy(item).to(device) for item in arrays)
    return Places(positions_on, slots_on, tables_on, starts_on, lengths_on, int(counts.max()))


class DeviceLlama:
    """One model's layers over its cache on a device.

    Args:
        lean: the model's fused weights; they are read where they lie, so writing to them is an update.
        positions: how many positions the rotary tables cover.
    """

    def __init__(self, lean: LeanLlama, pool: KVPool, positions: int) -> None:
        self._lean = lean
        self._pool = pool
        self._cos, self._sin = lean.rotary_tables(positions)

    @property
    def rows(self) -> int:
        """How many tokens have an embedding."""
        return len(self._lean.embedding)

    def states(self, tokens: torch.Tensor, places: Places, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """Process new tokens and return the normed states of the wanted ones; None wants all.

        Where no state is wanted it ends with the last layer's keys and values.
        Shapes: tokens [tokens] int64; wanted [rows] indices into them; result [rows, hidden].
        """
        lean, pool = self._lean, self._pool
        residual = embedding(tokens, lean.embedding).clone()
        update = None
        last = len(lean.layers) - 1
        for number, layer in enumerate(lean.layers):
            norm = layer.input_norm
            if update is None:
                x = dispatch.add_rms_norm(residual, None, norm.weight, norm.eps)
            else:
                x = dispatch.add_rms_norm(update, residual, norm.weight, norm.eps)
            query = dispatch.rope_and_write(
                layer.qkv(x), self._cos, self._sin, places.positions, places.slots, pool.keys[number],
                pool.values[number], heads=lean.heads, norms=layer.head_norms,
            )  # fmt: skip
            if number == last and wanted is not None and not len(wanted):
                return residual[:0]  # keys and values are all that was asked for
            attended = dispatch.paged_attention(
                query, pool.keys[number], pool.values[number], places.tables, places.starts, places.lengths,
                layer.scaling, max_query=places.longest,
            ).flatten(1)  # fmt: skip
            if number == last and wanted is not None:
                residual, attended = residual.index_select(0, wanted), attended.index_select(0, wanted)
            norm = layer.mlp_norm
            x = dispatch.add_rms_norm(layer.output(attended), residual, norm.weight, norm.eps)
            update = layer.down(dispatch.silu_mul(layer.gate_up(x)))
        return dispatch.add_rms_norm(update, residual, lean.norm.weight, lean.norm.eps)
