"""Put the ranges of `kernels.gpu.stream` together: the target's tokens, the accept chain, and the records.

One launch, of which the first programs judge a request each and the others record a row each, all at once:

    a request  merges what its rows' ranges found, 16 rows at a time, and keeps drafted tokens up to the first
               that is not the target's (gumbel, greedy) or for which u q(x) < p(x) does not hold (maximal);
    a row      log Σ exp from its ranges, and of the raw law the k likeliest tokens (`kernels.gpu.likeliest`).

Shapes: stats, best, best_at and maxima as in `kernels.gpu.stream`; totals [rows, 2] float64, log Σ exp of the
processed laws of target and draft, NaN where there is none; stops [requests] int32, the row whose token comes
next; again [requests] int32, whether that token is to be drawn from the residual; the rest as in
`kernels.verdicts.Verdicts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.aot import Case
from kernels.gpu.likeliest import record_likeliest
from kernels.gpu.noise import key_of, philox, uniform64
from kernels.gpu.stream import FIELDS, FLOOR, NEVER, NOWHERE, SUB

SPLITS = tl.constexpr(64)  # the most ranges a row has
WARPS = 8
ROWS = tl.constexpr(16)  # rows of a request that are merged at once


@triton.jit
def log_total(
    peaks: tl.tensor, masses: tl.tensor, splits: tl.tensor, inverse: tl.tensor, real: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Return log Σ exp of rows, from the largest logits and the masses of their ranges; NaN where there is none.

    Shapes: peaks and masses [n] pointers to a row's first range; inverse [n] one over the temperature; result [n]
    float64.
    """
    at = tl.arange(0, SPLITS)[None, :]
    held = real[:, None] & (at < splits)
    peak = tl.load(peaks[:, None] + at, mask=held, other=FLOOR)
    mass = tl.load(masses[:, None] + at, mask=held, other=0.0)
    top = tl.max(peak, axis=1)
    parts = mass.to(tl.float64) * tl.exp((peak - top[:, None]) * inverse[:, None]).to(tl.float64)
    mass = tl.sum(parts, axis=1)
    total = top.to(tl.float64) * inverse.to(tl.float64) + tl.log(tl.where(mass > 0.5, mass, 1.0))
    return tl.where(mass > 0.5, total, float("nan"))


@triton.jit
def best_of(best: tl.tensor, best_at: tl.tensor, splits: tl.tensor, real: tl.tensor) -> tl.tensor:
    """Return the column of the best score of rows' ranges, of equal ones the first.

    Shapes: best and best_at [n] pointers to a row's first range; result [n] int32.
    """
    at = tl.arange(0, SPLITS)[None, :]
    held = real[:, None] & (at < splits)
    score = tl.load(best[:, None] + at, mask=held, other=NEVER)
    column = tl.load(best_at[:, None] + at, mask=held, other=NOWHERE)
    return tl.min(tl.where(score == tl.max(score, axis=1)[:, None], column, NOWHERE), axis=1)


@triton.jit
def heard(
    stats: tl.tensor, best: tl.tensor, best_at: tl.tensor, rows: tl.tensor, splits: tl.tensor, real: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Return what rows say and their raw log Σ exp: column 0 and NaN where a row is not finite.  Shapes: [n]."""
    wide = rows.to(tl.int64)
    own = stats + wide * FIELDS * splits
    total = log_total(own, own + splits, splits, tl.full(rows.shape, 1.0, tl.float32), real)
    column = best_of(best + wide * splits, best_at + wide * splits, splits, real)
    return tl.where((total == total) & (column != NOWHERE), column, 0), total


@triton.jit
def chance(
    logits: tl.tensor, borders: tl.tensor, rows: tl.tensor, stride: tl.tensor, column: tl.tensor,
    temperature: tl.tensor, total: tl.tensor, real: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Return the probability of one column a row under the processed law.  Shapes: all [ROWS]; float64."""
    x = tl.load(logits + rows.to(tl.int64) * stride + column, mask=real, other=NEVER).to(tl.float32)
    if borders is not None:
        x = tl.where(x >= tl.load(borders + rows, mask=real, other=NEVER), x, NEVER)
    return tl.exp(tl.div_rn(x, temperature).to(tl.float64) - total)


@triton.jit
def lucky_rows(
    logits: tl.tensor, draft: tl.tensor, borders: tl.tensor, draft_borders: tl.tensor, seeds: tl.tensor,
    positions: tl.tensor, stats: tl.tensor, rows: tl.tensor, stride: tl.tensor, draft_stride: tl.tensor,
    column: tl.tensor, temperature: tl.tensor, splits: tl.tensor, real: tl.tensor, ACCEPT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Say of which rows u q(x) < p(x) holds for the drafted token x.  Shapes: all [ROWS]."""
    inverse = 1.0 / temperature
    own = stats + rows.to(tl.int64) * FIELDS * splits
    target = log_total(own, own + 2 * splits, splits, inverse, real)
    ours = log_total(own + 3 * splits, own + 4 * splits, splits, inverse, real)
    p = chance(logits, borders, rows, stride, column, temperature, target, real)
    q = chance(draft, draft_borders, rows, draft_stride, column, temperature, ours, real)
    k0, k1 = key_of(tl.load(seeds + rows, mask=real, other=0))
    position = (tl.load(positions + rows, mask=real, other=0) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = philox(tl.zeros_like(position), position, k0, k1, ACCEPT)
    return uniform64(word) * q < p


@triton.jit
def judge_request(
    logits: tl.tensor, draft: tl.tensor, temperatures: tl.tensor, seeds: tl.tensor, positions: tl.tensor,
    borders: tl.tensor, draft_borders: tl.tensor, starts: tl.tensor, drafted: tl.tensor, stats: tl.tensor,
    best: tl.tensor, best_at: tl.tensor, accepted: tl.tensor, tokens: tl.tensor, finite: tl.tensor, stops: tl.tensor,
    again: tl.tensor, stride: tl.tensor, draft_stride: tl.tensor, vocab: tl.tensor, splits: tl.tensor,
    request: tl.tensor, ACCEPT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Walk one request's rows and write its verdict; ACCEPT is None where a draft is kept while it is what is said."""
    first, end = tl.load(starts + request), tl.load(starts + request + 1)
    stop, token, redraw, whole = end - 1, first * 0 - 1, first * 0, first * 0 + 1
    at = first
    while at < end:
        rows = at + tl.arange(0, ROWS)
        real = rows < end
        said, total = heard(stats, best, best_at, rows, splits, real)
        draft_id = tl.load(drafted + rows, mask=real, other=-1)
        judged = (rows < end - 1) & (draft_id >= 0) & (draft_id < vocab)
        kept = judged & (draft_id == said)
        renew = kept & (draft_id < 0)
        if ACCEPT is not None:
            temperature = tl.load(temperatures + rows, mask=real, other=0.0)
            sampled = judged & (temperature > 0)
            lucky = lucky_rows(
                logits, draft, borders, draft_borders, seeds, positions, stats, rows, stride, draft_stride, draft_id,
                tl.where(sampled, temperature, 1.0), splits, sampled, ACCEPT,
            )  # fmt: skip
            kept = tl.where(sampled, lucky, kept)
            renew = sampled & (total == total)
        halt = tl.min(tl.where(real & ~kept, rows, end), axis=0)
        here = (rows == halt) & (stop >= halt)
        stop = tl.minimum(stop, halt)
        token = tl.maximum(token, tl.max(tl.where(here & (rows == stop), said, -1), axis=0))
        redraw = tl.maximum(redraw, tl.max((here & (rows == stop) & renew).to(tl.int32), axis=0))
        whole = tl.minimum(whole, tl.min(tl.where(real, (total == total).to(tl.int32), 1), axis=0))
        at += ROWS
    tl.store(accepted + request, tl.maximum(stop - first, 0))
    tl.store(tokens + request, token.to(tl.int64))
    tl.store(finite + request, (whole > 0).to(tl.int8))
    if stops is not None:
        tl.store(stops + request, stop)
        tl.store(again + request, redraw)


@triton.jit
def record_row(
    logits: tl.tensor, temperatures: tl.tensor, drafted: tl.tensor, starts: tl.tensor, stats: tl.tensor,
    best: tl.tensor, best_at: tl.tensor, maxima: tl.tensor, said_out: tl.tensor, logprobs: tl.tensor, ids: tl.tensor,
    topk_logprobs: tl.tensor, tails: tl.tensor, residual: tl.tensor, totals: tl.tensor, stride: tl.tensor,
    vocab: tl.tensor, splits: tl.tensor, requests: tl.tensor, row: tl.tensor, WIDTH: tl.constexpr, K: tl.constexpr,
    PADDED: tl.constexpr, LOW: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Write what one row says and its records."""
    own = logits + row.to(tl.int64) * stride
    one = row + tl.zeros([1], tl.int32)
    real = one < tl.load(starts + requests)
    said, total = heard(stats, best, best_at, one, splits, real)
    draft_id = tl.load(drafted + one, mask=real, other=-1)
    judged = (draft_id >= 0) & (draft_id < vocab)
    x = tl.load(own + tl.where(judged, draft_id, said), mask=real, other=NEVER).to(tl.float32)
    named = tl.where(total == total, x.to(tl.float64) - total, NEVER).to(tl.float32)
    tl.store(said_out + one, tl.where(real, said, -1).to(tl.int64))
    tl.store(logprobs + one, tl.where(real, named, 0.0))
    temperature = tl.load(temperatures + one)
    if residual is not None:
        tl.store(residual + one, (real & judged & (temperature <= 0) & (draft_id != said)).to(tl.float32))
    if totals is not None:
        sampled = real & judged & (temperature > 0)
        part = stats + one.to(tl.int64) * FIELDS * splits
        inverse = 1.0 / tl.where(sampled, temperature, 1.0)
        tl.store(totals + 2 * one, log_total(part, part + 2 * splits, splits, inverse, sampled))
        tl.store(totals + 2 * one + 1, log_total(part + 3 * splits, part + 4 * splits, splits, inverse, sampled))
    tail = tl.full((), 1.0, tl.float32)
    if K > 0:
        if row < tl.load(starts + requests):
            tail = record_likeliest(
                own, maxima + row.to(tl.int64) * tl.cdiv(vocab, SUB), vocab, tl.sum(total, axis=0), ids + row * K,
                topk_logprobs + row * K, WIDTH, K, PADDED, LOW,
            )  # fmt: skip
        else:
            slots = tl.arange(0, PADDED)
            tl.store(ids + row * K + slots, slots, mask=slots < K)
            tl.store(topk_logprobs + row * K + slots, tl.full([PADDED], NEVER, tl.float16), mask=slots < K)
    tl.store(tails + row, tail)


@triton.jit(do_not_specialize=["requests", "splits"])
def verdicts(
    logits: tl.tensor, draft: tl.tensor, temperatures: tl.tensor, seeds: tl.tensor, positions: tl.tensor,
    borders: tl.tensor, draft_borders: tl.tensor, starts: tl.tensor, drafted: tl.tensor, stats: tl.tensor,
    best: tl.tensor, best_at: tl.tensor, maxima: tl.tensor, accepted: tl.tensor, tokens: tl.tensor, finite: tl.tensor,
    said: tl.tensor, logprobs: tl.tensor, ids: tl.tensor, topk_logprobs: tl.tensor, tails: tl.tensor,
    residual: tl.tensor, totals: tl.tensor, stops: tl.tensor, again: tl.tensor, stride: tl.tensor,
    draft_stride: tl.tensor, vocab: tl.tensor, requests: tl.tensor, splits: tl.tensor, ACCEPT: tl.constexpr,
    WIDTH: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, LOW: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Judge one request, or record one row."""
    program = tl.program_id(0)
    if program < requests:
        judge_request(
            logits, draft, temperatures, seeds, positions, borders, draft_borders, starts, drafted, stats, best,
            best_at, accepted, tokens, finite, stops, again, stride, draft_stride, vocab, splits, program, ACCEPT,
        )  # fmt: skip
    else:
        record_row(
            logits, temperatures, drafted, starts, stats, best, best_at, maxima, said, logprobs, ids, topk_logprobs,
            tails, residual, totals, stride, vocab, splits, requests, program - requests, WIDTH, K, PADDED, LOW,
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def draws(
    logits: tl.tensor, token_ids: tl.tensor, stats: tl.tensor, best: tl.tensor, best_at: tl.tensor, tokens: tl.tensor,
    columns: tl.tensor, logprobs: tl.tensor, finite: tl.tensor, stride: tl.tensor, splits: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Put the ranges of one row together."""
    row = tl.program_id(0) + tl.zeros([1], tl.int32)
    column, total = heard(stats, best, best_at, row, splits, row >= 0)
    token = column.to(tl.int64)
    if token_ids is not None:
        token = tl.load(token_ids + column)
    x = tl.load(logits + row.to(tl.int64) * stride + column).to(tl.float32)
    tl.store(tokens + row, token)
    tl.store(columns + row, column.to(tl.int64))
    tl.store(logprobs + row, tl.where(total == total, x.to(tl.float64) - total, NEVER).to(tl.float32))
    tl.store(finite + row, (total == total).to(tl.int8))


def cases() -> list[Case]:
    """Name the specialisations that real models use: both couplings, two vocabularies, and drafting."""
    types = dict.fromkeys(("temperatures", "borders", "draft_borders", "stats", "logprobs", "tails"), "*fp32")
    types |= dict.fromkeys(("best", "totals"), "*fp64") | {"residual": "*fp32", "topk_logprobs": "*fp16"}
    types |= dict.fromkeys(("seeds", "positions", "tokens", "said", "columns", "token_ids"), "*i64")
    types |= dict.fromkeys(("starts", "drafted", "best_at", "accepted", "ids", "stops", "again"), "*i32")
    sizes = dict.fromkeys(("stride", "draft_stride", "vocab", "requests", "splits"), "i32")
    of_laws, found = ("draft", "draft_borders", "residual", "totals", "stops", "again"), []
    for dtype, low in (("bf16", 16), ("fp16", 12), ("fp32", 0)):
        dtypes = types | dict.fromkeys(("logits", "draft", "maxima"), f"*{dtype}") | {"finite": "*i8"}
        of_draws = {name: kind for name, kind in (dtypes | sizes).items() if name in draws.arg_names}
        found.append(Case(f"draws {dtype}", draws, of_draws, {}, warps=1, aligned=_aligned(of_draws)))
        for coupling, left_out in (("gumbel", of_laws), ("maximal", ())):
            for width in (512, 2048):
                held = {
                    name: kind
                    for name, kind in (dtypes | sizes).items()
                    if name in verdicts.arg_names and name not in left_out
                }
                constants = {"WIDTH": width, "K": 32, "PADDED": 32, "LOW": low} | dict.fromkeys(left_out)
                constants["ACCEPT"] = None if left_out else 2
                name = f"verdicts {coupling} {dtype} parts={width}"
                found.append(Case(name, verdicts, held, constants, warps=WARPS, aligned=_aligned(held)))
    return found


def _aligned(types: dict[str, str]) -> tuple[str, ...]:
    return tuple(name for name, kind in types.items() if kind.startswith("*") or name in ("stride", "draft_stride"))
