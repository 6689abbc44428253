"""Find where top-k, top-p and min-p cut each row, without sorting it.

    border = the smallest logit that stays: temperature, then top-k, then the nucleus of what is left, then min-p

All three are thresholds on the logit, so a row's cut is one number.  Four launches, of which three read the row:

    peaks    the largest of every range of a row;
    weigh    how many tokens, and what mass, lie within 1, 3, 6, 10, 15 and 21 temperatures of the row's largest;
    collect  the tokens above the lowest border these figures allow go to a small buffer, in any order;
    settle   one program a row narrows the border down among them, four ways a step, on integers that are in the
             order of the logits.  Where more than `ROOM` tokens were collected it reads the row itself.

The first three split a row so that few rows fill the GPU.  Masses are integers, exp((x - largest) / T) in units of
2^-40, so neither the splits nor the order of the buffer changes a border: a row's cut never depends on its
neighbours in the batch.  Ties at a border stay, also those that only the division by the temperature makes.

Shapes: logits [rows, vocab] bf16, fp16 or fp32, rows contiguous, -inf where forbidden, NaN counts as -inf; parameters
[rows]; result [rows] float32, -inf where nothing is cut.  Source: `kernels.sampling.shape_logits` is the law.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.gpu.aot import Case
from kernels.gpu.cut_survey import (
    FIELDS,
    NEVER,
    SCALARS,
    collect,
    find_peaks,
    lower_bound,
    mass_of,
    peak_of,
    target_of,
    tile_of,
    wanted,
    weigh,
)
from kernels.gpu.likeliest import order_of

if TYPE_CHECKING:
    from kernels.sampling import RowParams

_PROGRAMS = 264  # two for each SM of an H100
_MAX_SPLITS = 32
_MAX_VOCAB = 1 << 20  # three counts share a 64-bit number
_LOW = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # low bits of float32 the dtype never sets
_ROOM, _TILE = 8192, 2048
_WARPS = 8


@triton.jit
def _logit_of(key, LOW: tl.constexpr):
    """Return the logit of an integer that `order_of` made."""
    bits = (key << LOW).to(tl.uint32)
    flipped = tl.where((bits >> 31) == 1, bits ^ 0x80000000, bits ^ (0xFFFFFFFF >> LOW << LOW))
    return flipped.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _highest(source, size, low, high, target, peak, t, MASS: tl.constexpr, LOW: tl.constexpr,
             TILE: tl.constexpr):  # fmt: skip
    """Return the largest integer of [low, high) at or above which `target` tokens, or their mass, lie.

    Scalars: low, high int64, as `order_of` makes them; target int64.
    """
    while high - low > 1:
        width = high - low
        c1, c2, c3 = low + (width + 3) // 4, low + (width + 1) // 2, low + (3 * width + 3) // 4
        a1 = tl.zeros([TILE], tl.int64)
        a2, a3 = a1, a1
        first = tl.full((), 0, tl.int32)
        while first < size:
            x, real = tile_of(source, first, size, TILE)
            key = order_of(x, LOW).to(tl.int64)
            w = real.to(tl.int64)
            if MASS:
                w = mass_of(x, peak, t)  # nothing past the end, where x is -inf
            a1 += tl.where(key >= c1, w, 0)
            a2 += tl.where(key >= c2, w, 0)
            a3 += tl.where(key >= c3, w, 0)
            first += TILE
        r1, r2, r3 = tl.sum(a1, axis=0) >= target, tl.sum(a2, axis=0) >= target, tl.sum(a3, axis=0) >= target
        high = tl.where(r3, high, tl.where(r2, c3, tl.where(r1, c2, c1)))
        low = tl.where(r3, c3, tl.where(r2, c2, tl.where(r1, c1, low)))
    return low


@triton.jit
def _with_ties(source, size, border, t, TILE: tl.constexpr):
    """Return the smallest logit that the temperature brings to `border` or above.  Scalar: border, after division."""
    kept = tl.full([TILE], float("inf"), tl.float32)
    first = tl.full((), 0, tl.int32)
    while first < size:
        x, _ = tile_of(source, first, size, TILE)
        kept = tl.minimum(kept, tl.where(tl.div_rn(x, t) >= border, x, float("inf")))
        first += TILE
    return tl.min(kept, axis=0)


@triton.jit(do_not_specialize_on_alignment=SCALARS)
def _settle(logits, temperature, top_k, top_p, min_p, peaks, counts, masses, found, room, borders, stride,
            VOCAB: tl.constexpr, SPLITS: tl.constexpr, ROOM: tl.constexpr, LOW: tl.constexpr,
            TILE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t, k, p, least, cut = wanted(row, temperature, top_k, top_p, min_p, VOCAB)
    border = NEVER
    if cut:
        peak = peak_of(peaks, row, SPLITS)
        if tl.abs(peak) < float("inf"):
            source, size = room + row * ROOM, tl.load(found + row)
            if size > ROOM:
                source, size = logits + row * stride, VOCAB
            low, whole = lower_bound(row, peak, t, k, p, least, counts, masses, SPLITS)
            bottom, top = order_of(low, LOW).to(tl.int64), order_of(peak, LOW).to(tl.int64) + 1
            scaled = NEVER
            if k > 0:
                key = _highest(source, size, bottom, top, k.to(tl.int64), peak, t, False, LOW, TILE)
                scaled = tl.div_rn(_logit_of(key, LOW), t)
                border = _with_ties(source, size, scaled, t, TILE)
            if p < 1:
                if k > 0:
                    sums = tl.zeros([TILE], tl.int64)
                    first = tl.full((), 0, tl.int32)
                    while first < size:
                        x, real = tile_of(source, first, size, TILE)
                        sums += tl.where(real & (x >= border), mass_of(x, peak, t), 0)
                        first += TILE
                    whole = tl.sum(sums, axis=0)
                    bottom = order_of(border, LOW).to(tl.int64)
                key = _highest(source, size, bottom, top, target_of(whole, p), peak, t, True, LOW, TILE)
                scaled = tl.maximum(scaled, tl.div_rn(_logit_of(key, LOW), t))
            if least > 0:
                scaled = tl.maximum(scaled, tl.minimum(tl.div_rn(peak, t) + tl.log(least), tl.div_rn(peak, t)))
            border = _with_ties(source, size, scaled, t, TILE)
    tl.store(borders + row, border)


def cut_borders(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Return the smallest raw logit that stays in each row; -inf where nothing is cut or the row is greedy.

    Shapes: logits [rows, vocab] bf16, fp16 or fp32, rows contiguous; result [rows] float32.

    Raises:
        ValueError: shapes or dtypes that do not fit, or rows of logits that are not contiguous.
    """
    _check(logits, params)
    rows, vocab = logits.shape
    borders = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if not rows:
        return borders
    splits = _splits(rows, vocab)
    reach = triton.cdiv(triton.cdiv(vocab, splits), _TILE) * _TILE
    peaks = torch.empty(rows, splits, dtype=torch.float32, device=logits.device)
    figures = torch.empty(2, rows, splits, FIELDS.value, dtype=torch.int64, device=logits.device)
    found = torch.empty(rows, dtype=torch.int32, device=logits.device)
    room = torch.empty(rows, _ROOM, dtype=logits.dtype, device=logits.device)
    given = (logits, params.temperature, params.top_k, params.top_p, params.min_p)
    sizes = {"stride": logits.stride(0), "VOCAB": vocab, "SPLITS": splits, "TILE": _TILE}
    grid = (rows, splits)
    find_peaks[grid](*given, peaks, found, RANGE=reach, num_warps=_WARPS, **sizes)
    weigh[grid](*given, peaks, *figures, RANGE=reach, num_warps=_WARPS, **sizes)
    collect[grid](*given, peaks, *figures, found, room, RANGE=reach, ROOM=_ROOM, num_warps=_WARPS, **sizes)
    _settle[(rows,)](
        *given, peaks, *figures, found, room, borders, ROOM=_ROOM, LOW=_LOW[logits.dtype], num_warps=_WARPS,
        **sizes,
    )  # fmt: skip
    return borders


def _splits(rows: int, vocab: int) -> int:
    """Enough programs to fill the GPU; a power of two, and no split without a tile unless the last."""
    most = min(_MAX_SPLITS, triton.next_power_of_2(max(1, vocab // (2 * _TILE))))
    return max(1, min(most, triton.next_power_of_2(triton.cdiv(_PROGRAMS, rows))))


def _check(logits: torch.Tensor, params: RowParams) -> None:
    if logits.dim() != 2 or not 0 < logits.shape[1] < _MAX_VOCAB:
        raise ValueError(
            f"logits has the shape {list(logits.shape)}; it must be [rows, vocab], vocab 1 to {_MAX_VOCAB}"
        )
    if logits.dtype not in _LOW or logits.stride(1) != 1:
        raise ValueError(
            f"logits is {logits.dtype} with the strides {list(logits.stride())}; it must be bf16, fp16 or fp32, rows "
            "contiguous"
        )
    for name, dtype in (
        ("temperature", torch.float32), ("top_p", torch.float32), ("top_k", torch.int64), ("min_p", torch.float32)
    ):  # fmt: skip
        given = getattr(params, name)
        if given is None and name == "min_p":
            continue
        if given.shape != logits.shape[:1] or given.dtype != dtype or not given.is_contiguous():
            raise ValueError(f"{name} is {given.dtype} {list(given.shape)}; it must be {dtype} [{len(logits)}]")


def cases() -> list[Case]:
    """Name the specialisations that real models use."""
    pointers = {
        "logits": "*bf16", "temperature": "*fp32", "top_k": "*i64", "top_p": "*fp32", "min_p": "*fp32",
        "peaks": "*fp32", "counts": "*i64", "masses": "*i64", "found": "*i32", "room": "*bf16", "borders": "*fp32",
        "stride": "i64",
    }  # fmt: skip
    found = []
    for vocab in (49152, 151936):
        for rows, dtype in ((1, "bf16"), (64, "bf16"), (512, "bf16"), (64, "fp32")):
            splits = _splits(rows, vocab)
            sizes = {
                "VOCAB": vocab, "SPLITS": splits, "TILE": _TILE, "ROOM": _ROOM, "LOW": 16 if dtype == "bf16" else 0,
                "RANGE": triton.cdiv(triton.cdiv(vocab, splits), _TILE) * _TILE,
            }  # fmt: skip
            for kernel in (find_peaks, weigh, collect, _settle):
                types = {k: v for k, v in pointers.items() if k in kernel.arg_names}
                types |= {k: f"*{dtype}" for k in ("logits", "room") if k in types}
                constants = {k: v for k, v in sizes.items() if k in kernel.arg_names}
                aligned = tuple(k for k in types if k not in SCALARS)
                name = f"cuts {kernel.fn.__name__.strip('_')} vocab={vocab} rows={rows} {dtype}"
                found.append(Case(name, kernel, types, constants, warps=_WARPS, aligned=aligned))
    return found
