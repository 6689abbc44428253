"""Draw again at a first rejection, and say how likely a rejection was: the second look at p and q.

With p and q the processed laws of a row, whose log Σ exp are known by now, and g the noise of `Purpose.RECOVER`,

    recovered token = argmax_v  log max(p_v - q_v, 0) + g_v         residual = 1 - Σ_v min(p_v, q_v).

A program reads one range of a request's rejected row, and for `residual` of the judged rows up to it; where the
draft has no law (NaN among its logits), q is 0 and the residual 1.  Weights in float32 with the most they can be
off by added say which tokens may win; those are settled in float64, as `kernels.gpu.stream` does it.

Shapes: overlaps [rows, splits] float32; best [requests, splits] float64, best_at int32; totals, stops and again
as in `kernels.gpu.records`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.aot import Case
from kernels.gpu.noise import gumbel32, key_of, misses, token_noise
from kernels.gpu.stream import FLOOR, NEVER, NOWHERE, fast_exp, margin_of, words_of

LOOSE = tl.constexpr(1e-5)  # what float32 probabilities are off by, at most: this share of themselves,
LOOSER = tl.constexpr(5e-7)  # and this share of them times their log-sum
SPLITS = tl.constexpr(64)


@triton.jit
def weigh(x: tl.tensor, border: tl.tensor, temperature: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Return probabilities under a processed law, float32.  Shapes: x any; the rest scalars, total float64."""
    kept = tl.where(x >= border, tl.div_rn(x, temperature), NEVER)
    return fast_exp(kept - total.to(tl.float32))


@triton.jit
def left_over(
    own: tl.tensor, theirs: tl.tensor, column: tl.tensor, border: tl.tensor, draft_border: tl.tensor,
    temperature: tl.tensor, total: tl.tensor, draft_total: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Return log max(p - q, 0) of one column, rounded to float32 as the reference rounds it.  Scalars."""
    x, y = tl.load(own + column).to(tl.float32), tl.load(theirs + column).to(tl.float32)
    p = tl.where(x >= border, tl.exp(tl.div_rn(x, temperature).to(tl.float64) - total), 0.0)
    q = tl.where(y >= draft_border, tl.exp(tl.div_rn(y, temperature).to(tl.float64) - draft_total), 0.0)
    weight = p - tl.where(draft_total == draft_total, q, 0.0)
    return tl.where(weight > 0, tl.log(tl.where(weight > 0, weight, 1.0)), NEVER).to(tl.float32)


@triton.jit
def challenge_left(
    p: tl.tensor, q: tl.tensor, first: tl.tensor, own: tl.tensor, theirs: tl.tensor, vocab: tl.tensor,
    border: tl.tensor, draft_border: tl.tensor, temperature: tl.tensor, total: tl.tensor, draft_total: tl.tensor,
    position: tl.tensor, k0: tl.tensor, k1: tl.tensor, best: tl.tensor, at: tl.tensor, PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the best score and its column after one more block.  Shapes: p and q [BLOCK] float32."""
    loose = LOOSE + LOOSER * tl.abs(total).to(tl.float32) + LOOSER * tl.abs(draft_total).to(tl.float32)
    loose = tl.where(loose == loose, loose, LOOSE + LOOSER * tl.abs(total).to(tl.float32))
    most = p * (1.0 + loose) - q * (1.0 - loose)
    words, largest = words_of(first, None, vocab, position, k0, k1, PURPOSE, BLOCK)
    near = tl.max(tl.reshape(most, [BLOCK // 4, 4]), axis=1)
    bar = tl.exp(tl.minimum(tl.maximum(best.to(tl.float32) - margin_of(best), -80.0), 80.0))
    possible = (near > 0.0) & (misses(largest) * bar <= near)
    if tl.max(possible.to(tl.int32), axis=0) > 0:
        span = tl.arange(0, BLOCK)
        scores = tl.where(most > 0.0, tl.log(tl.where(most > 0.0, most, 1.0)) + gumbel32(words), NEVER)
        top, where = tl.max(scores, axis=0, return_indices=True)
        while (top > NEVER) & (top >= best.to(tl.float32) - margin_of(best)):
            column = tl.minimum(first + where, vocab - 1)
            weight = left_over(own, theirs, column, border, draft_border, temperature, total, draft_total)
            score = weight.to(tl.float64) + token_noise(column, position, k0, k1, PURPOSE)
            better = (score > best) | ((score == best) & (column < at))
            best = tl.where(better, score, best)
            at = tl.where(better, column, at)
            scores = tl.where(span == where, NEVER, scores)
            top, where = tl.max(scores, axis=0, return_indices=True)
    return best, at


@triton.jit(do_not_specialize=["per_split"])
def recover(
    logits: tl.tensor, draft: tl.tensor, temperatures: tl.tensor, seeds: tl.tensor, positions: tl.tensor,
    borders: tl.tensor, draft_borders: tl.tensor, starts: tl.tensor, stops: tl.tensor, again: tl.tensor,
    totals: tl.tensor, overlaps: tl.tensor, best_out: tl.tensor, best_at: tl.tensor, stride: tl.tensor,
    draft_stride: tl.tensor, vocab: tl.tensor, per_split: tl.tensor, PURPOSE: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Read one range of one request's rejected row, and with `overlaps` of the judged rows before it."""
    request, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    low = split * per_split
    high = tl.minimum(low + per_split, tl.cdiv(vocab, BLOCK))
    stop, redraw = tl.load(stops + request), tl.load(again + request) > 0
    row, last = stop, tl.where(redraw, stop, stop - 1)
    if overlaps is not None:
        row = tl.load(starts + request)
        last = tl.minimum(stop, tl.load(starts + request + 1) - 2)
    best, at = tl.full((), FLOOR, tl.float64), tl.full((), NOWHERE, tl.int32)
    while row <= last:
        temperature = tl.load(temperatures + row)
        block = tl.where(temperature > 0, low, high)
        border = tl.full((), NEVER, tl.float32)
        draft_border = border
        if borders is not None:
            border = tl.load(borders + row)
        if draft_borders is not None:
            draft_border = tl.load(draft_borders + row)
        total, draft_total = tl.load(totals + 2 * row), tl.load(totals + 2 * row + 1)
        k0, k1 = key_of(tl.load(seeds + row))
        position = (tl.load(positions + row) & 0xFFFFFFFF).to(tl.uint32)
        own, theirs = logits + row.to(tl.int64) * stride, draft + row.to(tl.int64) * draft_stride
        overlap = tl.zeros([BLOCK], tl.float32)
        while block < high:
            columns = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(own + columns, mask=columns < vocab, other=NEVER).to(tl.float32)
            y = tl.load(theirs + columns, mask=columns < vocab, other=NEVER).to(tl.float32)
            p, q = weigh(x, border, temperature, total), weigh(y, draft_border, temperature, draft_total)
            q = tl.where(q == q, q, 0.0)
            overlap += tl.minimum(p, q)
            if redraw & (row == stop):
                best, at = challenge_left(
                    p, q, block * BLOCK, own, theirs, vocab, border, draft_border, temperature, total, draft_total,
                    position, k0, k1, best, at, PURPOSE, BLOCK,
                )  # fmt: skip
            block += 1
        if overlaps is not None:
            tl.store(overlaps + row * splits + split, tl.sum(overlap, axis=0))
        row += 1
    tl.store(best_out + request * splits + split, best)
    tl.store(best_at + request * splits + split, at)


@triton.jit(do_not_specialize=["splits"])
def settle(
    temperatures: tl.tensor, starts: tl.tensor, stops: tl.tensor, again: tl.tensor, overlaps: tl.tensor,
    best: tl.tensor, best_at: tl.tensor, tokens: tl.tensor, residual: tl.tensor, splits: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Put the ranges of one request together: its recovered token and the residuals of its judged rows."""
    request = tl.program_id(0)
    at = tl.arange(0, SPLITS)
    stop = tl.load(stops + request)
    if tl.load(again + request) > 0:
        score = tl.load(best + request * splits + at, mask=at < splits, other=NEVER)
        column = tl.load(best_at + request * splits + at, mask=at < splits, other=NOWHERE)
        token = tl.min(tl.where(score == tl.max(score, axis=0), column, NOWHERE), axis=0)
        if token != NOWHERE:  # where p == q nothing is left over; what the row said is of p as well
            tl.store(tokens + request, token.to(tl.int64))
    if residual is not None:
        row = tl.load(starts + request)
        last = tl.minimum(stop, tl.load(starts + request + 1) - 2)
        while row <= last:
            if tl.load(temperatures + row) > 0:
                overlap = tl.sum(tl.load(overlaps + row * splits + at, mask=at < splits, other=0.0), axis=0)
                rejected = tl.minimum(tl.maximum(1.0 - overlap, 0.0), 1.0)
                tl.store(residual + row, tl.where(rejected == rejected, rejected, 1.0))
            row += 1


def cases() -> list[Case]:
    """Name the specialisations that real models use, with and without residuals."""
    types = dict.fromkeys(("temperatures", "borders", "draft_borders", "overlaps", "residual"), "*fp32")
    types |= dict.fromkeys(("totals", "best_out", "best"), "*fp64")
    types |= dict.fromkeys(("seeds", "positions", "tokens"), "*i64")
    types |= dict.fromkeys(("starts", "stops", "again", "best_at"), "*i32")
    types |= dict.fromkeys(("stride", "draft_stride", "vocab", "per_split", "splits"), "i32")
    found = []
    for left_out in ((), ("overlaps", "residual")):
        kinds = {name: kind for name, kind in types.items() if name not in left_out}
        for kernel, warps, constants in ((recover, 4, {"PURPOSE": 3, "BLOCK": 1024}), (settle, 1, {})):
            for dtype in ("bf16", "fp16", "fp32") if kernel is recover else ("bf16",):
                held = {"logits": f"*{dtype}", "draft": f"*{dtype}"} | kinds
                held = {name: kind for name, kind in held.items() if name in kernel.arg_names}
                missing = {name: None for name in left_out if name in kernel.arg_names}
                aligned = tuple(name for name in held if name not in ("per_split", "splits"))
                name = f"{kernel.__name__} {dtype} without {left_out}"
                found.append(Case(name, kernel, held, constants | missing, warps=warps, aligned=aligned))
    return found
