"""Time forwards: of the host's own runners on block 0, which no request ever gets, or of whatever else runs them.

Includes shaping and choosing tokens, since a step pays for them by the row as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adapter.contracts import Sampling
from kernels.sampling import draw, shape_logits
from serving.engine.control.cost_table import CostTable, Measure, beaten, measure_curve
from serving.engine.parameters import row_params
from serving.engine.proposers.draft_loop import DraftLoop
from serving.engine.runner import ModelRunner
from serving.engine.work import Work

ROUND = 4  # rows a request has in a timed target forward: about what verification gives it
_BUDGET_S = {"target": 4.0, "draft": 2.0}
_READ = 64  # tokens read at once, to know what a token of backlog costs
_DEPTH = 2  # tokens a timed round drafts at once: a round costs more than its second token, and most have few
_GREEDY, _SAMPLED = Sampling(temperature=0.0), Sampling(temperature=0.8, seed=1)
_DRAWN = 4  # rows drawn from, to know what one costs


@dataclass(frozen=True, slots=True)
class Timers:
    """What runs a forward of so many rows at so much context and says its seconds.

    `target` verifies greedy rows and `sampled` rows with a temperature, None where that costs the same; `draft`
    scores a row a request and `read` only reads, None where there is no draft model.
    """

    target: Measure
    sampled: Measure | None = None
    draft: Measure | None = None
    read: Measure | None = None


def host_timers(
    target: ModelRunner, draft: ModelRunner | None, most_requests: int,
    clock: Callable[[], float] = time.perf_counter, *, at_once: bool = False,
) -> Timers:  # fmt: skip
    """Time the forwards of runners, and waiting for them; `at_once`: the draft's in its loop, where that covers it."""
    loop = DraftLoop(draft, draft.model.config.vocab_size) if draft is not None and at_once else None
    return Timers(
        timer(target, ROUND, most_requests, clock), timer(target, ROUND, most_requests, clock, _SAMPLED),
        None if draft is None else timer(draft, 1, most_requests, clock, loop=loop),
        None if draft is None else timer(draft, 1, 1, clock, loop=loop),
    )  # fmt: skip


def measure_costs(
    timers: Timers, fingerprint: str, *, most_rows: int, most_requests: int, context: int,
    clock: Callable[[], float] = time.perf_counter,
) -> CostTable:  # fmt: skip
    """Measure what a pair costs, up to `most_rows` rows of the target and at `context` tokens of context."""
    begin = clock()
    curve, settled = measure_curve(timers.target, most_rows, budget_s=_BUDGET_S["target"], long_context=context)
    drafting, read_s = None, 0.0
    if timers.draft is not None and timers.read is not None:
        drafting, steady = measure_curve(
            timers.draft, max(2, most_requests), budget_s=_BUDGET_S["draft"], long_context=context
        )
        settled = settled and steady
        read = timers.read
        read_s = max(0.0, min(read(_READ, 0) for _ in range(3)) - drafting.seconds[0]) / (_READ - 1)
        read_s = min(read_s, drafting.seconds[0])
    sample_s = 0.0
    if timers.sampled is not None:
        sampled = timers.sampled
        sample_s = max(0.0, min(sampled(_DRAWN, 0) for _ in range(3)) - curve.at(_DRAWN)) / _DRAWN
    return CostTable(fingerprint, curve, drafting, read_s, sample_s, clock() - begin, settled)


def outdated(timers: Timers, table: CostTable) -> bool:
    """Whether forwards are clearly faster now than a kept table says."""
    drafts = timers.draft is not None and table.draft is not None
    return beaten(table.target, timers.target) or (
        drafts and beaten(table.draft, timers.draft)  # type: ignore[arg-type]
    )


def timer(
    runner: ModelRunner,
    rows_each: int,
    most_requests: int,
    clock: Callable[[], float] = time.perf_counter,
    sampling: Sampling = _GREEDY,
    loop: DraftLoop | None = None,
) -> Measure:
    """Return a callable that runs one forward and returns its seconds; with `loop`, of rounds that it drafts.

    Rows are shared out to requests of `rows_each`, then evenly to at most `most_requests`.  A model
    that scores one row a request, as a draft does, has rows_each 1.
    """
    block_tokens, vocab = runner.pool.block_tokens, runner.model.config.vocab_size

    def run(rows: int, context_tokens: int) -> float:
        requests = max(1, min(-(-rows // rows_each), most_requests))
        read = list(range(-(-(context_tokens + rows + _DEPTH) // block_tokens))) if context_tokens else []
        if read:
            runner.pool.clear(read)  # memory that was never written is one page, and that stays in the CPU's caches
            runner.forward([Work([0], 0, [0], 1)])  # drives what was just written out of them, as weights do in a step
        work = []
        for i in range(requests):
            count = rows // requests + (i < rows % requests)
            table = read or [0] * (-(-(count + _DEPTH) // block_tokens))
            tokens = [(i + j) * 7919 % vocab for j in range(count)]
            work.append(Work(table, context_tokens, tokens, 1 if rows_each == 1 else count))
        seconds = None if loop is None else _drafting_s(loop, work, sampling, runner.model, clock)
        if seconds is None:
            seconds = _forward_s(runner, work, sampling, clock)
        runner.pool.clear(read or [0])
        return max(seconds, 1e-9)

    return run


def _forward_s(runner: ModelRunner, work: list[Work], sampling: Sampling, clock: Callable[[], float]) -> float:
    """Seconds of one forward, and of drawing from its rows."""
    scored = sum(item.num_logits for item in work)
    params = row_params([sampling] * scored, [work[0].start] * scored)
    begin = clock()
    with torch.inference_mode():
        draw(shape_logits(runner.forward(work), params), params).tolist()
    return clock() - begin


def _drafting_s(
    loop: DraftLoop, work: list[Work], sampling: Sampling, model: Any, clock: Callable[[], float]
) -> float | None:  # fmt: skip
    """Seconds of a forward within a round that is drafted at once; None where it is not."""
    depth = _DEPTH if all(len(item.token_ids) == 1 for item in work) else 1  # more are a backlog, read once
    begin = clock()
    if loop.run(work, [depth] * len(work), [sampling] * len(work), model) is None:
        return None
    return (clock() - begin) / depth
