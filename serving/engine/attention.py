"""Attention over a paged KV cache for a ragged batch, registered into stock transformers models.

All tokens of a step are flattened into one row, so that linear layers never see padding.  Only
attention pads, and only among rows of similar length: decoding rows are one group and every long
prefill chunk is its own.  Heads that share a key are folded into the query length, so keys and
values are never expanded.

The layout of a step reaches the attention function as the keyword `paged`, which transformers
passes through from the model's forward call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from adapter.contracts import SettingsError

IMPLEMENTATION = "draftsmith_paged"
_SHORT = 32  # rows with at most this many new tokens share one padded group
_IN_PLACE_TOKENS = 256  # from this length on, reading a row where it lies beats gathering all rows into one call


@dataclass(frozen=True, slots=True)
class Row:
    """The new tokens of one request in one forward: its block table, first position and length."""

    block_table: list[int]
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Span:
    """One row whose blocks follow each other in the pool, so that it is read where it lies.

    Shapes: rows at flat indices [first, first + total); cached tokens at slots [slot, slot + length);
    mask [1, 1, shared * total, length] additive, None where every query sees everything.
    """

    first: int
    total: int
    slot: int
    length: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that attend together, their keys and values gathered.

    Shapes: rows at flat indices [first, first + total); padded [batch * q] indexes them (`first`
    where padded) and is None when nothing is padded; kept [total] indexes the padded result; blocks
    [batch * num_blocks]; mask [batch, 1, shared * q, length] additive, with the heads that share a
    key folded into the queries, None where every query sees all `length` tokens.
    """

    first: int
    total: int
    batch: int
    length: int
    padded: torch.Tensor | None
    kept: torch.Tensor | None
    blocks: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every token of a step lies.  Shapes: positions and slots [tokens] int64; end: largest position + 1."""

    positions: torch.Tensor
    slots: torch.Tensor
    groups: list[Group | Span]
    end: int


class KVPool:
    """Keys and values of one model in fixed blocks.  Rollback is not writing: lengths rule.

    Shapes: keys[layer] and values[layer] [blocks, block_tokens, kv_heads, dim]; `token_keys` and
    `token_values` are the same storage as [slots, kv_heads, dim].
    """

    def __init__(
        self, config: Any, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (num_blocks, block_tokens, config.num_key_value_heads, dim)
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.dtype = dtype
        self.shared = config.num_attention_heads // config.num_key_value_heads
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.token_keys = [item.view(-1, *shape[2:]) for item in self.keys]
        self.token_values = [item.view(-1, *shape[2:]) for item in self.values]

    def clear(self, blocks: list[int]) -> None:
        """Fill blocks with zeros.  A masked NaN is still a NaN: left there it would spoil whoever gets them next."""
        for tensor in (*self.keys, *self.values):
            tensor[blocks] = 0.0

    def scrub(self, blocks: list[int]) -> None:
        """Replace what is not finite in these blocks, which a broken draft may have left, by zeros."""
        for tensor in (*self.keys, *self.values):
            tensor[blocks] = tensor[blocks].nan_to_num_(0.0, 0.0, 0.0)

    @staticmethod
    def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
        """Return what one token costs over all layers."""
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * config.num_key_value_heads * dim * dtype.itemsize)


def build_layout(rows: list[Row], block_tokens: int, dtype: torch.dtype, shared: int) -> Layout:
    """Lay out rows that are ordered short ones first; `shared` heads use one key."""
    positions, slots = [], []
    for row in rows:
        index = np.arange(row.start, row.start + row.length)
        table = np.array(row.block_table[: (row.start + row.length - 1) // block_tokens + 1], dtype=np.int64)
        positions.append(index)
        slots.append(table[index // block_tokens] * block_tokens + index % block_tokens)
    end = max(row.start + row.length for row in rows)
    return Layout(
        torch.from_numpy(np.concatenate(positions)), torch.from_numpy(np.concatenate(slots)),
        _groups(rows, block_tokens, dtype, shared), end,
    )  # fmt: skip


def _groups(rows: list[Row], block_tokens: int, dtype: torch.dtype, shared: int) -> list[Group | Span]:
    """Decide which rows are read in place and which are gathered."""
    short = [row for row in rows if row.length <= _SHORT]
    groups: list[Group | Span] = []
    first = 0
    for members in ([short] if short else []) + [[row] for row in rows[len(short) :]]:
        longest = max(row.start + row.length for row in members)
        in_place = len(members) == 1 or longest >= _IN_PLACE_TOKENS
        if in_place and all(_consecutive(row, block_tokens) for row in members):
            for row in members:
                groups.append(_span(row, first, block_tokens, dtype, shared))
                first += row.length
        else:
            group = _group(members, first, block_tokens, dtype, shared)
            groups.append(group)
            first += group.total
    return groups


def _consecutive(row: Row, block_tokens: int) -> bool:
    used = row.block_table[: (row.start + row.length - 1) // block_tokens + 1]
    return used == list(range(used[0], used[0] + len(used)))


def _span(row: Row, first: int, block_tokens: int, dtype: torch.dtype, shared: int) -> Span:
    end = row.start + row.length
    mask = None
    if row.length > 1:
        query = torch.arange(row.start, end).repeat(shared)[:, None]
        mask = torch.zeros(query.shape[0], end, dtype=dtype).masked_fill_(torch.arange(end) > query, -torch.inf)
        mask = mask[None, None]
    return Span(first, row.length, row.block_table[0] * block_tokens, end, mask)


def _group(rows: list[Row], first: int, block_tokens: int, dtype: torch.dtype, shared: int) -> Group:
    lengths = np.array([row.length for row in rows])
    ends = np.array([row.start + row.length for row in rows])
    q_max, total, longest = int(lengths.max()), int(lengths.sum()), int(ends.max())
    num_blocks = -(-longest // block_tokens)
    blocks = [block for row in rows for block in (row.block_table[:num_blocks] + [0] * num_blocks)[:num_blocks]]
    mask = None
    if q_max > 1 or int(ends.min()) != longest:
        # A padded query sees what its row has, so that no row of the softmax is empty.
        query = np.minimum((ends - lengths)[:, None] + np.arange(q_max), longest)
        hidden = np.arange(longest) > np.tile(query, (1, shared))[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)
    padded = kept = None
    if int(lengths.min()) != q_max:
        inside = np.arange(q_max) < lengths[:, None]
        offsets = np.cumsum(lengths) - lengths
        flat = np.where(inside, offsets[:, None] + np.arange(q_max), 0) + first
        padded = torch.from_numpy(flat.ravel())
        kept = torch.from_numpy(np.flatnonzero(inside))
    return Group(first, total, len(rows), longest, padded, kept, torch.tensor(blocks), mask)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    paged: tuple[KVPool, Layout],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Be transformers' attention function.

    Shapes: query [1, heads, tokens, dim]; key, value [1, kv_heads, tokens, dim];
    result [1, tokens, heads, dim].

    Raises:
        SettingsError: the model caps its attention scores or adds a sink to them, which this does not.
    """
    if softcap is not None or s_aux is not None:
        raise SettingsError(
            f"{type(module).__name__} caps attention scores (softcap) or adds sinks to them (s_aux); only models with "
            "plain softmax attention are served"
        )
    pool, layout = paged
    out = attend(
        pool, layout, module.layer_idx, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1),  # type: ignore[arg-type]
        scaling,
    )  # fmt: skip
    return out[None], None


def attend(
    pool: KVPool, layout: Layout, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:  # fmt: skip
    """Write the new keys and values into the pool and attend group by group.

    Shapes: query [tokens, heads, dim]; key, value [tokens, kv_heads, dim]; result [tokens, heads, dim].
    """
    store(pool, layout, layer, key, value)
    kv_heads, dim = key.shape[1], key.shape[2]
    shared = query.shape[1] // kv_heads
    outputs = []
    for group in layout.groups:
        if isinstance(group, Span):
            rows, batch = query[group.first : group.first + group.total], 1
            k = _in_place(pool.token_keys[layer], group)
            v = _in_place(pool.token_values[layer], group)
        else:
            whole = group.padded is None
            rows = query[group.first : group.first + group.total] if whole else query.index_select(0, group.padded)
            batch = group.batch
            k = _gather(pool.keys[layer], group, kv_heads, dim)
            v = _gather(pool.values[layer], group, kv_heads, dim)
        q_len = rows.shape[0] // batch
        if q_len > 1:
            rows = rows.reshape(batch, q_len, kv_heads, shared, dim).permute(0, 2, 3, 1, 4)
        folded = rows.reshape(batch, kv_heads, shared * q_len, dim)
        out = scaled_dot_product_attention(folded, k, v, attn_mask=group.mask, scale=scaling)
        if q_len > 1:
            out = out.view(batch, kv_heads, shared, q_len, dim).permute(0, 3, 1, 2, 4)
        out = out.reshape(-1, kv_heads * shared, dim)
        kept = None if isinstance(group, Span) else group.kept
        outputs.append(out if kept is None else out.index_select(0, kept))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def store(pool: KVPool, layout: Layout, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write the new keys and values into the pool.  Shapes: [tokens, kv_heads, dim]."""
    pool.token_keys[layer].index_copy_(0, layout.slots, key)
    pool.token_values[layer].index_copy_(0, layout.slots, value)


def _in_place(cache: torch.Tensor, span: Span) -> torch.Tensor:
    """View one row's part of the pool.  Shapes: cache [slots, kv_heads, dim]; result [1, kv_heads, length, dim]."""
    slot, head, one = cache.stride()
    shape = (1, cache.shape[1], span.length, cache.shape[2])
    return cache.as_strided(shape, (0, head, slot, one), span.slot * slot)


def _gather(cache: torch.Tensor, group: Group, kv_heads: int, dim: int) -> torch.Tensor:
    """Copy the blocks of all rows side by side.  Shapes: result [batch, kv_heads, length, dim]."""
    picked = cache.flatten(1).index_select(0, group.blocks)
    return picked.view(group.batch, -1, kv_heads, dim)[:, : group.length].transpose(1, 2)


def register() -> None:
    """Make the implementation known to transformers; calling it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)
