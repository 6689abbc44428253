"""Return what the real pair costs here: measured before it serves, or kept from an earlier start."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from adapter.pairs import Pair
from adapter.settings import Settings
from serving.engine.control.cost_file import fingerprint_of, load_or_measure
from serving.engine.control.cost_table import CostTable
from serving.engine.control.measuring import Timers, host_timers, measure_costs, outdated
from serving.engine.runner import ModelRunner

_LONG_CONTEXT = 512


def cost_table(
    settings: Settings, pair: Pair, target: ModelRunner, draft: ModelRunner | None, timers: Timers | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> CostTable:  # fmt: skip
    """Return the costs of this pair on this machine, measured now or kept from an earlier start.

    `timers` run the forwards; None runs those of the two runners.
    """
    fingerprint = fingerprint_of(
        {"machine": machine_facts(), "device": target.model.device.type, **_pair_facts(settings, pair, target, draft),
         "programs": timers is not None}
    )  # fmt: skip
    spread = settings.engine.max_batch
    runs = timers or host_timers(target, draft, spread, clock, at_once=settings.engine.coupling == "gumbel")

    def measure() -> CostTable:
        return measure_costs(
            runs, fingerprint, most_rows=spread * (settings.engine.gamma_max + 1), most_requests=spread,
            context=min(_LONG_CONTEXT, settings.engine.max_model_len // 2), clock=clock,
        )  # fmt: skip

    return load_or_measure(settings.cache_dir / "costs", fingerprint, measure, lambda table: outdated(runs, table))


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
        "draft_int8": engine.draft_int8, "compiled": target.forwards.compiled, "coupling": engine.coupling,
        "draftsmith": metadata.version("draftsmith"),
    }  # fmt: skip


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()
