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

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

IMPLEMENTATION = "draftsmith_paged"
_SHORT = 32  # rows with at most this many new tokens share one padded group


@dataclass(frozen=True, slots=True)
class Row:
    """The new tokens of one request in one forward: its block table, first position and length."""

    block_table: list[int]
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that attend together.

    Shapes: rows at flat indices [first, first + total); padded [batch, q] indexes them (0 where
    padded) and is None when nothing is padded; kept [total] indexes the padded result; blocks
    [batch, num_blocks]; mask [batch, 1, shared * q, length] additive, with the heads that share a
    key folded into the queries.
    """

    first: int
    total: int
    batch: int
    padded: torch.Tensor | None
    kept: torch.Tensor | None
    blocks: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every token of a step lies.  Shapes: positions and slots [tokens] int64."""

    positions: torch.Tensor
    slots: torch.Tensor
    groups: list[Group]


class KVPool:
    """Keys and values of one model in fixed blocks.  Rollback is not writing: lengths rule."""

    def __init__(self, config: Any, num_blocks: int, block_tokens: int, dtype: torch.dtype) -> None:
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (num_blocks, block_tokens, config.num_key_value_heads, dim)
        self.block_tokens = block_tokens
        self.dtype = dtype
        self.shared = config.num_attention_heads // config.num_key_value_heads
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]

    def scrub(self) -> None:
        """Replace what is not finite, which a broken draft may have left, by zeros."""
        for tensor in (*self.keys, *self.values):
            tensor.nan_to_num_(0.0, 0.0, 0.0)

    @staticmethod
    def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
        """Return what one token costs over all layers."""
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * config.num_key_value_heads * dim * dtype.itemsize)


def build_layout(rows: list[Row], block_tokens: int, dtype: torch.dtype, shared: int) -> Layout:
    """Lay out rows that are ordered short ones first; `shared` heads use one key."""
    positions, slots, groups = [], [], []
    for row in rows:
        index = torch.arange(row.start, row.start + row.length)
        table = torch.tensor(row.block_table)
        positions.append(index)
        slots.append(table[index // block_tokens] * block_tokens + index % block_tokens)
    short = [row for row in rows if row.length <= _SHORT]
    first = 0
    for members in ([short] if short else []) + [[row] for row in rows[len(short) :]]:
        group = _group(members, first, block_tokens, dtype, shared)
        groups.append(group)
        first += group.total
    return Layout(torch.cat(positions), torch.cat(slots), groups)


def _group(rows: list[Row], first: int, block_tokens: int, dtype: torch.dtype, shared: int) -> Group:
    lengths = torch.tensor([row.length for row in rows])
    ends = torch.tensor([row.start + row.length for row in rows])
    starts = ends - lengths
    q_max, total = int(lengths.max()), int(lengths.sum())
    num_blocks = -(-int(ends.max()) // block_tokens)
    blocks = torch.tensor(
        [(row.block_table[:num_blocks] + [0] * num_blocks)[:num_blocks] for row in rows], dtype=torch.long
    )
    query = starts[:, None] + torch.arange(q_max)  # [batch, q] absolute position of each query
    key = torch.arange(num_blocks * block_tokens)
    # A padded query attends to what its row has, so that no row of the softmax is empty.
    visible = key <= query.clamp(max=int(ends.max()))[:, :, None]
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
    mask = mask.repeat(1, shared, 1)[:, None]
    padded = kept = None
    if int(lengths.min()) != q_max:
        inside = torch.arange(q_max) < lengths[:, None]
        offsets = torch.cumsum(lengths, 0) - lengths
        padded = torch.where(inside, offsets[:, None] + torch.arange(q_max), 0) + first
        kept = torch.nonzero(inside.flatten()).squeeze(1)
    return Group(first, total, len(rows), padded, kept, blocks, mask)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    paged: tuple[KVPool, Layout],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write the new keys and values into the pool and attend group by group.

    Shapes: query [1, heads, tokens, dim]; key, value [1, kv_heads, tokens, dim];
    result [1, tokens, heads, dim].
    """
    pool, layout = paged
    keys, values = pool.keys[module.layer_idx], pool.values[module.layer_idx]  # type: ignore[index]
    kv_heads, dim = keys.shape[2], keys.shape[3]
    keys.view(-1, kv_heads, dim)[layout.slots] = key[0].transpose(0, 1)
    values.view(-1, kv_heads, dim)[layout.slots] = value[0].transpose(0, 1)
    flat = query[0].transpose(0, 1)  # [tokens, heads, dim]
    outputs = [_attend(flat, keys, values, group, scaling) for group in layout.groups]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _attend(
    flat: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: Group, scaling: float | None
) -> torch.Tensor:
    heads, dim = flat.shape[1], flat.shape[2]
    kv_heads = keys.shape[2]
    shared = heads // kv_heads
    rows = flat[group.first : group.first + group.total] if group.padded is None else flat[group.padded.flatten()]
    q_len = rows.shape[0] // group.batch
    folded = rows.view(group.batch, q_len, kv_heads, shared, dim).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(group.batch, kv_heads, shared * q_len, dim)
    k = keys[group.blocks].flatten(1, 2).transpose(1, 2)
    v = values[group.blocks].flatten(1, 2).transpose(1, 2)
    out = scaled_dot_product_attention(folded, k, v, attn_mask=group.mask, scale=scaling)
    out = out.view(group.batch, kv_heads, shared, q_len, dim).permute(0, 3, 1, 2, 4).reshape(-1, heads, dim)
    return out if group.kept is None else out[group.kept]


def register() -> None:
    """Make the implementation known to transformers; calling it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)
