"""What a run of `bench.shift` is asked for: its command line, and the plan that comes of it.

`--quick` takes a tiny pair, and settings under which it drifts, trains and swaps within half a minute.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from adapter.contracts import SettingsError
from adapter.settings import load_settings
from bench import shift_tiny
from bench.shift_arms import ARMS, Rig
from bench.shift_prompts import Segment, load_segments
from bench.shift_schedule import SCENARIOS, Heat, Scenario, scenarios_named

SEED = 20261123
_ABOUT = "What learning brings when traffic changes: a live service under open-loop arrivals."
QUICK_ARMS = ("static", "adaptive")
QUICK_SCENARIO = "abrupt"
QUICK_S, _QUICK_RATE = 30.0, 9.0
_ORACLE_SHARE = 0.12  # of the time for its requests, and again for its training
_ORACLE_REQUESTS = (80, 300)
_TINY_ENGINE = {
    "max_batch": 8, "max_model_len": 192, "kv_tokens": 2048, "block_tokens": 8, "prefill_tokens": 64, "threads": 1,
    "swap_poll_s": 0.05, "controller": "fixed",  # a tiny pair is never worth drafting for
}  # fmt: skip
_TINY_MONITORS = {
    "window_s": 0.5, "baseline_requests": 20, "drift_false_alarms_per_30_days": 1e5, "guard_min_requests": 10,
    "retrain_cooldown_s": 3600.0,
}  # fmt: skip
_TINY_DISTILL = {
    "min_requests": 30, "epochs": 6.0, "max_seconds": 30.0, "learning_rates": (3e-3,), "batch_tokens": 512,
    "rank": 8, "alpha": 16.0, "holdout_share": 0.3, "gate_min_requests": 5, "nice": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run.  `rate` None: half of what the service is measured to do."""

    scenarios: list[Scenario]
    arms: list[str]
    segments: tuple[Segment, Segment]
    rig: Rig
    rate: float | None
    minutes: float
    seed: int
    quick: bool = False


def make_plan(arguments: argparse.Namespace, folder: Path) -> Plan:
    """Turn the command line into a plan; `--quick` writes its pair into `folder`.

    Raises:
        SettingsError: something that was asked for is not there.
    """
    quick, names = arguments.quick, arguments.scenario
    arms = list(dict.fromkeys(arguments.arms or (QUICK_ARMS if quick else ARMS)))
    for arm in arms:
        if arm not in ARMS:
            raise SettingsError(f"there is no arm {arm!r}; there are {', '.join(ARMS)}")
    for name, value in (("--rate", arguments.rate), ("--minutes", arguments.minutes)):
        if value is not None and value <= 0:
            raise SettingsError(f"{name} {value:g}: it must be above 0")
    scenarios = scenarios_named(names or ([QUICK_SCENARIO] if quick else None))
    if quick:
        rig, segments = quick_rig(folder), shift_tiny.segments(arguments.seed)
    else:
        rig = Rig(
            settings=load_settings(), max_tokens=48, oracle_seconds=_ORACLE_SHARE * 60 * arguments.minutes,
            oracle_requests=int(min(_ORACLE_REQUESTS[1], max(_ORACLE_REQUESTS[0], 5 * arguments.minutes))),
        )  # fmt: skip
        segments = load_segments(arguments.prompts, _names(arguments.segments), arguments.seed)
    return Plan(
        scenarios=scenarios, arms=arms, segments=segments, rig=rig, minutes=arguments.minutes, seed=arguments.seed,
        rate=arguments.rate or (_QUICK_RATE if quick else None), quick=quick,
    )  # fmt: skip


def quick_rig(folder: Path) -> Rig:
    """Write the tiny pair and return settings under which a minute is enough to learn."""
    target, draft = shift_tiny.write_pair(folder / "pair")
    settings = load_settings(
        target=str(target), draft=str(draft), dtype="float32", engine=_TINY_ENGINE, monitors=_TINY_MONITORS,
        distill=_TINY_DISTILL,
    )  # fmt: skip
    return Rig(settings=settings, max_tokens=16, chat=False, heat=Heat(1, 1.0), oracle_requests=120)


def _names(given: str | None) -> tuple[str, str] | None:
    if given is None:
        return None
    parts = tuple(name.strip() for name in given.split(","))
    if len(parts) != 2 or not all(parts) or parts[0] == parts[1]:
        raise SettingsError(f"--segments {given!r}: give two names with a comma between, A,B")
    return parts[0], parts[1]


def read_arguments(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.shift", description=_ABOUT)
    parser.add_argument("--json", type=Path, required=True, help="write the figures here, pictures beside it")
    parser.add_argument(
        "--scenario", action="append", help=f"one of {', '.join(SCENARIOS)}; may be repeated; unset: all"
    )
    parser.add_argument("--arms", nargs="+", help=f"some of {', '.join(ARMS)}; unset: all, for --quick "
                        f"{' and '.join(QUICK_ARMS)}")  # fmt: skip
    parser.add_argument("--prompts", type=Path, help="JSON lines with `segment` and `prompt`; unset: the kept ones")
    parser.add_argument("--segments", help="A,B; unset: the two with most prompts, the shorter ones")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the whole run")
    parser.add_argument("--rate", type=float, help="arrivals a second; unset: half of what the service can do")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--keep", type=Path, help="keep data folders and logs here")
    parser.add_argument("--quick", action="store_true", help="a minute on a tiny random pair")
    return parser.parse_args(words)
