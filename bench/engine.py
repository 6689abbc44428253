"""Measure the engine: no speculation, fixed draft lengths and the adaptive controller, against transformers.

    python -m bench.engine --json FILE [--minutes 25] [--widen 1,2] [--batches 1,2,4,8,16] ...

Every window decodes with a full batch and delivers the same number of tokens; arms follow each other in
every repeat.  No prefix and no remembered output crosses from one window to another.  Progress goes to
standard error.  How to read the result is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from adapter.models import prepare_pair
from adapter.pairs import Pair
from adapter.settings import load_settings
from bench.budget import Budget
from bench.environment import environment
from bench.library import ASSISTANT_TOKENS
from bench.options import SAMPLED, Options
from bench.phases import Phases
from bench.program import names, numbers, parser, run, say
from bench.rows import Row, ratios
from bench.vllm_arm import ARMS as VLLM_ARMS
from bench.widen import widened_pair
from bench.workloads import RAG, WORKLOADS, load_texts


def measure(options: Options) -> dict[str, Any]:
    """Run everything that was asked for and return the result.

    Raises:
        SettingsError: what was asked for does not exist or does not fit.
    """
    options.check()
    began_s, where = time.monotonic(), environment()  # of the code that runs, whatever is committed meanwhile
    settings = load_settings(
        target=options.target, draft=options.draft, dtype=options.dtype, cache_dir=options.cache_dir
    )
    pair = prepare_pair(settings)
    texts = load_texts(options.data) if options.data else None
    budget = Budget(options.minutes * 60, _weights(options), say)
    rows: list[Row] = []
    vllm: str | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name in budget.weights:
            with ExitStack() as stack:
                times = int(name.rsplit("-", 1)[1])
                pair_of = _pair_settings(pair, times, settings.cache_dir / "bench")
                phases = Phases(options, pair.target_name, times, pair_of, Path(folder) / name, texts, stack)
                until_s = budget.share(name)
                say(f"{name}: loading and warming up, {time.monotonic() - began_s:.0f} s since the start")
                rows += budget.run(name, phases.groups(name.rsplit("-", 1)[0]), options.repeats, until_s)
                vllm = vllm or phases.vllm_version
            gc.collect()  # the next phase needs the memory of this one's models
    result = _result(options, pair, rows, budget, time.monotonic() - began_s) | where
    if vllm is not None:
        result["versions"]["vllm"] = vllm
        result["vllm"] = {arm: {"speculative_config": config} for arm, config in VLLM_ARMS.items()}
    return result


def _weights(options: Options) -> dict[str, float]:
    """Name every phase and say how long it takes compared to the others."""
    weights = {}
    arms, narrow = len(options.arms), min(options.widen)
    for times in options.widen:
        if main := [name for name in options.workloads if name in WORKLOADS]:
            weights[f"main-{times}"] = len(main) * len(options.batches) * arms * times
    if SAMPLED in options.workloads:
        weights[f"{SAMPLED}-{narrow}"] = 4.0 * arms * narrow
    if RAG in options.workloads:
        weights[f"{RAG}-{narrow}"] = 16.0 * narrow
    return weights


def _pair_settings(pair: Pair, times: int, folder: Path) -> dict[str, str]:
    """Return the settings that serve the pair with its target widened."""
    if times == 1:
        return {"target": pair.target_path, "draft": pair.draft_path or "none"}
    say(f"widening the target {times} times into {folder}")
    target, draft = widened_pair(pair, times, folder)
    return {"target": str(target), "draft": str(draft or "none")}


def _result(options: Options, pair: Pair, rows: list[Row], budget: Budget, seconds: float) -> dict[str, Any]:
    return {
        "what": "decoding speed, tokens of all requests together a second; window: a full batch in steady decode",
        "target": pair.target_name, "draft": pair.draft_kind, "dtype": pair.dtype,
        "rivals_dtype": options.rivals_dtype, "tokens": options.tokens,
        "asked": {
            "widen": options.widen, "batches": options.batches, "workloads": options.workloads, "arms": options.arms,
            "repeats": options.repeats, "minutes": options.minutes, "seed": options.seed,
            "prompts": "given" if options.data else "made up",
        },
        "hf_assisted": {"num_assistant_tokens": ASSISTANT_TOKENS, "num_assistant_tokens_schedule": "constant"},
        "phases": budget.phases, "seconds": round(seconds, 1),
        "rows": [row.report() for row in rows], "ratios": ratios(rows),
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    default = Options()
    made = parser(__doc__, default)
    made.add_argument("--widen", type=numbers, default=default.widen, help="times the target is widened: 1,2")
    made.add_argument("--batches", type=numbers, default=default.batches, help="requests at once: 1,2,4,8,16")
    made.add_argument("--workloads", type=names, default=default.workloads, help=",".join(default.workloads))
    made.add_argument("--arms", type=names, default=default.arms, help=",".join(default.arms))
    made.add_argument("--repeats", type=int, default=default.repeats, help="runs of every window, time allowing")
    made.add_argument("--tokens", type=int, default=default.tokens, help="measured tokens a request and window")
    made.add_argument("--minutes", type=float, default=default.minutes, help="repeats are cut to stay within")
    made.add_argument("--max-prompt-tokens", type=int, default=default.max_prompt_tokens)
    made.add_argument("--seed", type=int, default=default.seed)
    made.add_argument("--data", type=Path, help="folder of .jsonl files whose `prompt` fields are used")
    made.add_argument(
        "--rivals-dtype", default=default.rivals_dtype, choices=("float32", "bfloat16"), help="of hf_* and vllm*"
    )
    made.add_argument("--vllm-python", help=f"python of an environment with vllm; adds the arms {', '.join(VLLM_ARMS)}")
    return made


def main() -> int:
    """Measure and write the result."""
    return run("bench.engine", _parser(), lambda given: measure(Options(**given)))


if __name__ == "__main__":
    sys.exit(main())
