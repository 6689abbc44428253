"""The three passes of `kernels.gpu.cuts` over a row, each split over several programs.

What they leave behind: the largest of every range of a row; how many tokens, and what mass, lie above six pivots in
every range; and a row's tokens above the lowest border that these allow, in any order.

Shapes: logits [rows, vocab]; peaks [rows, splits] float32; counts and masses [rows, splits, 8] int64; found [rows]
int32; room [rows, ROOM] in the dtype of the logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

SCALARS = ["temperature", "top_k", "top_p", "min_p", "borders"]  # read or written one at a time: any alignment
NEVER = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)
ONE = tl.constexpr(float(1 << 40))  # the mass of the likeliest token
PIVOTS = tl.constexpr(6)
FIELDS = tl.constexpr(8)  # six pivots, the whole mass, and one to fill up


@triton.jit
def wanted(row, temperature, top_k, top_p, min_p, VOCAB: tl.constexpr):
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
def tile_of(source, first, size, TILE: tl.constexpr):
    """Return a tile as float32, -inf for NaN and past the end, and which of its columns exist."""
    columns = first + tl.arange(0, TILE)
    real = columns < size
    x = tl.load(source + columns, mask=real, other=NEVER).to(tl.float32)
    return tl.where(x == x, x, NEVER), real


@triton.jit
def mass_of(x, peak, t):
    """Return probabilities relative to the likeliest in units of 2^-40, int64."""
    return (tl.exp2(tl.minimum((x - peak) * (LOG2_E / t), 0.0)) * ONE).to(tl.int64)


@triton.jit
def peak_of(peaks, row, SPLITS: tl.constexpr):
    """Return the largest of a row; where it is not finite the row has no law, and its border is -inf."""
    return tl.max(tl.load(peaks + row * SPLITS + tl.arange(0, SPLITS)), axis=0)


@triton.jit(do_not_specialize_on_alignment=SCALARS)
def find_peaks(logits, temperature, top_k, top_p, min_p, peaks, found, stride, VOCAB: tl.constexpr, RANGE: tl.constexpr,
           SPLITS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Leave the largest of one range of one row, and an empty room."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _t, _k, _p, _least, cut = wanted(row, temperature, top_k, top_p, min_p, VOCAB)
    if cut:
        end = tl.minimum((split + 1) * RANGE, VOCAB)
        top = tl.full([TILE], NEVER, tl.float32)
        for first in range(0, RANGE, TILE):
            x, _ = tile_of(logits + row * stride, split * RANGE + first, end, TILE)
            top = tl.maximum(top, x)
        tl.store(peaks + row * SPLITS + split, tl.max(top, axis=0))
        if split == 0:
            tl.store(found + row, 0)


@triton.jit
def _pivot(peak, t, k, J: tl.constexpr):
    """Return the logit of a pivot: steps are temperatures, but for top-k, which ignores them, at least one logit."""
    unit = tl.where(k > 0, tl.maximum(t, 1.0), t)
    return peak - unit * ((J + 1) * (J + 2) // 2)


@triton.jit(do_not_specialize_on_alignment=SCALARS)
def weigh(logits, temperature, top_k, top_p, min_p, peaks, counts, masses, stride, VOCAB: tl.constexpr,
          RANGE: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Leave count and mass above every pivot in one range of one row."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, k, p, _least, cut = wanted(row, temperature, top_k, top_p, min_p, VOCAB)
    peak = NEVER
    if cut & ((k > 0) | (p < 1)):
        peak = peak_of(peaks, row, SPLITS)
    if tl.abs(peak) < float("inf"):
        end = tl.minimum((split + 1) * RANGE, VOCAB)
        near = tl.zeros([TILE // 8], tl.int64)  # counts of pivots 0 to 2, and below of 3 to 5, 20 bits each
        far = tl.zeros([TILE // 8], tl.int64)
        m0 = tl.zeros([TILE // 8], tl.int64)
        m1, m2, m3, m4, m5, whole = m0, m0, m0, m0, m0, m0
        for first in range(0, RANGE, TILE):
            x, _ = tile_of(logits + row * stride, split * RANGE + first, end, TILE)
            x = tl.reshape(x, [TILE // 8, 8])  # eight neighbours lie in one thread
            p0, p1, p2 = x >= _pivot(peak, t, k, 0), x >= _pivot(peak, t, k, 1), x >= _pivot(peak, t, k, 2)
            p3, p4, p5 = x >= _pivot(peak, t, k, 3), x >= _pivot(peak, t, k, 4), x >= _pivot(peak, t, k, 5)
            low = p0.to(tl.int32) + (p1.to(tl.int32) << 8) + (p2.to(tl.int32) << 16)
            high = p3.to(tl.int32) + (p4.to(tl.int32) << 8) + (p5.to(tl.int32) << 16)
            near += _spread(tl.sum(low, axis=1))
            far += _spread(tl.sum(high, axis=1))
            if p < 1:
                w = mass_of(x, peak, t)
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
def target_of(whole, p):
    """Return the least mass that reaches the share p of the whole; at least one token stays, whatever p is."""
    return tl.maximum(tl.ceil(whole.to(tl.float64) * p.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def lower_bound(row, peak, t, k, p, least, counts, masses, SPLITS: tl.constexpr):
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
                low = tl.where(mass >= target_of(whole, p), _pivot(peak, t, k, j), low)
        else:
            low = peak + t * tl.log(least)
    # What rounding and ties after the division by the temperature may add; below every finite logit it stays finite.
    return low - (tl.abs(low) + tl.abs(peak)) * 2e-6, whole


@triton.jit(do_not_specialize_on_alignment=SCALARS)
def collect(logits, temperature, top_k, top_p, min_p, peaks, counts, masses, found, room, stride, VOCAB: tl.constexpr,
             RANGE: tl.constexpr, SPLITS: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Put the tokens of one range that may matter into the row\'s room, and count them."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, k, p, least, cut = wanted(row, temperature, top_k, top_p, min_p, VOCAB)
    peak = NEVER
    if cut:
        peak = peak_of(peaks, row, SPLITS)
    if tl.abs(peak) < float("inf"):
        low, _ = lower_bound(row, peak, t, k, p, least, counts, masses, SPLITS)
        end = tl.minimum((split + 1) * RANGE, VOCAB)
        for first in range(0, RANGE, TILE):
            x, real = tile_of(logits + row * stride, split * RANGE + first, end, TILE)
            taken = real & (x >= low)
            number = tl.sum(taken.to(tl.int32), axis=0)
            if number > 0:
                start = tl.atomic_add(found + row, number)
                if start + number <= ROOM:
                    place = start + tl.cumsum(taken.to(tl.int32), axis=0) - 1
                    tl.store(room + row * ROOM + place, x.to(room.dtype.element_ty), mask=taken)
