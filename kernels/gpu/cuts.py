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

Shapes: logits [rows, vocab] bf16, fp16 or fp32, contiguous, -inf where forbidden, NaN counts as -inf; parameters
[rows]; result [rows] float32, -inf where nothing is cut.  Source: `kernels.sampling.shape_logits` is the law.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.gpu.aot import Case
from kernels.gpu.likeliest import order_of

if TYPE_CHECKING:
    from kernels.sampling import RowParams

_PROGRAMS = 264  # two for each SM of an H100
_MAX_SPLITS = 32
_MAX_VOCAB = 1 << 20  # three counts share a 64-bit number
_LOW = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # low bits of float32 the dtype never sets
_ROOM, _TILE = 8192, 2048
_WARPS = {"peaks": 8, "weigh": 8, "collect": 8, "settle": 8}
NEVER = tl.constexpr(float("-inf"))
PIVOTS = tl.constexpr(6)
FIELDS = tl.constexpr(8)  # six pivots, the whole mass, and one to fill up
LOG2_E = tl.constexpr(1.4426950408889634)
ONE = tl.constexpr(float(1 << 40))  # the mass of the likeliest token


@triton.jit
def _wanted(row, temperature, top_k, top_p, min_p, VOCAB: tl.constexpr):
    """Return a row's temperature, top-k (0 is off), top-p (1 is off), min-p (0 is off) and whether any of them cuts."""
    t = tl.load(temperature + row)
    k = tl.load(top_k + row)
    k = tl.where((k > 0) & (k < VOCAB), k, 0).to(tl.int32)
    p = tl.load(top_p + row)
    least = 0.0
    if min_p is not None:
        least = tl.load(min_p + row)
    return t, k, p, least, (t > 0) & ((k > 0) | (p < 1) | (least > 0))


@triton.jit
def _tile(source, first, size, TILE: tl.constexpr):
    """Return a tile as float32, -inf for NaN and past the end, and which of its columns exist."""
    columns = first + tl.arange(0, TILE)
    real = columns < size
    x = tl.load(source + columns, mask=real, other=NEVER).to(tl.float32)
    return tl.where(x == x, x, NEVER), real


@triton.jit
def _mass(x, peak, t):
    """Return probabilities relative to the likeliest in units of 2^-40, int64."""
    return (tl.exp2(tl.minimum((x - peak) * (LOG2_E / t), 0.0)) * ONE).to(tl.int64)


@triton.jit
def _peak_of(peaks, row, SPLITS: tl.constexpr):
    return tl.max(tl.load(peaks + row * SPLITS + tl.arange(0, SPLITS)), axis=0)


@triton.jit
def _peaks(logits, temperature, top_k, top_p, min_p, peaks, found, VOCAB: tl.constexpr, RANGE: tl.constexpr,
           SPLITS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, k, p, least, cut = _wanted(row, temperature, top_k, top_p, min_p, VOCAB)
    if cut:
        end = tl.minimum((split + 1) * RANGE, VOCAB)
        top = tl.full([TILE], NEVER, tl.float32)
        for first in range(0, RANGE, TILE):
            x, _ = _tile(logits + row * VOCAB, split * RANGE + first, end, TILE)
            top = tl.maximum(top, x)
        tl.store(peaks + row * SPLITS + split, tl.max(top, axis=0))
        if split == 0:
            tl.store(found + row, 0)


@triton.jit
def _pivot(peak, t, k, J: tl.constexpr):
    """Return the logit of a pivot: steps are temperatures, but for top-k, which ignores them, at least one logit."""
    unit = tl.where(k > 0, tl.maximum(t, 1.0), t)
    return peak - unit * ((J + 1) * (J + 2) // 2)


@triton.jit
def _weigh(logits, temperature, top_k, top_p, min_p, peaks, counts, masses, VOCAB: tl.constexpr, RANGE: tl.constexpr,
           SPLITS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, k, p, least, cut = _wanted(row, temperature, top_k, top_p, min_p, VOCAB)
    if cut & ((k > 0) | (p < 1)):
        peak = _peak_of(peaks, row, SPLITS)
        end = tl.minimum((split + 1) * RANGE, VOCAB)
        near = tl.zeros([TILE // 8], tl.int64)  # counts of pivots 0 to 2, and below of 3 to 5, 20 bits each
        far = tl.zeros([TILE // 8], tl.int64)
        m0 = tl.zeros([TILE // 8], tl.int64)
        m1, m2, m3, m4, m5, whole = m0, m0, m0, m0, m0, m0
        for first in range(0, RANGE, TILE):
            x, _ = _tile(logits + row * VOCAB, split * RANGE + first, end, TILE)
            x = tl.reshape(x, [TILE // 8, 8])  # eight neighbours lie in one thread
            p0, p1, p2 = x >= _pivot(peak, t, k, 0), x >= _pivot(peak, t, k, 1), x >= _pivot(peak, t, k, 2)
            p3, p4, p5 = x >= _pivot(peak, t, k, 3), x >= _pivot(peak, t, k, 4), x >= _pivot(peak, t, k, 5)
            low = p0.to(tl.int32) + (p1.to(tl.int32) << 8) + (p2.to(tl.int32) << 16)
            high = p3.to(tl.int32) + (p4.to(tl.int32) << 8) + (p5.to(tl.int32) << 16)
            near += _spread(tl.sum(low, axis=1))
            far += _spread(tl.sum(high, axis=1))
            if p < 1:
                w = _mass(x, peak, t)
                m0 += tl.sum(tl.where(p0, w, 0), axis=1)
                m1 += tl.sum(tl.where(p1, w, 0), axis=1)
                m2 += tl.sum(tl.where(p2, w, 0), axis=1)
                m3 += tl.sum(tl.where(p3, w, 0), axis=1)
                m4 += tl.sum(tl.where(p4, w, 0), axis=1)
                m5 += tl.sum(tl.where(p5, w, 0), axis=1)
                whole += tl.sum(w, axis=1)
        at = (row * SPLITS + split) * FIELDS
        tl.store(counts + at, tl.sum(near, axis=0))
        tl.store(counts + at + 1, tl.sum(far, axis=0))
        tl.store(masses + at, tl.sum(m0, axis=0))
        tl.store(masses + at + 1, tl.sum(m1, axis=0))
        tl.store(masses + at + 2, tl.sum(m2, axis=0))
        tl.store(masses + at + 3, tl.sum(m3, axis=0))
        tl.store(masses + at + 4, tl.sum(m4, axis=0))
        tl.store(masses + at + 5, tl.sum(m5, axis=0))
        tl.store(masses + at + 6, tl.sum(whole, axis=0))


@triton.jit
def _spread(counts):
    """Return three counts of 8 bits each as three of 20 bits, int64."""
    wide = counts.to(tl.int64)
    return (wide & 0xFF) | ((wide & 0xFF00) << 12) | ((wide & 0xFF0000) << 24)


@triton.jit
def _target(whole, p):
    """Return the least mass that reaches the share p of the whole; at least one token stays, whatever p is."""
    return tl.maximum(tl.ceil(whole.to(tl.float64) * p.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _least(row, peak, t, k, p, least, counts, masses, SPLITS: tl.constexpr):
    """Return a logit no border lies below, and the whole mass where top-k is off."""
    splits = (row * SPLITS + tl.arange(0, SPLITS)) * FIELDS
    low, whole = NEVER, tl.full((), 0, tl.int64)
    if k > 0:
        near, far = tl.sum(tl.load(counts + splits), axis=0), tl.sum(tl.load(counts + splits + 1), axis=0)
        for j in tl.static_range(PIVOTS - 1, -1, -1):
            count = (near if j < 3 else far) >> (20 * (j % 3))
            low = tl.where((count & 0xFFFFF) >= k, _pivot(peak, t, k, j), low)
    else:
        if p < 1:
            whole = tl.sum(tl.load(masses + splits + 6), axis=0)
            for j in tl.static_range(PIVOTS - 1, -1, -1):
                mass = tl.sum(tl.load(masses + splits + j), axis=0)
                low = tl.where(mass >= _target(whole, p), _pivot(peak, t, k, j), low)
        else:
            low = peak + t * tl.log(least)
    # What rounding and ties after the division by the temperature may add; below every finite logit it stays finite.
    return low - (tl.abs(low) + tl.abs(peak)) * 2e-6, whole


@triton.jit
def _collect(logits, temperature, top_k, top_p, min_p, peaks, counts, masses, found, room, VOCAB: tl.constexpr,
             RANGE: tl.constexpr, SPLITS: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, k, p, least, cut = _wanted(row, temperature, top_k, top_p, min_p, VOCAB)
    if cut:
        low, _ = _least(row, _peak_of(peaks, row, SPLITS), t, k, p, least, counts, masses, SPLITS)
        end = tl.minimum((split + 1) * RANGE, VOCAB)
        for first in range(0, RANGE, TILE):
            x, real = _tile(logits + row * VOCAB, split * RANGE + first, end, TILE)
            taken = real & (x >= low)
            number = tl.sum(taken.to(tl.int32), axis=0)
            if number > 0:
                start = tl.atomic_add(found + row, number)
                if start + number <= ROOM:
                    place = start + tl.cumsum(taken.to(tl.int32), axis=0) - 1
                    tl.store(room + row * ROOM + place, x.to(room.dtype.element_ty), mask=taken)


@triton.jit
def _logit_of(key, LOW: tl.constexpr):
    """Return the logit of an integer that `order_of` made."""
    bits = (key << LOW).to(tl.uint32)
    flipped = tl.where((bits >> 31) == 1, bits ^ 0x80000000, bits ^ (0xFFFFFFFF >> LOW << LOW))
    return flipped.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _highest(source, size, low, high, target, floor, peak, t, MASS: tl.constexpr, LOW: tl.constexpr,
             TILE: tl.constexpr):  # fmt: skip
    """Return the largest integer of [low, high) at or above which `target` tokens, or their mass, lie.

    Tokens below `floor` count nothing.  Scalars: low, high int64, as `order_of` makes them; target int64.
    """
    while high - low > 1:
        width = high - low
        c1, c2, c3 = low + (width + 3) // 4, low + (width + 1) // 2, low + (3 * width + 3) // 4
        a1 = tl.zeros([TILE], tl.int64)
        a2, a3 = a1, a1
        first = tl.full((), 0, tl.int32)
        while first < size:
            x, real = _tile(source, first, size, TILE)
            key = order_of(x, LOW).to(tl.int64)
            w = (real & (x >= floor)).to(tl.int64)
            if MASS:
                w = tl.where(w > 0, _mass(x, peak, t), 0)
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
        x, _ = _tile(source, first, size, TILE)
        kept = tl.minimum(kept, tl.where(tl.div_rn(x, t) >= border, x, float("inf")))
        first += TILE
    return tl.min(kept, axis=0)


@triton.jit
def _settle(logits, temperature, top_k, top_p, min_p, peaks, counts, masses, found, room, borders, VOCAB: tl.constexpr,
            SPLITS: tl.constexpr, ROOM: tl.constexpr, LOW: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t, k, p, least, cut = _wanted(row, temperature, top_k, top_p, min_p, VOCAB)
    border = NEVER
    if cut:
        peak = _peak_of(peaks, row, SPLITS)
        if tl.abs(peak) < float("inf"):
            source, size = room + row * ROOM, tl.load(found + row)
            if size > ROOM:
                source, size = logits + row * VOCAB, VOCAB
            low, whole = _least(row, peak, t, k, p, least, counts, masses, SPLITS)
            bottom, top = order_of(low, LOW).to(tl.int64), order_of(peak, LOW).to(tl.int64) + 1
            scaled = NEVER
            if k > 0:
                key = _highest(source, size, bottom, top, k.to(tl.int64), NEVER, peak, t, False, LOW, TILE)
                scaled = tl.div_rn(_logit_of(key, LOW), t)
                border = _with_ties(source, size, scaled, t, TILE)
            if p < 1:
                if k > 0:
                    sums = tl.zeros([TILE], tl.int64)
                    first = tl.full((), 0, tl.int32)
                    while first < size:
                        x, real = _tile(source, first, size, TILE)
                        sums += tl.where(real & (x >= border), _mass(x, peak, t), 0)
                        first += TILE
                    whole = tl.sum(sums, axis=0)
                    bottom = order_of(border, LOW).to(tl.int64)
                key = _highest(source, size, bottom, top, _target(whole, p), border, peak, t, True, LOW, TILE)
                scaled = tl.maximum(scaled, tl.div_rn(_logit_of(key, LOW), t))
            if least > 0:
                scaled = tl.maximum(scaled, tl.minimum(tl.div_rn(peak, t) + tl.log(least), tl.div_rn(peak, t)))
            border = _with_ties(source, size, scaled, t, TILE)
    tl.store(borders + row, border)


def cut_borders(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Return the smallest raw logit that stays in each row; -inf where nothing is cut or the row is greedy.

    Shapes: logits [rows, vocab] bf16, fp16 or fp32, contiguous; result [rows] float32.

    Raises:
        ValueError: shapes or dtypes that do not fit, or logits that are not contiguous.
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
    sizes = {"VOCAB": vocab, "SPLITS": splits, "TILE": _TILE}
    grid = (rows, splits)
    _peaks[grid](*given, peaks, found, RANGE=reach, num_warps=_WARPS["peaks"], **sizes)
    _weigh[grid](*given, peaks, *figures, RANGE=reach, num_warps=_WARPS["weigh"], **sizes)
    _collect[grid](*given, peaks, *figures, found, room, RANGE=reach, ROOM=_ROOM, num_warps=_WARPS["collect"], **sizes)
    _settle[(rows,)](
        *given, peaks, *figures, found, room, borders, ROOM=_ROOM, LOW=_LOW[logits.dtype], num_warps=_WARPS["settle"],
        **sizes,
    )  # fmt: skip
    return borders


def _splits(rows: int, vocab: int) -> int:
    """Enough programs to fill the GPU; a power of two, and no split without a tile unless the last."""
    most = min(_MAX_SPLITS, triton.next_power_of_2(max(1, vocab // (2 * _TILE))))
    return max(1, min(most, triton.next_power_of_2(triton.cdiv(_PROGRAMS, rows))))


def _check(logits: torch.Tensor, params: RowParams) -> None:
    if logits.dim() != 2 or not 0 < logits.shape[1] < _MAX_VOCAB:
        raise ValueError(f"logits has the shape {list(logits.shape)}; it must be [rows, vocab], vocab 1 to {_MAX_VOCAB}")
    if logits.dtype not in _LOW or not logits.is_contiguous():
        raise ValueError(
            f"logits is {logits.dtype} with the strides {list(logits.stride())}; it must be contiguous, bf16, fp16 or fp32"
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
    }  # fmt: skip
    found = []
    for vocab in (49152, 151936):
        for rows, dtype in ((1, "bf16"), (64, "bf16"), (512, "bf16"), (64, "fp32")):
            splits = _splits(rows, vocab)
            sizes = {
                "VOCAB": vocab, "SPLITS": splits, "TILE": _TILE, "ROOM": _ROOM, "LOW": 16 if dtype == "bf16" else 0,
                "RANGE": triton.cdiv(triton.cdiv(vocab, splits), _TILE) * _TILE,
            }  # fmt: skip
            for kernel in (_peaks, _weigh, _collect, _settle):
                name = kernel.fn.__name__
                types = {k: v for k, v in pointers.items() if k in kernel.arg_names}
                types |= {k: f"*{dtype}" for k in ("logits", "room") if k in types}
                constants = {k: v for k, v in sizes.items() if k in kernel.arg_names}
                found.append(
                    Case(
                        f"cuts{name} vocab={vocab} rows={rows} {dtype}", kernel, types, constants,
                        warps=_WARPS[name.strip("_")], aligned=tuple(types),
                    )  # fmt: skip
                )
    return found
