"""Measure what logging costs: the same requests with the recorder on and off, in turn.

    python -m bench.record --json FILE [--batches 1,8] [--pairs 12]

The log goes to a Valkey of its own, started for the run.  Requests, text and batches are the same in every
window, so step i of one is step i of all: the cost is the sum over steps of the median time with logging,
divided by that without, and its interval comes from drawing windows again.  Progress goes to standard error.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapter.contracts import DraftsmithError
from adapter.settings import Settings, load_settings
from adapter.streams import connect, wait_until_up
from bench.driver import Load, Window
from bench.environment import environment
from bench.options import SEED, PairOptions
from bench.program import numbers, parser, run, say
from bench.served import Served, Tokens
from bench.workloads import prompts
from serving.engine.recorder import Recorder
from serving.valkey import valkey_command

ARM = "fixed-3"
_START_S = 20.0
_DRAIN_S = 10.0
_WAVES = 2  # requests are twice as many as run at once, so that records are written while others decode
_DRAWS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(PairOptions):
    """What is measured and how often."""

    batches: tuple[int, ...] = (1, 8)
    pairs: int = 12
    tokens: int = 48
    max_prompt_tokens: int = 400


def measure(options: Options) -> dict[str, Any]:
    """Run every batch size and return the result."""
    rows, where = [], environment()  # of the code that runs, whatever is committed meanwhile
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder)
        pair = {"target": options.target, "draft": options.draft, "dtype": options.dtype}
        settings = load_settings(data_dir=data_dir, cache_dir=options.cache_dir, redis_url=None, **pair)
        room = options.max_prompt_tokens + 2 * options.tokens
        section = {"max_batch": max(options.batches), "max_model_len": room}
        own = settings.model_copy(update={"redis_url": None})
        with (
            valkey(own) as url,
            Served(data_dir, section, cache_dir=options.cache_dir, redis_url=url, **pair) as served,
        ):
            served.use(ARM)
            tokens = Tokens(Path(served.pair.target_path), options.max_prompt_tokens)
            rows = [_row(served, tokens, batch, options) for batch in options.batches]
    return {
        "what": "cost of logging: time of the same steps with the recorder on, divided by that with it off, less 1",
        "target": served.pair.target_name, "dtype": options.dtype, "arm": ARM, "tokens": options.tokens, "rows": rows,
    } | where  # fmt: skip


@contextmanager
def valkey(settings: Settings) -> Iterator[str]:
    """Run the bundled server as a deployment does and yield its URL."""
    settings.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    process = subprocess.Popen(valkey_command(settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if not wait_until_up(connect(settings.redis, 1.0), _START_S):
            raise DraftsmithError(f"the bundled Valkey did not answer on {settings.redis} within {_START_S:g} s")
        yield settings.redis
    finally:
        process.terminate()
        process.wait()


def _row(served: Served, tokens: Tokens, batch: int, options: Options) -> dict[str, Any]:
    recorders = {True: _recorder(served, enabled=True), False: _recorder(served, enabled=False)}
    ids = tokens(prompts("mixed", batch * _WAVES, SEED))
    lengths = [options.tokens + 8 * (index % 3) for index in range(len(ids))]  # they do not all end at once
    windows: dict[bool, list[Window]] = {True: [], False: []}
    drains_s = []
    for number in range(options.pairs + 1):  # the first pair warms up
        for enabled in (True, False) if number % 2 else (False, True):
            served.engine.recorder = recorders[enabled]
            load = Load(ids, "bench-record", f"{batch}-{number}-{enabled}")
            window = served.burst(ARM, load, lengths, batch)
            drains_s.append(_drain(served))
            if number:
                windows[enabled].append(window)
        say(f"record: batch {batch}, pair {number} of {options.pairs}")
    stats = served.built.publisher.stats()
    return {
        "batch": batch, "pairs": options.pairs, **cost(windows[True], windows[False]),
        "tokens_per_s_on": round(float(np.median([window.tokens_per_s for window in windows[True]])), 3),
        "tokens_per_s_off": round(float(np.median([window.tokens_per_s for window in windows[False]])), 3),
        "entries_written": stats.written, "entries_dropped": stats.dropped,
        "drain_ms_max": round(max(drains_s) * 1e3, 1),
    }  # fmt: skip


def cost(on: list[Window], off: list[Window]) -> dict[str, Any]:
    """Return the relative cost with its 90 % interval, by steps and by whole windows.

    A step's median leaves out what other programs did in single windows, and with it the publisher's
    thread where it hits another step each time; whole windows have both.
    """
    found: dict[str, Any] = {}
    if len({len(window.steps_s) for window in (*on, *off)}) == 1:
        found |= _interval("", [np.array([window.steps_s for window in part]) for part in (on, off)])
    return found | _interval("windows_", [np.array([[window.seconds] for window in part]) for part in (on, off)])


def _interval(prefix: str, table: list[np.ndarray]) -> dict[str, float]:
    count = len(table[0])

    def relative(chosen: np.ndarray) -> float:
        first, second = (np.median(part[chosen], axis=0).sum() for part in table)
        return float(first / second - 1)

    generator = np.random.default_rng(SEED)
    low, high = np.percentile([relative(generator.integers(0, count, count)) for _ in range(_DRAWS)], [5, 95])
    values = {"cost": relative(np.arange(count)), "low": float(low), "high": float(high)}
    return {prefix + name: round(value, 5) for name, value in values.items()}


def _recorder(served: Served, *, enabled: bool) -> Recorder:
    section = served.settings.log.model_copy(update={"enabled": enabled})
    return Recorder(
        served.built.publisher, section, target_fingerprint=served.pair.target_fingerprint,
        coupling=served.settings.engine.coupling,
    )  # fmt: skip


def _drain(served: Served) -> float:
    """Wait until everything offered is written, so that no window pays for another; return the seconds."""
    begin_s = time.perf_counter()
    while time.perf_counter() - begin_s < _DRAIN_S:
        stats = served.built.publisher.stats()
        if stats.written + stats.dropped >= stats.offered:
            break
        time.sleep(0.001)
    return time.perf_counter() - begin_s


def main() -> int:
    """Measure and write the result."""
    default = Options()
    arguments = parser(__doc__, default)
    arguments.add_argument("--batches", type=numbers, default=default.batches, help="requests at once: 1,8")
    arguments.add_argument("--pairs", type=int, default=default.pairs, help="windows with and without logging")
    arguments.add_argument("--tokens", type=int, default=default.tokens, help="tokens of an answer")
    return run("bench.record", arguments, lambda given: measure(Options(**given)))


if __name__ == "__main__":
    sys.exit(main())
