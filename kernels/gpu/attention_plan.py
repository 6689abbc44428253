"""How attention over a paged cache is cut into launches and programs, from what the host knows.

Sources: the splits are Flash-Decoding's, arXiv 2311.01282; multiprocessors as an H100 and an H200 have them.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

MAX_SPLITS = 32
_PROGRAMS = 2 * 132  # two for each of an H100's multiprocessors, which are all at work at once
_MOST_PROGRAMS = 2048  # bounds the buffers of the splits where these are for one long request among many short ones
_LONG = 4096  # tokens a split takes when there is no lack of programs
_TILE_N = 64
_TILE_BYTES = 256  # of a key in a tile of that many; longer keys have shorter tiles
LEAST_TILES = tl.constexpr(4)  # of a split; shorter ones cost more to add up than they save
_ONE_TILE = 128  # rows up to which all queries of a request share a tile
_SMALL_TILE = 64  # rows of the tile for short requests when there are long ones too
_LONG_TILE = 128


@dataclass(frozen=True, slots=True)
class Launch:
    """One of the launches of a call.

    rows: height of the tile; tiles: how many there can be; least: the fewest queries a request has here; tiled:
    whether a request may have several tiles; splits: parts into which a request's cache is cut.
    """

    rows: int
    tiles: int
    least: int
    tiled: bool
    splits: int


def plan(
    tokens: int, requests: int, group: int, kv_heads: int, span: int, max_query: int, splits: int | None = None
) -> list[Launch]:
    """Say which launches a call needs, from what the host knows.

    span: the most tokens a request's table can name.  splits: fixes their number, 1 to MAX_SPLITS.
    """
    if max_query * group <= _ONE_TILE:
        rows = max(16, triton.next_power_of_2(max_query * group))
        return [Launch(rows, requests, 1, False, splits or _splits(requests * kv_heads, span))]
    small, large = (max(rows, triton.next_power_of_2(group)) for rows in (_SMALL_TILE, _LONG_TILE))
    least = small // group + 1 if requests > 1 else 1
    tiles = tokens // (large // group) + requests
    launches = [Launch(large, tiles, least, True, splits or _splits(tiles * kv_heads, span, 0))]
    if requests > 1:
        launches.append(Launch(small, requests, 1, False, splits or _splits(requests * kv_heads, span)))
    return launches


def _splits(programs: int, span: int, most_programs: int = _MOST_PROGRAMS) -> int:
    """Fill the machine; beyond that, keep one long request among short ones from being read by one program alone."""
    wanted = max(_PROGRAMS // programs, min(span // _LONG, most_programs // programs))
    return max(1, min(wanted, span // (_TILE_N * LEAST_TILES.value), MAX_SPLITS))


def sizes_of(
    launch: Launch, group: int, kv_heads: int, dim: int, block_tokens: int, item_bytes: int
) -> dict[str, int]:  # fmt: skip
    """Return the sizes that both kernels of `kernels.gpu.attention` are compiled for."""
    padded = max(16, triton.next_power_of_2(dim))
    tile = min(_TILE_N, max(16, _TILE_N * _TILE_BYTES // (padded * item_bytes)))
    return {
        "KV_HEADS": kv_heads, "GROUP": group, "DIM": dim, "DIM_PADDED": padded, "BLOCK_TOKENS": block_tokens,
        "BLOCK_M": launch.rows, "TILE_N": tile, "LEAST": launch.least, "TILED": launch.tiled,
    }  # fmt: skip


def options_of(rows: int, row_bytes: int) -> dict[str, int]:
    """Choose warps and the depth of the pipeline; half of the depth goes to the block numbers."""
    wide = row_bytes > _TILE_BYTES
    warps = 8 if rows >= (_SMALL_TILE if wide else _LONG_TILE) else 4
    return {"num_warps": warps, "num_stages": 2 if wide else 5 if rows <= 32 else 3}


def combine_options(splits: int, dim: int) -> dict[str, int]:
    """Size and warps of the kernel that adds up splits; dim is the padded one."""
    padded = triton.next_power_of_2(splits)
    return {"SPLITS_PADDED": padded, "num_warps": min(4, max(1, padded * dim // 1024))}


def check_dim(dim: int, item_bytes: int) -> None:
    """Refuse heads whose tiles would not fit into shared memory.

    Raises:
        ValueError: dim is too large.
    """
    if triton.next_power_of_2(dim) * item_bytes > 2 * _TILE_BYTES:
        raise ValueError(
            f"dim is {dim} with {item_bytes} bytes a number; it must be at most {2 * _TILE_BYTES // item_bytes}"
        )
