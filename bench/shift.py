"""What learning brings when traffic changes: a live service under open-loop arrivals, with and without it.

    python -m bench.shift --json FILE [--scenario NAME ...] [--arms NAME ...] [--prompts FILE] [--segments A,B]
                          [--minutes 60] [--rate R] [--seed N] [--keep DIR] [--quick]

Every arm of a scenario is a fresh service that gets the same requests at the same times.  The file is written
after every arm, so a run that is cut keeps what it has; a picture of each scenario lies beside it.  An hour
holds one scenario with all arms well.  `--quick` is a smoke run of about a minute on a tiny random pair.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import structlog

from adapter.contracts import DraftsmithError, SettingsError
from bench import plot_shift
from bench.environment import command, environment
from bench.shift_arms import Run, prepare, run_arm
from bench.shift_figures import figures, timeline
from bench.shift_options import QUICK_S, Plan, make_plan, read_arguments
from bench.shift_schedule import Arrival, Period, Scenario, schedule
from bench.shift_table import table
from bench.shift_targets import CYCLES, targets

_WARM_UP_S = 60.0
_AROUND_S = 25.0  # to start and stop a service
_LEAST_S = 45.0  # of traffic an arm needs
_PACE_REQUESTS = 40
_LOAD = 0.5  # of what the service can do, that arrives
_ORDER = ("static", "oracle", "adaptive", "none", "suffix")  # what is compared with comes first


class Bench:
    """A run of all scenarios and arms.

    Args:
        folder: where data folders lie while they are needed.
        result: what is written as JSON; filled in place.
    """

    def __init__(self, plan: Plan, folder: Path, json_file: Path, result: dict[str, Any]) -> None:
        self.plan, self.folder, self.json_file, self.result = plan, folder, json_file, result
        self.began = time.monotonic()
        self._oracles: dict[tuple[str, ...], Path | None] = {}
        self._rate = plan.rate

    def run(self) -> None:
        """Run everything; a failed arm is noted and the rest goes on.

        Raises:
            SettingsError: there is too little time for so many arms.
        """
        self._check_time()
        self._prepare()
        seconds = max(self._seconds_of_an_arm(), QUICK_S if self.plan.quick else _LEAST_S)
        self.result["seconds_an_arm"], self.result["rate"] = round(seconds, 1), round(self.rate, 3)
        self.say(f"{len(self.plan.scenarios)} scenarios of {len(self.plan.arms)} arms, {seconds:.0f} s each, "
                 f"{self.rate:.2f} requests a second")  # fmt: skip
        for scenario in self.plan.scenarios:
            self._scenario(scenario, seconds)

    @property
    def rate(self) -> float:
        """Arrivals a second."""
        assert self._rate is not None
        return self._rate

    def say(self, words: str) -> None:
        """Tell what happens, on stderr."""
        seconds = int(time.monotonic() - self.began)
        print(f"{seconds // 60:3d}:{seconds % 60:02d}  {words}", file=sys.stderr, flush=True)

    def _prepare(self) -> None:
        """Train the oracles' drafts, and find the rate where none was given."""
        wanted = {item.oracle_on for item in self.plan.scenarios if "oracle" in self.plan.arms or item.cycles}
        for parts in sorted(wanted):
            self._oracle(parts)
        if self._rate is None:
            arrivals = self._learning(("a", "b"), _PACE_REQUESTS)
            pace, _ = prepare(arrivals, self.plan.rig, self.folder / "pace", self.say, train=False)
            self._rate = _LOAD * pace

    def _oracle(self, parts: tuple[str, ...]) -> None:
        rig, folder = self.plan.rig, self.folder / f"oracle-{'-'.join(parts)}"
        self.say(f"serving {rig.oracle_requests} requests of {' and '.join(parts)} for the oracle")
        noted = self.result["oracle_trainings"]
        try:
            arrivals = self._learning(parts, rig.oracle_requests)
            pace, job = prepare(arrivals, rig, folder, self.say, train=True)
        except DraftsmithError as error:
            self._oracles[parts] = None
            noted["-".join(parts)] = {"failed": str(error)}
            self.say(f"no oracle: {error}")
            return
        self._oracles[parts] = folder
        self._rate = self._rate or _LOAD * pace
        noted["-".join(parts)] = {"failed": None, "requests": len(arrivals), "result": job.result if job else None}

    def _learning(self, parts: tuple[str, ...], count: int) -> list[Arrival]:
        """Return so many requests of learning prompts; nothing measures."""
        share = ("b" in parts) / len(parts)
        only = Scenario(name="learning", about="", periods=(Period(1, share, share),))
        made = schedule(only, self.plan.segments, rate=1.0, seconds=2.0 * count + 100, seed=self.plan.seed,
                        warm_up_s=float("inf"), heat=self.plan.rig.heat)  # fmt: skip
        return made[:count]

    def _check_time(self) -> None:
        """Refuse a plan that cannot fit, before anything is started.

        Raises:
            SettingsError: an arm would get less traffic than it needs.
        """
        seconds = self._seconds_of_an_arm()
        if not self.plan.quick and seconds < _LEAST_S:
            raise SettingsError(
                f"--minutes {self.plan.minutes:g} leaves {max(0.0, seconds):.0f} s of traffic for each of "
                f"{self._num_runs} arms; {_LEAST_S:.0f} s are needed. Choose fewer with --scenario and --arms, or more "
                "minutes"
            )

    def _seconds_of_an_arm(self) -> float:
        """Return how long traffic is sent to an arm, of the time that is left."""
        left = 60 * self.plan.minutes - (time.monotonic() - self.began)
        return QUICK_S if self.plan.quick else left / self._num_runs - _AROUND_S

    @property
    def _num_runs(self) -> int:
        return len(self.plan.scenarios) * len(self.plan.arms)

    def _scenario(self, scenario: Scenario, seconds: float) -> None:
        warm_up = min(_WARM_UP_S, 0.1 * seconds)
        arrivals = schedule(scenario, self.plan.segments, rate=self.rate, seconds=seconds, seed=self.plan.seed,
                            warm_up_s=warm_up, heat=self.plan.rig.heat)  # fmt: skip
        runs: dict[str, Run] = {}
        failed: dict[str, str] = {}
        for arm in sorted(self.plan.arms, key=_ORDER.index):
            self.say(f"{scenario.name}, {arm}: {len(arrivals)} requests in {seconds:.0f} s")
            try:
                runs[arm] = self._arm(scenario, arm, arrivals)
            except DraftsmithError as error:
                failed[arm] = str(error)
                self.say(f"{scenario.name}, {arm}: {error}")
            found = figures(scenario, runs, seconds)
            self.result["scenarios"][scenario.name] = found
            self.result["timelines"][scenario.name] = timeline(scenario, seconds)
            self.result["targets"][scenario.name] = targets(scenario.name, found)
            self.result["arms_failed"][scenario.name] = dict(failed)
            self._write()
        if runs:
            plot_shift.draw(self.result, scenario.name, plot_shift.picture(self.json_file, scenario.name))

    def _arm(self, scenario: Scenario, arm: str, arrivals: list[Arrival]) -> Run:
        trained = self._oracles.get(scenario.oracle_on)
        wants = arm == "oracle" or (scenario.cycles and arm == "adaptive")
        if wants and trained is None:
            raise DraftsmithError("there is no draft of the oracle; `oracle_trainings` says why")
        folder = self.folder / f"{scenario.name}-{arm}"
        trainings = CYCLES if scenario.cycles and arm == "adaptive" else 0
        try:
            return run_arm(arm, arrivals, self.plan.rig, folder, self.say, begin=trained if wants else None,
                           trainings=trainings)  # fmt: skip
        finally:
            if not self.result["kept"]:
                shutil.rmtree(folder, ignore_errors=True)

    def _write(self) -> None:
        self.result["wall_seconds"] = round(time.monotonic() - self.began, 1)
        write(self.json_file, self.result)


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the document, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def empty_result(plan: Plan, arguments: list[str], kept: bool) -> dict[str, Any]:
    """Return the document before anything was measured."""
    a, b = plan.segments
    settings = plan.rig.settings.model_dump(mode="json")
    return {
        **environment(), "command": command("bench.shift", arguments), "kept": kept, "seed": plan.seed,
        "segments": {part: {"name": item.name, "learning": len(item.learning), "measuring": len(item.measuring)}
                     for part, item in (("a", a), ("b", b))},
        "max_tokens": plan.rig.max_tokens, "rate": None, "seconds_an_arm": None,
        "settings": {name: settings[name] for name in ("engine", "distill", "monitors", "dtype")},
        "oracle_trainings": {}, "scenarios": {}, "timelines": {}, "targets": {}, "arms_failed": {},
        "failed": None, "wall_seconds": None,
    }  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """Run from the command line; exit 2 when what was asked for cannot be run, 1 when an arm failed."""
    words = sys.argv[1:] if words is None else words
    arguments = read_arguments(words)
    signal.signal(signal.SIGTERM, _interrupt)
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="ds-shift-"))
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    try:
        plan = make_plan(arguments, folder)
        result = empty_result(plan, words, arguments.keep is not None)
        with (folder / "bench.log").open("a") as file:
            structlog.configure(logger_factory=structlog.WriteLoggerFactory(file=file))
            Bench(plan, folder, arguments.json, result).run()
    except (DraftsmithError, KeyboardInterrupt) as error:
        reason = str(error) or "it was interrupted"
        print(f"error: {reason}", file=sys.stderr)
        if result.get("scenarios"):
            write(arguments.json, result | {"failed": reason})
        return 2 if isinstance(error, SettingsError) else 1
    finally:
        structlog.reset_defaults()
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(table(result))
    return int(any(result["arms_failed"].values()))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
