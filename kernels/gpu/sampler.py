"""Draw, judge drafted tokens and record the target's law, with one pass over the logits.

    gumbel    stream -> records                        reads every row of the target once
    maximal   stream -> records -> recover -> settle   and every judged row of the draft; and of each request the
                                                       one rejected row of both again

`kernels.gpu.stream` reads, `kernels.gpu.records` merges and judges, `kernels.gpu.recovery` draws again.  Nothing
is read back to the host, and launches depend on the shapes alone, so a call can be captured in a CUDA graph and
replayed with other numbers in `starts`: rows from starts[-1] on are left alone.
The tokens are those of `kernels.reference.verify`, which says what everything means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from kernels.gpu import records, recovery
from kernels.gpu.aot import Case
from kernels.gpu.stream import FIELDS, SUB, stream
from kernels.gpu.stream import cases as stream_cases
from kernels.noise import Purpose
from kernels.reference.verify import check_request
from kernels.verdicts import Draws, Verdicts

if TYPE_CHECKING:
    from kernels.sampling import RowParams

_BLOCK_BYTES = 4096  # of a row, that a program reads at once
_AGAIN = 1024  # columns it reads of two rows at once
_PROGRAMS = 2112  # what a row's ranges are counted for: twice what 132 multiprocessors run at once, eight each
_STREAM_WARPS = {2: 4, 4: 2}  # by the bytes of a logit: 16 columns a thread
_AGAIN_WARPS = 4
_MOST_RANGES = 64
_MOST_RECORDED = 128
_LOW = {torch.bfloat16: 16, torch.float16: 12, torch.float32: 0}  # bits of a float32 that are alike in all of them


def ranges(rows: int, vocab: int, block: int) -> tuple[int, int]:
    """Return into how many ranges each row is cut, and of how many blocks each.

    Few rows are cut finely, so that every multiprocessor reads; many rows coarsely, so that little is merged.
    """
    blocks = -(-vocab // block)
    wanted = min(max(1, -(-_PROGRAMS // max(rows, 1))), blocks, _MOST_RANGES)
    per_split = -(-blocks // wanted)
    return -(-blocks // per_split), per_split


class _Streamed:
    """One pass over the logits, and what it left behind; shapes as in `kernels.gpu.stream`."""

    def __init__(
        self, logits: torch.Tensor, params: RowParams, purpose: Purpose, *, borders: torch.Tensor | None,
        token_ids: torch.Tensor | None = None, draft: torch.Tensor | None = None,
        draft_borders: torch.Tensor | None = None, starts: torch.Tensor | None = None,
        drafted: torch.Tensor | None = None, parts: bool = False,
    ) -> None:  # fmt: skip
        rows, vocab = logits.shape
        block = _BLOCK_BYTES // logits.element_size()
        self.splits, self.per_split = ranges(rows, vocab, block)
        self.stats = logits.new_empty(rows, FIELDS.value, self.splits, dtype=torch.float32)
        self.best = logits.new_empty(rows, self.splits, dtype=torch.float64)
        self.best_at = logits.new_empty(rows, self.splits, dtype=torch.int32)
        self.maxima = logits.new_empty(rows, -(-vocab // SUB.value)) if parts else None
        stream[(rows, self.splits)](
            logits, draft, token_ids, params.temperature, params.seeds, params.positions, borders, draft_borders,
            starts, drafted, self.stats, self.best, self.best_at, self.maxima, logits.stride(0),
            0 if draft is None else draft.stride(0), vocab, self.per_split, 0 if starts is None else len(starts) - 1,
            PURPOSE=int(purpose), BLOCK=block, num_warps=_STREAM_WARPS[logits.element_size()],
        )  # fmt: skip


def draw(
    logits: torch.Tensor, params: RowParams, purpose: Purpose = Purpose.SAMPLE, *,
    borders: torch.Tensor | None = None, token_ids: torch.Tensor | None = None,
) -> Draws:  # fmt: skip
    """Draw one column of each row, as `kernels.reference.verify.draw` does.

    Shapes: logits [rows, vocab] bf16, fp16 or fp32, rows contiguous; borders [rows] float32; token_ids [vocab]
    int64, ascending.

    Raises:
        ValueError: a tensor of another dtype, shape or layout.
    """
    _check_logits("logits", logits)
    _check_rows(params, borders, len(logits))
    rows, vocab = logits.shape
    if token_ids is not None and (token_ids.shape != (vocab,) or token_ids.dtype != torch.int64):
        raise ValueError(f"token_ids is {token_ids.dtype} {list(token_ids.shape)}; it must be int64 [{vocab}]")
    tokens, columns = (logits.new_empty(rows, dtype=torch.int64) for _ in range(2))
    logprobs, finite = logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.bool)
    if rows:
        run = _Streamed(logits, params, purpose, borders=borders, token_ids=token_ids)
        records.draws[(rows,)](
            logits, token_ids, run.stats, run.best, run.best_at, tokens, columns, logprobs, finite.view(torch.int8),
            logits.stride(0), run.splits, num_warps=1,
        )  # fmt: skip
    return Draws(tokens, columns, logprobs, finite)


def verify(
    logits: torch.Tensor, params: RowParams, starts: torch.Tensor, drafted: torch.Tensor, *, coupling: str,
    borders: torch.Tensor | None = None, draft_logits: torch.Tensor | None = None,
    draft_borders: torch.Tensor | None = None, top_k: int = 0, with_residual: bool = True,
) -> Verdicts:  # fmt: skip
    """Judge every request's drafted tokens and record the target's law, as `kernels.reference.verify.verify` does.

    Shapes: logits and draft_logits [rows, vocab] bf16, fp16 or fp32, rows contiguous; starts [requests + 1] and
    drafted [rows] int32; borders and draft_borders [rows] float32.  `with_residual` False saves reading the rows
    before a rejection again.

    Raises:
        ValueError: a tensor of another dtype, shape or layout, a coupling that is none, maximal without draft
            logits, or top_k outside 0..min(vocab, 128).
    """
    _check_verify(logits, params, starts, drafted, coupling, borders, draft_logits, draft_borders, top_k)
    (rows, vocab), requests = logits.shape, len(starts) - 1
    maximal = coupling == "maximal"
    draft = draft_logits if maximal or with_residual else None
    laws = draft is not None
    verdicts = _empty_verdicts(logits, requests, top_k, laws and with_residual)
    if not rows or not requests:
        return _nothing(verdicts)
    run = _Streamed(
        logits, params, Purpose.SAMPLE, borders=borders, draft=draft, draft_borders=draft_borders, starts=starts,
        drafted=drafted, parts=top_k > 0,
    )  # fmt: skip
    totals = logits.new_empty(rows, 2, dtype=torch.float64) if laws else None
    stops, again = (logits.new_empty(requests, dtype=torch.int32) if laws else None for _ in range(2))
    strides = (logits.stride(0), 0 if draft is None else draft.stride(0), vocab)
    records.verdicts[(requests + rows,)](
        logits, draft, params.temperature, params.seeds, params.positions, borders, draft_borders, starts, drafted,
        run.stats, run.best, run.best_at, run.maxima, verdicts.accepted, verdicts.tokens,
        verdicts.finite.view(torch.int8), verdicts.said, verdicts.logprobs, verdicts.topk_ids,
        verdicts.topk_logprobs, verdicts.tail, verdicts.residual, totals, stops, again, *strides, requests,
        run.splits, ACCEPT=int(Purpose.ACCEPT) if maximal else None,
        WIDTH=triton.next_power_of_2(-(-vocab // SUB.value)), K=top_k, PADDED=triton.next_power_of_2(max(top_k, 1)),
        LOW=_LOW[logits.dtype], num_warps=records.WARPS,
    )  # fmt: skip
    if draft is not None:
        _look_again(logits, draft, params, borders, draft_borders, starts, verdicts, totals, stops, again)
    return verdicts


def _look_again(
    logits: torch.Tensor, draft: torch.Tensor, params: RowParams, borders: torch.Tensor | None,
    draft_borders: torch.Tensor | None, starts: torch.Tensor, verdicts: Verdicts, totals: torch.Tensor | None,
    stops: torch.Tensor | None, again: torch.Tensor | None,
) -> None:  # fmt: skip
    """Draw again at first rejections, and sum up the residuals."""
    (rows, vocab), requests = logits.shape, len(starts) - 1
    splits, per_split = ranges(requests, vocab, _AGAIN)
    overlaps = None if verdicts.residual is None else logits.new_empty(rows, splits, dtype=torch.float32)
    best = logits.new_empty(requests, splits, dtype=torch.float64)
    best_at = logits.new_empty(requests, splits, dtype=torch.int32)
    recovery.recover[(requests, splits)](
        logits, draft, params.temperature, params.seeds, params.positions, borders, draft_borders, starts, stops,
        again, totals, overlaps, best, best_at, logits.stride(0), draft.stride(0), vocab, per_split,
        PURPOSE=int(Purpose.RECOVER), BLOCK=_AGAIN, num_warps=_AGAIN_WARPS,
    )  # fmt: skip
    recovery.settle[(requests,)](
        params.temperature, starts, stops, again, overlaps, best, best_at, verdicts.tokens, verdicts.residual, splits,
        num_warps=1,
    )  # fmt: skip


def _empty_verdicts(logits: torch.Tensor, requests: int, top_k: int, residual: bool) -> Verdicts:
    rows = len(logits)

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return logits.new_empty(shape, dtype=dtype)

    return Verdicts(
        new(requests, dtype=torch.int32), new(requests, dtype=torch.int64), new(requests, dtype=torch.bool),
        new(rows, dtype=torch.int64), new(rows, dtype=torch.float32), new(rows, top_k, dtype=torch.int32),
        new(rows, top_k, dtype=torch.float16), new(rows, dtype=torch.float32),
        new(rows, dtype=torch.float32) if residual else None,
    )  # fmt: skip


def _nothing(verdicts: Verdicts) -> Verdicts:
    """Fill in what no program writes where there is no row, or none that a request owns."""
    for tensor, value in (
        (verdicts.accepted, 0), (verdicts.tokens, -1), (verdicts.finite, True), (verdicts.said, -1),
        (verdicts.logprobs, 0.0), (verdicts.topk_ids, 0), (verdicts.topk_logprobs, -torch.inf), (verdicts.tail, 1.0),
        (verdicts.residual, 0.0),
    ):  # fmt: skip
        if tensor is not None:
            tensor.fill_(value)
    return verdicts


def _check_logits(name: str, logits: torch.Tensor) -> None:
    if logits.dtype not in _LOW:
        raise ValueError(f"{name} is {logits.dtype}; it must be bfloat16, float16 or float32")
    if logits.dim() != 2 or logits.shape[1] < 1 or logits.stride(1) != 1:
        raise ValueError(
            f"{name} has the shape {list(logits.shape)} and strides {list(logits.stride())}; it must be [rows, vocab] "
            "with contiguous rows"
        )


def _check_vector(name: str, vector: torch.Tensor | None, length: int, dtype: torch.dtype) -> None:
    if vector is None:
        return
    if vector.shape != (length,) or vector.dtype != dtype or not vector.is_contiguous():
        raise ValueError(
            f"{name} is {vector.dtype} {list(vector.shape)}, strides {list(vector.stride())}; it must be contiguous "
            f"{dtype} [{length}]"
        )


def _check_rows(params: RowParams, borders: torch.Tensor | None, rows: int) -> None:
    _check_vector("temperature", params.temperature, rows, torch.float32)
    _check_vector("seeds", params.seeds, rows, torch.int64)
    _check_vector("positions", params.positions, rows, torch.int64)
    _check_vector("borders", borders, rows, torch.float32)


def _check_verify(
    logits: torch.Tensor, params: RowParams, starts: torch.Tensor, drafted: torch.Tensor, coupling: str,
    borders: torch.Tensor | None, draft_logits: torch.Tensor | None, draft_borders: torch.Tensor | None, top_k: int,
) -> None:  # fmt: skip
    _check_logits("logits", logits)
    check_request(logits, coupling, draft_logits, top_k)
    if top_k > _MOST_RECORDED:
        raise ValueError(f"top_k is {top_k}; it must be at most {_MOST_RECORDED}")
    if draft_logits is not None:
        _check_logits("draft_logits", draft_logits)
    _check_rows(params, borders, len(logits))
    _check_vector("draft_borders", draft_borders, len(logits), torch.float32)
    _check_vector("drafted", drafted, len(logits), torch.int32)
    _check_vector("starts", starts, len(starts), torch.int32)
    if not len(starts):
        raise ValueError("starts is empty; it must hold one more number than there are requests")


def cases() -> list[Case]:
    """Name the specialisations that real models use; the kernels lie in the modules this one calls."""
    return [*stream_cases(), *records.cases(), *recovery.cases()]
