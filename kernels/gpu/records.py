"""Put the ranges of `kernels.gpu.stream` together: the target's tokens, the accept chain, and the records.

One launch, of which the first programs judge a request each and the others record a row each, all at once:

    a request  merges what its rows' ranges found, 16 rows at a time, and keeps drafted tokens up to the first
               that is not the target's (gumbel, greedy) or for which u q(x) < p(x) does not hold (maximal);
    a row      log Σ exp from its ranges, and of the raw law the k likeliest tokens.  These lie in the k parts of
               128 columns with the largest maxima, so the row is read again there only.  The k-th largest of the
               maxima, and then of those parts, is found by fixing two bits of it at a time; of equal values the
               first come first, everywhere.

Shapes: stats, best, best_at and maxima as in `kernels.gpu.stream`; totals [rows, 2] float64, log Σ exp of the
processed laws of target and draft, NaN where there is none; stops [requests] int32, the row whose token comes
next; again [requests] int32, whether that token is to be drawn from the residual; the rest as in
`kernels.verdicts.Verdicts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.noise import key_of, philox, uniform64
from kernels.gpu.stream import FIELDS, FLOOR, NEVER, NOWHERE, SUB

SPLITS = tl.constexpr(128)  # the most ranges a row has
ROWS = tl.constexpr(16)  # rows of a request that are merged at once


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
    for step in tl.static_range((32 - LOW) // 2):
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
def record_likeliest(row: tl.tensor, maxima: tl.tensor, vocab: tl.tensor, total: tl.tensor, ids: tl.tensor,
                     logprobs: tl.tensor, WIDTH: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr,
                     LOW: tl.constexpr) -> tl.tensor:  # fmt: skip
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


@triton.jit
def log_total(peaks: tl.tensor, masses: tl.tensor, splits: tl.tensor, inverse: tl.tensor) -> tl.tensor:
    """Return log Σ exp of rows, from the largest logits and the masses of their ranges; NaN where there is none.

    Shapes: peaks and masses pointers to the first range, [n, 1] or [1]; inverse one over the temperature, alike;
    result float64, of what the last axis leaves.
    """
    at = tl.arange(0, SPLITS)
    if len(peaks.shape) == 2:
        at = at[None, :]
    peak = tl.load(peaks + at, mask=at < splits, other=FLOOR)
    mass = tl.load(masses + at, mask=at < splits, other=0.0)
    top = tl.max(peak, axis=-1, keep_dims=True)
    parts = mass.to(tl.float64) * tl.exp((peak - top) * inverse).to(tl.float64)
    mass = tl.sum(parts, axis=-1)
    scaled = tl.sum(top.to(tl.float64) * inverse.to(tl.float64), axis=-1)
    return tl.where(mass > 0, scaled + tl.log(tl.where(mass > 0, mass, 1.0)), float("nan"))


@triton.jit
def best_of(best: tl.tensor, best_at: tl.tensor, splits: tl.tensor) -> tl.tensor:
    """Return the column of the best score of rows' ranges, of equal ones the first.

    Shapes: pointers to the first range, [n, 1] or [1]; result int32, of what the last axis leaves.
    """
    at = tl.arange(0, SPLITS)
    if len(best.shape) == 2:
        at = at[None, :]
    score = tl.load(best + at, mask=at < splits, other=NEVER)
    column = tl.load(best_at + at, mask=at < splits, other=NOWHERE)
    return tl.min(tl.where(score == tl.max(score, axis=-1, keep_dims=True), column, NOWHERE), axis=-1)


@triton.jit
def chance(logits: tl.tensor, borders: tl.tensor, rows: tl.tensor, stride: tl.tensor, column: tl.tensor,
           temperature: tl.tensor, total: tl.tensor, real: tl.tensor) -> tl.tensor:  # fmt: skip
    """Return the probability of one column a row under the processed law.  Shapes: all [ROWS]; float64."""
    x = tl.load(logits + rows.to(tl.int64) * stride + column, mask=real, other=NEVER).to(tl.float32)
    if borders is not None:
        x = tl.where(x >= tl.load(borders + rows, mask=real, other=NEVER), x, NEVER)
    return tl.exp(tl.div_rn(x, temperature).to(tl.float64) - total)


@triton.jit
def lucky_rows(logits: tl.tensor, draft: tl.tensor, borders: tl.tensor, draft_borders: tl.tensor, seeds: tl.tensor,
               positions: tl.tensor, stats: tl.tensor, rows: tl.tensor, stride: tl.tensor, draft_stride: tl.tensor,
               column: tl.tensor, temperature: tl.tensor, splits: tl.tensor, real: tl.tensor,
               ACCEPT: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Say of which rows u q(x) < p(x) holds for the drafted token x.  Shapes: all [ROWS]."""
    inverse = (1.0 / temperature)[:, None]
    own = (stats + rows.to(tl.int64) * FIELDS * splits)[:, None]
    target = log_total(own, own + 2 * splits, splits, inverse)
    ours = log_total(own + 3 * splits, own + 4 * splits, splits, inverse)
    p = chance(logits, borders, rows, stride, column, temperature, target, real)
    q = chance(draft, draft_borders, rows, draft_stride, column, temperature, ours, real)
    k0, k1 = key_of(tl.load(seeds + rows, mask=real, other=0))
    position = (tl.load(positions + rows, mask=real, other=0) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = philox(tl.zeros_like(position), position, k0, k1, ACCEPT)
    return uniform64(word) * q < p
