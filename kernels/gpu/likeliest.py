"""Find the k largest of a row without reading it again, or nearly so.

They lie in the k parts of 128 columns with the largest maxima, which `kernels.gpu.stream` left behind; so of the
row only those parts are read.  The k-th largest of the maxima, and then of the parts' columns, is found by fixing
two bits of it at a time: three counts for each pair of bits, summed as one 64-bit number.  Of equal values the
first come first, everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.stream import NEVER, SUB


@triton.jit
def order_of(x: tl.tensor, LOW: tl.constexpr) -> tl.tensor:
    """Map float32 to integers of the same order, without the `LOW` bits that are alike in all; NaN counts as -inf."""
    x = tl.where(x == x, tl.where(x == 0.0, 0.0, x), NEVER)
    bits = x.to(tl.uint32, bitcast=True)
    return (bits ^ tl.where((bits >> 31) == 1, 0xFFFFFFFF, 0x80000000).to(tl.uint32)) >> LOW


@triton.jit
def pick_largest(keys: tl.tensor, k: tl.tensor, LOW: tl.constexpr) -> tl.tensor:
    """Return which are the k largest, of equal ones the first, and how many of them come before each.

    Shapes: keys [n] uint32 below 2^(32 - LOW), n < 2^20; results [n] int1 and int32.
    """
    least = tl.full((), 0, tl.uint32)
    for step in range((32 - LOW) // 2):
        unit = tl.full((), 1, tl.uint32) << (30 - LOW - 2 * step)
        reached = (keys >= least + unit).to(tl.int64)
        reached += (keys >= least + unit * 2).to(tl.int64) << 20
        reached += (keys >= least + unit * 3).to(tl.int64) << 40
        counts = tl.sum(reached, axis=0)
        least += unit * (
            (((counts >> 40) & 0xFFFFF) >= k).to(tl.uint32) + (((counts >> 20) & 0xFFFFF) >= k).to(tl.uint32)
            + ((counts & 0xFFFFF) >= k).to(tl.uint32)
        )  # fmt: skip
    more, same = keys > least, (keys == least).to(tl.int32)
    left = k - tl.sum(more.to(tl.int32), axis=0)
    taken = more | ((same > 0) & (tl.cumsum(same, axis=0) <= left))
    return taken, tl.cumsum(taken.to(tl.int32), axis=0) - 1


@triton.jit
def record_likeliest(
    row: tl.tensor, maxima: tl.tensor, vocab: tl.tensor, total: tl.tensor, ids: tl.tensor, logprobs: tl.tensor,
    WIDTH: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, LOW: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Write one row's likeliest tokens and their log-probs; return what they leave over.

    `ids` holds in turn the parts, the columns in rising order, and the answer.  Scalars: total float64.
    """
    parts, width = tl.arange(0, WIDTH), tl.cdiv(vocab, SUB)
    highest = tl.load(maxima + parts, mask=parts < width, other=NEVER).to(tl.float32)
    few = tl.minimum(width, K)
    taken, place = pick_largest(tl.where(parts < width, order_of(highest, LOW), 0), few, LOW)
    tl.store(ids + place, parts, mask=taken)
    tl.debug_barrier()
    slots = tl.arange(0, PADDED)
    columns = tl.load(ids + slots, mask=slots < few, other=0)[:, None] * SUB + tl.arange(0, SUB)[None, :]
    real = (slots < few)[:, None] & (columns < vocab)
    keys = order_of(tl.load(row + columns, mask=real, other=NEVER).to(tl.float32), LOW)
    keys = tl.reshape(tl.where(real, keys, 0), [PADDED * SUB])
    taken, place = pick_largest(keys, K, LOW)
    tl.debug_barrier()
    tl.store(ids + place, tl.reshape(columns, [PADDED * SUB]), mask=taken)
    tl.debug_barrier()
    column = tl.load(ids + slots, mask=slots < K, other=0)
    x = tl.load(row + column, mask=slots < K, other=NEVER).to(tl.float32)
    keys = tl.where(slots < K, order_of(x, LOW), 0)
    ahead = keys[None, :] > keys[:, None]
    ahead = ahead | ((keys[None, :] == keys[:, None]) & (slots[None, :] < slots[:, None]))
    rank = tl.sum(ahead.to(tl.int32), axis=1)
    logprob = tl.where(total == total, x.to(tl.float64) - total, NEVER).to(tl.float32)
    tl.debug_barrier()
    tl.store(ids + rank, column, mask=slots < K)
    tl.store(logprobs + rank, logprob.to(tl.float16), mask=slots < K)
    return tl.maximum(1.0 - tl.sum(tl.where(slots < K, tl.exp(logprob), 0.0), axis=0), 0.0)
