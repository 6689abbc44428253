"""One pass over logits: what every part of a row says of its largest, its mass and its drawn token.

A program reads one range of one row, block by block, the next block on its way while this one is worked on.
Per range it leaves

    the largest logit m, Σ exp(x - m), and of the processed law Σ exp((x - m) / T) over what stays;
    the best score x / T + Gumbel noise and its column, exact: as float64 arithmetic orders them;
    the maximum of every 128 columns, from which the likeliest tokens are found without reading the row again;
    and of the draft's row the same two sums.

Noise is dear and hardly any token can win.  A block is looked at for candidates only where its largest could
reach the best so far with the largest noise there is; whether one of four neighbours reaches it is asked of the
least of their 1 - u (`kernels.gpu.noise`); and where one does, scores in float32 order the candidates, of which
those within `MARGIN` of the best are settled in float64.  So a row's token is that of `kernels.sampling.draw`,
whatever the ranges are.

Shapes: logits [rows, vocab], each row contiguous; stats [rows, 5, splits] float32; best [rows, splits] float64;
best_at [rows, splits] int32; maxima [rows, ceil(vocab / 128)] in the dtype of the logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.aot import Case
from kernels.gpu.noise import MAX_GUMBEL, gumbel32, key_of, lane_of, misses, neighbours, philox, token_noise

MARGIN = tl.constexpr(1e-4)  # what float32 scores are off by, at most: this much,
SHARE = tl.constexpr(2e-6)  # and this share of the score
SUB = tl.constexpr(128)  # columns a stored maximum stands for
FLOOR = tl.constexpr(-1e30)  # logits and scores below it count as -inf; it is still a number to reckon with
FIELDS = tl.constexpr(5)  # largest, mass, processed mass; draft's largest, draft's processed mass
PIECE = tl.constexpr(512)  # columns that are scored at once; a block is a whole number of them
NEVER = tl.constexpr(float("-inf"))
NOWHERE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def margin_of(best: tl.tensor) -> tl.tensor:
    """Return how far below `best` a float32 score may lie and still be the better one.  Scalars: float64."""
    return MARGIN + SHARE * (tl.abs(best) + MAX_GUMBEL).to(tl.float32)


@triton.jit
def words_of(
    first: tl.tensor, token_ids: tl.tensor, vocab: tl.tensor, position: tl.tensor, k0: tl.tensor, k1: tl.tensor,
    PURPOSE: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the words of a block's columns and, for every `len` neighbours, their largest.

    Shapes: words [BLOCK] uint32; largest [BLOCK / 4], or [BLOCK] where columns are any tokens.
    """
    if token_ids is None:
        blocks = first // 4 + tl.arange(0, BLOCK // 4)
        b0, b1, b2, b3 = philox(blocks.to(tl.uint32), position, k0, k1, PURPOSE)
        return neighbours(b0, b1, b2, b3), tl.maximum(tl.maximum(b0, b1), tl.maximum(b2, b3))
    else:
        columns = first + tl.arange(0, BLOCK)
        tokens = tl.load(token_ids + columns, mask=columns < vocab, other=0)
        b0, b1, b2, b3 = philox((tokens // 4).to(tl.uint32), position, k0, k1, PURPOSE)
        words = lane_of(b0, b1, b2, b3, tokens % 4)
        return words, words


@triton.jit
def settle_block(
    scores: tl.tensor, first: tl.tensor, row: tl.tensor, token_ids: tl.tensor, vocab: tl.tensor,
    temperature: tl.tensor, position: tl.tensor, k0: tl.tensor, k1: tl.tensor, best: tl.tensor, at: tl.tensor,
    PURPOSE: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Visit a block's candidates, the likeliest winner first, while one may beat the best; return the best.

    Shapes: scores [BLOCK] float32, -inf where cut; best float64, at int32, its column.
    """
    span = tl.arange(0, BLOCK)
    top, where = tl.max(scores, axis=0, return_indices=True)
    while (top > NEVER) & (top >= best.to(tl.float32) - margin_of(best)):
        column = tl.minimum(first + where, vocab - 1)  # NaN beside it can lead an argmax astray
        token = column
        if token_ids is not None:
            token = tl.load(token_ids + column).to(tl.int32)
        scaled = tl.div_rn(tl.load(row + column).to(tl.float32), temperature)
        score = scaled.to(tl.float64) + token_noise(token, position, k0, k1, PURPOSE)
        better = (score > best) | ((score == best) & (column < at))
        best = tl.where(better, score, best)
        at = tl.where(better, column, at)
        scores = tl.where(span == where, NEVER, scores)
        top, where = tl.max(scores, axis=0, return_indices=True)
    return best, at


@triton.jit
def reached_by(
    x: tl.tensor, largest: tl.tensor, inverse: tl.tensor, border: tl.tensor, best: tl.tensor, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Say whether any column of a block may reach the best.  Shapes: x [BLOCK]; largest word of each, or of four."""
    near = x
    if largest.shape[0] != BLOCK:
        near = tl.max(tl.reshape(x, [BLOCK // 4, 4]), axis=1)
    reach = best.to(tl.float32) - margin_of(best)
    possible = (misses(largest) <= fast_exp(tl.minimum(near * inverse - reach, 1.0))) & (near >= border)
    return tl.max(possible.to(tl.int32), axis=0) > 0


@triton.jit
def look_closely(
    first: tl.tensor, row: tl.tensor, token_ids: tl.tensor, vocab: tl.tensor, temperature: tl.tensor,
    border: tl.tensor, position: tl.tensor, k0: tl.tensor, k1: tl.tensor, best: tl.tensor, at: tl.tensor,
    PURPOSE: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Go through a block in small pieces, which takes few registers, and score those that may hold the best."""
    inverse = 1.0 / temperature
    piece = first
    while piece < tl.minimum(first + BLOCK, vocab):
        columns = piece + tl.arange(0, PIECE)
        x = tl.load(row + columns, mask=columns < vocab, other=NEVER).to(tl.float32)
        words, largest = words_of(piece, token_ids, vocab, position, k0, k1, PURPOSE, PIECE)
        if reached_by(x, largest, inverse, border, best, PIECE):
            scores = tl.where((x >= border) & (x == x), tl.div_rn(x, temperature) + gumbel32(words), NEVER)
            best, at = settle_block(
                scores, piece, row, token_ids, vocab, temperature, position, k0, k1, best, at, PURPOSE, PIECE
            )
        piece += PIECE
    return best, at


@triton.jit
def challenge(
    x: tl.tensor, top: tl.tensor, first: tl.tensor, row: tl.tensor, token_ids: tl.tensor, vocab: tl.tensor,
    temperature: tl.tensor, border: tl.tensor, position: tl.tensor, k0: tl.tensor, k1: tl.tensor, best: tl.tensor,
    at: tl.tensor, PURPOSE: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the best score and its column after one more block.  Shapes: x [BLOCK] float32, `top` its largest."""
    if temperature > 0:
        inverse = 1.0 / temperature
        if (top >= border) & (top * inverse + MAX_GUMBEL >= best.to(tl.float32) - margin_of(best)):
            _, largest = words_of(first, token_ids, vocab, position, k0, k1, PURPOSE, BLOCK)
            if reached_by(x, largest, inverse, border, best, BLOCK):
                best, at = look_closely(
                    first, row, token_ids, vocab, temperature, border, position, k0, k1, best, at, PURPOSE, BLOCK
                )
    else:
        if top > best:
            value, where = tl.max(x, axis=0, return_indices=True)
            best = value.to(tl.float64)
            at = tl.minimum(first + where, vocab - 1)
    return best, at


@triton.jit
def fast_exp(x: tl.tensor) -> tl.tensor:
    """Return exp(x); unlike exp itself, exp2 spends no instruction on results below 2^-126, which count as 0 here."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def add_mass(
    x: tl.tensor, border: tl.tensor, inverse: tl.tensor, peak: tl.tensor, mass: tl.tensor, shaped: tl.tensor,
    RAW: tl.constexpr, SHAPED: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the block's maxima, and running maxima and masses of the raw law and of the processed one.

    Shapes: x [BLOCK]; all else [BLOCK / 8]: eight neighbours lie in one thread and share one maximum.
    """
    eight = tl.reshape(x, [BLOCK // 8, 8])
    largest = tl.max(eight, axis=1)
    higher = tl.maximum(peak, largest)
    below = eight - higher[:, None]
    if RAW:
        mass = mass * fast_exp(peak - higher) + tl.sum(fast_exp(below), axis=1)
    if SHAPED:
        kept = tl.where(eight >= border, fast_exp(below * inverse), tl.where(eight == eight, 0.0, eight))
        shaped = shaped * fast_exp((peak - higher) * inverse) + tl.sum(kept, axis=1)
    return largest, higher, mass, shaped


@triton.jit
def read_block(row: tl.tensor, block: tl.tensor, last: tl.tensor, vocab: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Load one block of a row, or nothing past the last.  Result [BLOCK], -inf past the vocabulary."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(row + at, mask=(at < vocab) & (block < last), other=NEVER)


@triton.jit
def sum_draft(
    draft: tl.tensor, vocab: tl.tensor, low: tl.tensor, high: tl.tensor, border: tl.tensor, inverse: tl.tensor,
    out: tl.tensor, splits: tl.tensor, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Leave the draft's largest logit of a range and its processed mass."""
    peak = tl.full([BLOCK // 8], FLOOR, tl.float32)
    shaped = tl.zeros([BLOCK // 8], tl.float32)
    coming = read_block(draft, low, high, vocab, BLOCK)
    block = low
    while block < high:
        x = coming.to(tl.float32)
        coming = read_block(draft, block + 1, high, vocab, BLOCK)
        _, peak, _, shaped = add_mass(x, border, inverse, peak, shaped, shaped, False, True, BLOCK)
        block += 1
    top = tl.max(peak, axis=0)
    tl.store(out + 3 * splits, top)
    tl.store(out + 4 * splits, tl.sum(shaped * fast_exp((peak - top) * inverse), axis=0))


@triton.jit(do_not_specialize=["per_split", "requests"])
def stream(
    logits: tl.tensor, draft: tl.tensor, token_ids: tl.tensor, temperatures: tl.tensor, seeds: tl.tensor,
    positions: tl.tensor, borders: tl.tensor, draft_borders: tl.tensor, starts: tl.tensor, drafted: tl.tensor,
    stats: tl.tensor, best_out: tl.tensor, best_at: tl.tensor, maxima: tl.tensor, stride: tl.tensor,
    draft_stride: tl.tensor, vocab: tl.tensor, per_split: tl.tensor, requests: tl.tensor, PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Read one range of one row; rows of no request end at once."""
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    low = split * per_split
    high = tl.minimum(low + per_split, tl.cdiv(vocab, BLOCK))
    if starts is not None:  # noqa: SIM102 - one is a constant of the compilation
        if row >= tl.load(starts + requests):
            high = low
    temperature = tl.load(temperatures + row)
    inverse = 1.0 / tl.where(temperature > 0, temperature, 1.0)
    border = NEVER
    if borders is not None:
        border = tl.where(temperature > 0, tl.load(borders + row), NEVER)
    k0, k1 = key_of(tl.load(seeds + row))
    position = (tl.load(positions + row) & 0xFFFFFFFF).to(tl.uint32)
    own = logits + row * stride
    best, at = tl.full((), FLOOR, tl.float64), tl.full((), NOWHERE, tl.int32)
    peak = tl.full([BLOCK // 8], FLOOR, tl.float32)
    mass, shaped = tl.zeros([BLOCK // 8], tl.float32), tl.zeros([BLOCK // 8], tl.float32)
    coming = read_block(own, low, high, vocab, BLOCK)
    block = low
    while block < high:  # the interpreter has no range over what a kernel computed
        x = coming.to(tl.float32)
        coming = read_block(own, block + 1, high, vocab, BLOCK)
        eighths, peak, mass, shaped = add_mass(x, border, inverse, peak, mass, shaped, True, draft is not None, BLOCK)
        if maxima is not None:
            largest = tl.max(tl.reshape(eighths, [BLOCK // SUB, SUB // 8]), axis=1)
            place = block * (BLOCK // SUB) + tl.arange(0, BLOCK // SUB)
            width = tl.cdiv(vocab, SUB)
            tl.store(maxima + row * width + place, largest.to(maxima.dtype.element_ty), mask=place < width)
        best, at = challenge(
            x, tl.max(eighths, axis=0), block * BLOCK, own, token_ids, vocab, temperature, border, position, k0, k1,
            best, at, PURPOSE, BLOCK,
        )  # fmt: skip
        block += 1
    top = tl.max(peak, axis=0)
    out = stats + row * FIELDS * splits + split
    tl.store(out, top)
    tl.store(out + splits, tl.sum(mass * fast_exp(peak - top), axis=0))
    tl.store(best_out + row * splits + split, best)
    tl.store(best_at + row * splits + split, at)
    if draft is not None:
        tl.store(out + 2 * splits, tl.sum(shaped * fast_exp((peak - top) * inverse), axis=0))
        if (temperature > 0) & (tl.load(drafted + row) >= 0) & (high > low):
            draft_border = NEVER
            if draft_borders is not None:
                draft_border = tl.load(draft_borders + row)
            sum_draft(draft + row * draft_stride, vocab, low, high, draft_border, inverse, out, splits, BLOCK)


def cases() -> list[Case]:
    """Name the specialisations that real models use: verifying with and without a draft's law, and drafting."""
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for left_out in (
            ("token_ids",), ("token_ids", "draft", "draft_borders"),
            ("draft", "draft_borders", "starts", "drafted", "maxima"),
        ):  # fmt: skip
            types = dict.fromkeys(("temperatures", "borders", "draft_borders", "stats"), "*fp32")
            types |= dict.fromkeys(("logits", "draft", "maxima"), f"*{dtype}") | {"best_out": "*fp64"}
            types |= dict.fromkeys(("token_ids", "seeds", "positions"), "*i64")
            types |= dict.fromkeys(("starts", "drafted", "best_at"), "*i32")
            types = {name: kind for name, kind in types.items() if name not in left_out}
            aligned = (*types, "stride", "draft_stride", "vocab")
            types |= dict.fromkeys(("stride", "draft_stride", "vocab", "per_split", "requests"), "i32")
            block, warps = (1024, 2) if dtype == "fp32" else (2048, 4)
            constants = {"PURPOSE": 0, "BLOCK": block} | dict.fromkeys(left_out)
            name = f"stream {dtype} without {left_out[-1]}"
            found.append(Case(name, stream, types, constants, warps=warps, aligned=aligned))
    return found
