"""Norm and rotate queries and keys, write keys and values into the paged cache: one launch a layer.

    rotate(h) = h * cos + swap(h) * sin      swap exchanges the halves of h; sin carries the sign

Shapes: qkv [tokens, (heads + 2 * kv_heads) * dim] in float32, float16 or bfloat16; cos and sin [positions, dim], the
first half of sin negated; positions [tokens]; slots [tokens], block * block_tokens + offset, -1 writes nothing;
keys and values [blocks, block_tokens, kv_heads, dim].  A program takes one token and a few heads, whatever they are.
Everything is computed in float32 and rounded once, and once more after the head norm of Qwen3.
Source: Su et al., arXiv 2104.09864, in the half-split form of the Llama architecture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.aot import Case

Norms = tuple[torch.Tensor, torch.Tensor, float]

_ELEMENTS = 512  # of each half a program: 16 bytes a thread at two warps in a 16-bit dtype
_WARPS = 2


@triton.jit
def _load_halves(
    rows: tl.tensor, column: tl.tensor, inside: tl.tensor, HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    first = tl.load(rows + column, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(rows + HALF + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(
    rows: tl.tensor, column: tl.tensor, inside: tl.tensor, first: tl.tensor, second: tl.tensor, HALF: tl.constexpr,
) -> None:  # fmt: skip
    tl.store(rows + column, first.to(rows.dtype.element_ty), mask=inside)
    tl.store(rows + HALF + column, second.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def _norm_halves(
    first: tl.tensor, second: tl.tensor, is_query: tl.tensor, query_norm: tl.tensor, key_norm: tl.tensor,
    epsilon: tl.tensor, column: tl.tensor, real: tl.tensor, DTYPE: tl.constexpr, HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Norm each head; rounded to DTYPE before and after the product with its weight."""
    query_first, query_second = _load_halves(query_norm, column, real, HALF)
    key_first, key_second = _load_halves(key_norm, column, real, HALF)
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    factor = tl.rsqrt(squares / (2 * HALF) + epsilon)[:, None]
    first = (first * factor).to(DTYPE).to(tl.float32) * tl.where(is_query, query_first, key_first)
    second = (second * factor).to(DTYPE).to(tl.float32) * tl.where(is_query, query_second, key_second)
    return first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["table_rows"])
def _rope_and_write(
    qkv: tl.tensor, cos: tl.tensor, sin: tl.tensor, positions: tl.tensor, slots: tl.tensor, keys: tl.tensor,
    values: tl.tensor, query_norm: tl.tensor, key_norm: tl.tensor, out: tl.tensor, table_rows: tl.tensor,
    epsilon: tl.tensor, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF_PADDED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, HAS_NORMS: tl.constexpr,
) -> None:  # fmt: skip
    half: tl.constexpr = DIM // 2
    every: tl.constexpr = HEADS + 2 * KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, HALF_PADDED)[None, :]
    real = column < half
    position = tl.load(positions + token).to(tl.int64)
    position = tl.minimum(tl.maximum(position, 0), table_rows - 1)
    slot = tl.load(slots + token).to(tl.int64)
    first, second = _load_halves(qkv + (token * every + head) * DIM, column, real & (head < every), half)
    cos_first, cos_second = _load_halves(cos + position * DIM, column, real, half)
    sin_first, sin_second = _load_halves(sin + position * DIM, column, real, half)
    is_query = head < HEADS
    is_value = (head >= HEADS + KV_HEADS) & (head < every)
    turned_first, turned_second = first, second
    if HAS_NORMS:
        turned_first, turned_second = _norm_halves(
            first, second, is_query, query_norm, key_norm, epsilon, column, real, qkv.dtype.element_ty, half
        )
    rotated_first = turned_first * cos_first + turned_second * sin_first
    rotated_second = turned_second * cos_second + turned_first * sin_second
    _store_halves(
        out + (token * HEADS + head) * DIM, column, real & is_query, rotated_first, rotated_second, half
    )  # fmt: skip
    # A negative slot is masked here, and so never used as an address.
    key_head, value_head = head - HEADS, head - HEADS - KV_HEADS
    is_key = (key_head >= 0) & (key_head < KV_HEADS)
    kept = real & (slot >= 0)
    _store_halves(
        keys + (slot * KV_HEADS + key_head) * DIM, column, kept & is_key, rotated_first, rotated_second, half
    )  # fmt: skip
    _store_halves(values + (slot * KV_HEADS + value_head) * DIM, column, kept & is_value, first, second, half)


def rope_and_write(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor,
    keys: torch.Tensor, values: torch.Tensor, *, heads: int, norms: Norms | None = None,
) -> torch.Tensor:  # fmt: skip
    """Rotate queries and keys by their positions, write keys and values into the cache and return the queries.

    Shapes: as on top; positions and slots int32 or int64, a position beyond the tables takes the nearest row, no
    slot may occur twice; result [tokens, heads, dim].
    norms: weights [dim] of queries and of keys and the epsilon of a norm of each head before it is rotated.

    Raises:
        ValueError: shapes that do not fit, or a tensor that is not contiguous.
    """
    _check(qkv, cos, sin, positions, slots, keys, values, heads, norms)
    tokens, (kv_heads, dim) = len(qkv), keys.shape[2:]
    out = torch.empty(tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)
    if not tokens:
        return out
    query_norm, key_norm, epsilon = norms or (qkv, qkv, 0.0)
    sizes = _sizes(heads, kv_heads, dim)
    _rope_and_write[(tokens, triton.cdiv(heads + 2 * kv_heads, sizes["BLOCK_HEADS"]))](
        qkv, cos, sin, positions, slots, keys, values, query_norm, key_norm, out, len(cos), epsilon,
        **sizes, HAS_NORMS=norms is not None, num_warps=_WARPS,
    )  # fmt: skip
    return out


def _sizes(heads: int, kv_heads: int, dim: int) -> dict[str, int]:
    padded = triton.next_power_of_2(dim // 2)
    block_heads = min(max(1, _ELEMENTS // padded), triton.next_power_of_2(heads + 2 * kv_heads))
    return {"HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "HALF_PADDED": padded, "BLOCK_HEADS": block_heads}


def _check(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor,
    keys: torch.Tensor, values: torch.Tensor, heads: int, norms: Norms | None,
) -> None:  # fmt: skip
    if keys.dim() != 4 or keys.shape != values.shape or keys.shape[3] % 2:
        raise ValueError(
            f"keys and values have the shapes {list(keys.shape)} and {list(values.shape)}; both must be "
            "[blocks, block_tokens, kv_heads, dim], dim even"
        )
    tokens, (kv_heads, dim) = len(qkv), keys.shape[2:]
    shapes = [
        ("qkv", qkv, [tokens, (heads + 2 * kv_heads) * dim]), ("cos", cos, [len(cos), dim]),
        ("sin", sin, [len(cos), dim]), ("positions", positions, [tokens]), ("slots", slots, [tokens]),
        ("keys", keys, list(keys.shape)), ("values", values, list(keys.shape)),
    ]  # fmt: skip
    if norms is not None:
        shapes += [("the norm of queries", norms[0], [dim]), ("the norm of keys", norms[1], [dim])]
    for name, tensor, shape in shapes:
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}; it must be {shape}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has the strides {list(tensor.stride())}; it must be contiguous")
    if not len(cos):
        raise ValueError("cos and sin have no rows; they must cover every position")


def cases() -> list[Case]:
    """Name the specialisations that real models use."""
    pointers = ("qkv", "cos", "sin", "keys", "values", "query_norm", "key_norm", "out")
    types = dict.fromkeys(pointers, "*bf16") | {"positions": "*i64", "slots": "*i64", "table_rows": "i32"}
    return [
        Case(
            f"rope_and_write heads={heads}/{kv_heads} dim={dim} norms={norms}", _rope_and_write,
            types | {"epsilon": "fp32"}, {**_sizes(heads, kv_heads, dim), "HAS_NORMS": norms},
            warps=_WARPS, aligned=(*pointers, "positions", "slots"),
        )
        for heads, kv_heads, dim in ((9, 3, 64), (14, 2, 64), (16, 8, 128), (32, 8, 128))
        for norms in (False, True)
    ]  # fmt: skip
