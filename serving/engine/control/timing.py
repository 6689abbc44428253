"""Time the real pair before it serves: forwards on block 0, which no request ever gets, and long contexts on others.

Includes shaping and choosing tokens, since a step pays for them by the row as well.  Called by `build`, while
nobody runs; leaves all blocks as empty as they were.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from adapter.contracts import Sampling
from adapter.pairs import Pair
from adapter.settings import Settings
from kernels.sampling import draw, shape_logits
from serving.engine.control.cost_file import fingerprint_of, load_or_measure
from serving.engine.control.cost_table import CostTable, Measure, beaten, measure_curve
from serving.engine.parameters import row_params
from serving.engine.runner import ModelRunner
from serving.engine.work import Work

_BUDGET_S = {"target": 4.0, "draft": 2.0}
_LONG_CONTEXT = 512
_READ = 64  # tokens read at once, to know what a token of backlog costs
_ROUND = 4  # rows a request has in a timed target forward: about what verification gives it
_GREEDY, _SAMPLED = Sampling(temperature=0.0), Sampling(temperature=0.8, seed=1)
_DRAWN = 4  # rows drawn from, to know what one costs


def cost_table(
    settings: Settings, pair: Pair, target: ModelRunner, draft: ModelRunner | None,
    clock: Callable[[], float] = time.perf_counter,
) -> CostTable:  # fmt: skip
    """Return the costs of this pair on this machine, measured now or kept from an earlier start."""
    fingerprint = fingerprint_of({"machine": machine_facts(), **_pair_facts(settings, pair, target, draft)})

    spread = settings.engine.max_batch
    verify = timer(target, _ROUND, spread, clock)

    def measure() -> CostTable:
        begin = clock()
        most = spread * (settings.engine.gamma_max + 1)
        context = min(_LONG_CONTEXT, settings.engine.max_model_len // 2)
        curve, settled = measure_curve(verify, most, budget_s=_BUDGET_S["target"], long_context=context)
        drafting, read_s = None, 0.0
        if draft is not None:
            run = timer(draft, 1, spread, clock)
            drafting, steady = measure_curve(run, max(2, spread), budget_s=_BUDGET_S["draft"], long_context=context)
            settled = settled and steady
            long = timer(draft, 1, 1, clock)
            read_s = max(0.0, min(long(_READ, 0) for _ in range(3)) - drafting.seconds[0]) / (_READ - 1)
            read_s = min(read_s, drafting.seconds[0])
        drawn = timer(target, _ROUND, spread, clock, _SAMPLED)
        sample_s = max(0.0, min(drawn(_DRAWN, 0) for _ in range(3)) - curve.at(_DRAWN)) / _DRAWN
        return CostTable(fingerprint, curve, drafting, read_s, sample_s, clock() - begin, settled)

    def outdated(table: CostTable) -> bool:
        return beaten(table.target, verify) or (
            draft is not None and table.draft is not None and beaten(table.draft, timer(draft, 1, spread, clock))
        )

    return load_or_measure(settings.cache_dir / "costs", fingerprint, measure, outdated)


def timer(
    runner: ModelRunner, rows_each: int, most_requests: int, clock: Callable[[], float], sampling: Sampling = _GREEDY
) -> Measure:
    """Return a callable that runs one forward and returns its seconds.

    Rows are shared out to requests of `rows_each`, then evenly to at most `most_requests`.  A model
    that scores one row a request, as a draft does, has rows_each 1.
    """
    block_tokens, vocab = runner.pool.block_tokens, runner.model.config.vocab_size

    def run(rows: int, context_tokens: int) -> float:
        requests = max(1, min(-(-rows // rows_each), most_requests))
        read = list(range(-(-(context_tokens + rows) // block_tokens))) if context_tokens else []
        if read:
            runner.pool.clear(read)  # memory that was never written is one page, and that stays in the CPU's caches
            runner.forward([Work([0], 0, [0], 1)])  # drives what was just written out of them, as weights do in a step
        work = []
        for i in range(requests):
            count = rows // requests + (i < rows % requests)
            table = read or [0] * (-(-count // block_tokens))
            tokens = [(i + j) * 7919 % vocab for j in range(count)]
            work.append(Work(table, context_tokens, tokens, 1 if rows_each == 1 else count))
        scored = sum(item.num_logits for item in work)
        params = row_params([sampling] * scored, [context_tokens] * scored)
        begin = clock()
        with torch.inference_mode():
            draw(shape_logits(runner.forward(work), params), params).tolist()
        seconds = clock() - begin
        runner.pool.clear(read or [0])
        return max(seconds, 1e-9)

    return run


def machine_facts() -> dict[str, object]:
    """Return what makes one machine time differently from another."""
    return {
        "cpu": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "waiting": os.environ.get("OMP_WAIT_POLICY"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip


def _pair_facts(settings: Settings, pair: Pair, target: ModelRunner, draft: ModelRunner | None) -> dict[str, object]:
    engine = settings.engine
    return {
        "target": pair.target_fingerprint, "base": pair.base_fingerprint if draft else None, "dtype": pair.dtype,
        "draft_dtype": str(draft.pool.dtype) if draft else None, "draft_vocab_size": engine.draft_vocab_size,
        "max_batch": engine.max_batch, "gamma_max": engine.gamma_max, "block_tokens": engine.block_tokens,
        "max_model_len": engine.max_model_len, "lean": engine.lean, "pack": engine.pack,
        "draft_int8": engine.draft_int8, "compiled": target.forwards.compiled,
        "draftsmith": metadata.version("draftsmith"),
    }  # fmt: skip


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()
