"""Attention over a paged cache for a ragged batch: decoding, verifying drafts and prefill chunks together.

    result = softmax(scaling * q kᵀ, masked to what a query may see) v

Shapes: query [tokens, heads, dim]; keys and values [blocks, block_tokens, kv_heads, dim], all float32, float16 or
bfloat16; tables [requests, width]; starts [requests + 1]; lengths [requests].  Lengths are read on the device; grids
and buffers depend on shapes and `max_query` alone, so a launch can be captured in a CUDA graph.

A program takes one key head of one request and packs all its query tokens times the heads that share that key into
one tile, so short requests read their cache once.  Where there are few programs, each request's cache is cut into
splits of equal length, and a second kernel adds them up.  Where `max_query` needs more than one tile, requests that
fit into a small one are one launch, and the others, cut into tiles of queries, are another.

Slots beyond a request's length are never read.  The bits of a request's result depend on its own queries and cache,
the number of splits and the size of the tile, and on nothing else; the number of splits follows from the number of
requests or tokens, `kv_heads` and the width of the tables, the size of the tile from `max_query`.
Sources: Milakov and Gimelshein, arXiv 1805.02867 (online softmax); Dao, arXiv 2307.08691; the pages, arXiv 2309.06180.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.gpu import attention_plan as plans
from kernels.gpu.aot import Case
from kernels.gpu.attention_plan import LEAST_TILES, MAX_SPLITS, Launch

_INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def _locate(
    tile: tl.tensor, starts: tl.tensor, requests: tl.tensor, Q_TILE: tl.constexpr, TILED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Return a tile's request and its first query there.  Request i has the tiles from starts[i] // Q_TILE + i on."""
    request, offset = tile, 0
    if TILED:
        low, high = tile * 0, requests
        while high - low > 1:
            middle = (low + high) // 2
            if tl.load(starts + middle) // Q_TILE + middle <= tile:
                low = middle
            else:
                high = middle
        request, offset = low, (tile - tl.load(starts + low) // Q_TILE - low) * Q_TILE
    return request, offset


@triton.jit
def _share(length: tl.tensor, splits: tl.tensor, TILE_N: tl.constexpr) -> tl.tensor:
    """Return how many tokens each split of a request takes: whole tiles, and not too few of them."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, TILE_N), splits), LEAST_TILES) * TILE_N


@triton.jit
def _attend_tile(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, table: tl.tensor, at: tl.tensor, high: tl.tensor,
    sees: tl.tensor, best: tl.tensor, total: tl.tensor, acc: tl.tensor, scaling: tl.tensor, kv_head: tl.tensor,
    column: tl.tensor, inside: tl.tensor, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    TILE_N: tl.constexpr, INTERPRETED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Add one tile of keys and values to the running maximum, sum of weights and weighted sum of each row."""
    position = at + tl.arange(0, TILE_N)
    cached = position < high
    block = tl.load(table + position // BLOCK_TOKENS, mask=cached, other=0).to(tl.int64)
    place = ((block * BLOCK_TOKENS + position % BLOCK_TOKENS) * KV_HEADS + kv_head) * DIM
    there = cached[:, None] & inside[None, :]
    k = tl.load(keys + place[:, None] + column[None, :], mask=there, other=0.0)
    v = tl.load(values + place[:, None] + column[None, :], mask=there, other=0.0)
    if INTERPRETED:
        k, v = k.to(tl.float32), v.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scaling
    scores = tl.where((position[None, :] <= sees[:, None]) & cached[None, :], scores, float("-inf"))
    top = tl.maximum(best, tl.max(scores, axis=1))
    shift = tl.where(top == float("-inf"), 0.0, top)  # a row that has seen nothing yet
    p = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(best - shift)
    total = total * fade + tl.sum(p, axis=1)
    acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="tf32x3")
    return top, total, acc


@triton.jit(do_not_specialize=["requests", "width", "splits"])
def _attend(
    query: tl.tensor, keys: tl.tensor, values: tl.tensor, tables: tl.tensor, starts: tl.tensor, lengths: tl.tensor,
    out: tl.tensor, sums: tl.tensor, weights: tl.tensor, scaling: tl.tensor, requests: tl.tensor, width: tl.tensor,
    splits: tl.tensor, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, TILE_N: tl.constexpr, LEAST: tl.constexpr, TILED: tl.constexpr,
    SPLIT: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    q_tile: tl.constexpr = BLOCK_M // GROUP
    tile, kv_head, split = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    request, offset = _locate(tile, starts, requests, q_tile, TILED)
    begin = tl.load(starts + request)
    count = tl.load(starts + request + 1) - begin
    mine = (count >= LEAST) & (offset < count)
    if not TILED:
        mine = mine & (count <= q_tile)
    if mine:
        length = tl.minimum(tl.load(lengths + request), width * BLOCK_TOKENS)
        share = _share(length, splits, TILE_N)
        last = tl.minimum(length, length - count + offset + q_tile)  # past what the tile's last query sees
        low, high = split * share, tl.minimum(split * share + share, last)
        row = tl.arange(0, BLOCK_M)
        number = offset + row // GROUP
        real = (row < q_tile * GROUP) & (number < count)
        column = tl.arange(0, DIM_PADDED)
        inside = column < DIM
        flat = (begin + number).to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP
        q = tl.load(query + flat[:, None] * DIM + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        if INTERPRETED:
            q = q.to(tl.float32)
        sees = length - count + number  # the last position each row may look at
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)
        table = tables + request.to(tl.int64) * width
        if INTERPRETED:  # the interpreter has no range over what a kernel computed; a GPU pipelines nothing else
            at = low
            while at < high:
                best, total, acc = _attend_tile(
                    q, keys, values, table, at, high, sees, best, total, acc, scaling, kv_head, column, inside,
                    KV_HEADS, DIM, BLOCK_TOKENS, TILE_N, INTERPRETED,
                )  # fmt: skip
                at += TILE_N
        else:
            for at in tl.range(low, high, TILE_N):
                best, total, acc = _attend_tile(
                    q, keys, values, table, at, high, sees, best, total, acc, scaling, kv_head, column, inside,
                    KV_HEADS, DIM, BLOCK_TOKENS, TILE_N, INTERPRETED,
                )  # fmt: skip
        if SPLIT:
            if low < length:
                entry = ((tile.to(tl.int64) * BLOCK_M + row) * KV_HEADS + kv_head) * splits + split
                tl.store(sums + entry[:, None] * DIM + column[None, :], acc, mask=real[:, None] & inside[None, :])
                tl.store(weights + entry * 2, best, mask=real)
                tl.store(weights + entry * 2 + 1, total, mask=real)
        else:
            result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            goal = out + flat[:, None] * DIM + column[None, :]
            tl.store(goal, result.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["requests", "width", "splits"])
def _combine(
    sums: tl.tensor, weights: tl.tensor, starts: tl.tensor, lengths: tl.tensor, out: tl.tensor, requests: tl.tensor,
    width: tl.tensor, splits: tl.tensor, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, TILE_N: tl.constexpr,
    LEAST: tl.constexpr, TILED: tl.constexpr, SPLITS_PADDED: tl.constexpr,
) -> None:  # fmt: skip
    q_tile: tl.constexpr = BLOCK_M // GROUP
    tile, kv_head, row = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    request, offset = _locate(tile, starts, requests, q_tile, TILED)
    begin = tl.load(starts + request)
    count = tl.load(starts + request + 1) - begin
    number = offset + row // GROUP
    mine = (count >= LEAST) & (number < count)
    if not TILED:
        mine = mine & (count <= q_tile)
    if mine:
        length = tl.minimum(tl.load(lengths + request), width * BLOCK_TOKENS)
        split = tl.arange(0, SPLITS_PADDED)
        written = (split < splits) & (split * _share(length, splits, TILE_N) < length)
        column = tl.arange(0, DIM_PADDED)
        inside = column < DIM
        entry = ((tile.to(tl.int64) * BLOCK_M + row) * KV_HEADS + kv_head) * splits + split
        best = tl.load(weights + entry * 2, mask=written, other=float("-inf"))
        total = tl.load(weights + entry * 2 + 1, mask=written, other=0.0)
        part = tl.load(
            sums + entry[:, None] * DIM + column[None, :], mask=written[:, None] & inside[None, :], other=0.0
        )  # fmt: skip
        top = tl.max(best, axis=0)
        factor = tl.exp2(best - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(total * factor, axis=0)
        result = tl.sum(part * factor[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
        flat = (begin + number).to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP
        tl.store(out + flat * DIM + column, result.to(out.dtype.element_ty), mask=inside)


def paged_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, starts: torch.Tensor,
    lengths: torch.Tensor, scaling: float, *, max_query: int, splits: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Let every query attend to its request's cached tokens up to its own position.

    Shapes: query [tokens, heads, dim]; keys and values [blocks, block_tokens, kv_heads, dim]; tables [requests,
    width] int32, block numbers of which those beyond a request's length are never followed; starts [requests + 1]
    int32: rows starts[i] to starts[i + 1] are request i's last positions; lengths [requests] int32, cached tokens
    with the new ones; result [tokens, heads, dim] in query's dtype; rows of no request are not written.
    max_query: no request has more queries; those of one that has are not written either.
    splits: fixes their number, 1 to MAX_SPLITS, for results that do not depend on the size of the batch.

    Raises:
        ValueError: shapes or dtypes that do not fit, a tensor that is not contiguous, or a bad number of splits.
    """
    _check(query, keys, values, tables, starts, lengths, max_query, splits)
    (tokens, heads, dim), (requests, width), (_, block_tokens, kv_heads, _) = query.shape, tables.shape, keys.shape
    if not tokens or not requests or not width:
        return torch.zeros_like(query)
    out = torch.empty_like(query)
    group, span = heads // kv_heads, width * block_tokens
    for launch in plans.plan(tokens, requests, group, kv_heads, span, max_query, splits):
        sizes = plans.sizes_of(launch, group, kv_heads, dim, block_tokens, query.element_size())
        options = plans.options_of(launch.rows, sizes["DIM_PADDED"] * query.element_size())
        sums = weights = out
        split = launch.splits > 1
        if split:
            entries = launch.tiles * launch.rows * kv_heads * launch.splits
            sums = torch.empty(entries, dim, dtype=torch.float32, device=query.device)
            weights = torch.empty(entries, 2, dtype=torch.float32, device=query.device)
        _attend[(launch.tiles * kv_heads, launch.splits)](
            query, keys, values, tables, starts, lengths, out, sums, weights, scaling * math.log2(math.e), requests,
            width, launch.splits, **sizes, SPLIT=split, INTERPRETED=_INTERPRETED, **options,
        )  # fmt: skip
        if split:
            _combine[(launch.tiles * kv_heads, launch.rows // group * group)](
                sums, weights, starts, lengths, out, requests, width, launch.splits, **sizes,
                **plans.combine_options(launch.splits, sizes["DIM_PADDED"]),
            )  # fmt: skip
    return out


def _check(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, starts: torch.Tensor,
    lengths: torch.Tensor, max_query: int, splits: int | None,
) -> None:  # fmt: skip
    if keys.dim() != 4 or keys.shape != values.shape:
        raise ValueError(
            f"keys and values have the shapes {list(keys.shape)} and {list(values.shape)}; both must be "
            "[blocks, block_tokens, kv_heads, dim]"
        )
    if query.dim() != 3 or query.shape[2] != keys.shape[3] or query.shape[1] % keys.shape[2]:
        raise ValueError(
            f"query has the shape {list(query.shape)}; with keys {list(keys.shape)} it must be "
            f"[tokens, a multiple of {keys.shape[2]}, {keys.shape[3]}]"
        )
    if not query.dtype == keys.dtype == values.dtype or query.dtype == torch.float64:
        raise ValueError(
            f"query, keys and values are {query.dtype}, {keys.dtype} and {values.dtype}; they must be the same of "
            "float32, float16 and bfloat16"
        )
    plans.check_dim(query.shape[2], query.element_size())
    requests = len(tables)
    if tables.dim() != 2 or list(starts.shape) != [requests + 1] or list(lengths.shape) != [requests]:
        raise ValueError(
            f"tables, starts and lengths have the shapes {list(tables.shape)}, {list(starts.shape)} and "
            f"{list(lengths.shape)}; they must be [requests, width], [requests + 1] and [requests]"
        )
    named = zip(
        ("query", "keys", "values", "tables", "starts", "lengths"),
        (query, keys, values, tables, starts, lengths), strict=True,
    )  # fmt: skip
    for name, tensor in named:
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has the strides {list(tensor.stride())}; it must be contiguous")
    if max_query < 1:
        raise ValueError(f"max_query is {max_query}; it must be 1 or more")
    if splits is not None and not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits is {splits}; it must be 1 to {MAX_SPLITS}")


def cases() -> list[Case]:
    """Name the specialisations that real models use: decoding, verifying four drafts, and prefill."""
    found: dict[str, Case] = {}
    for heads, kv_heads, dim in ((9, 3, 64), (14, 2, 64), (16, 8, 128), (32, 8, 128), (64, 8, 128)):
        group = heads // kv_heads
        for max_query in (1, 5, 512):
            for launch in plans.plan(1024, 16, group, kv_heads, 8192, max_query):
                sizes = plans.sizes_of(launch, group, kv_heads, dim, block_tokens=16, item_bytes=2)
                name = f"heads={heads}/{kv_heads} dim={dim} rows={launch.rows} tiled={launch.tiled}"
                found |= {case.name: case for case in _cases_of(launch, name, sizes)}
    return list(found.values())


def _cases_of(launch: Launch, name: str, sizes: dict[str, int]) -> list[Case]:
    types = dict.fromkeys(("query", "keys", "values", "out"), "*bf16") | {"sums": "*fp32", "weights": "*fp32"}
    types |= dict.fromkeys(("tables", "starts", "lengths"), "*i32")
    aligned = tuple(types)
    types |= dict.fromkeys(("requests", "width", "splits"), "i32") | {"scaling": "fp32"}
    options = plans.options_of(launch.rows, 2 * sizes["DIM_PADDED"])
    found = [
        Case(
            f"attend {name} split={split}", _attend, types, {**sizes, "SPLIT": split, "INTERPRETED": False},
            warps=options["num_warps"], stages=options["num_stages"], aligned=aligned,
        )
        for split in (False, True)
    ]  # fmt: skip
    used = {name: kind for name, kind in types.items() if name in _combine.arg_names}
    for splits in (2, MAX_SPLITS):
        constants = {**sizes, **plans.combine_options(splits, sizes["DIM_PADDED"])}
        warps = constants.pop("num_warps")
        pointers = tuple(name for name in aligned if name in used)
        found.append(
            Case(f"combine {name} splits={splits}", _combine, used, constants, warps=warps, aligned=pointers)
        )  # fmt: skip
    return found
