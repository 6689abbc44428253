"""The service under demonstration: its settings, its processes, and what it says about itself.

Runs the same roles as `draftsmith up`, in a folder of its own with its own Valkey and SQLite.
Called by `serving.demo.__main__` and the stages.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import msgspec

from adapter.accounting import Accounting
from adapter.contracts import DraftsmithError, SettingsError
from adapter.database import migrate, open_database
from adapter.facts import DRIFT, SERVING, SWAPS, WATCHER, Facts
from adapter.hints import announcer
from adapter.jobs import Job, Jobs
from adapter.pairs import Pair, pair_from_facts
from adapter.registry import Registry
from adapter.settings import Settings
from serving.roles import roles_for
from serving.supervisor import RoleCannotStart, Supervisor

ROLES = ["engine", "api", "worker", "watcher"]
PACE: dict[str, dict[str, Any]] = {
    "monitors": {
        "window_s": 1.0,  # a finer time axis
        "baseline_requests": 40,
        "drift_false_alarms_per_30_days": 60.0,  # two a day: less evidence is asked for
        "drift_expected_requests_per_s": 0.5,
        "evidence_requests": 100_000,  # drift is what it shows
        "retrain_cooldown_s": 3600.0,  # one training is shown; the roll back must not start another
    },
    "engine": {"controller": "fixed"},  # it shows learning: every request is drafted for, worth it or not
    "distill": {
        "min_requests": 80,
        "max_seconds": 120.0,
        "epochs": 10.0,
        "busy_share": 1.0,  # its clients never pause, so a training that yields would hardly get a turn
    },
}


def demo_settings(
    base: Settings, *, data_dir: Path, port: int = 0, **chosen: str | None
) -> tuple[Settings, dict[str, Any]]:
    """Return the demonstration's settings and, by name, what it changed: {default, demo}.

    A setting the user changed is left alone.  `chosen` may hold `draft` and `target`.

    Raises:
        SettingsError: the folder holds a deployment already, or there is no draft.
    """
    if (data_dir / "draftsmith.db").exists():
        raise SettingsError(f"{data_dir} holds a deployment; the demonstration needs a folder of its own")
    changed: dict[str, Any] = {}
    update: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    for section, wishes in PACE.items():
        given = getattr(base, section)
        defaults = type(given)()
        mine = {name: value for name, value in wishes.items() if getattr(given, name) == getattr(defaults, name)}
        update[section] = given.model_copy(update=mine)
        changed |= {f"{section}.{n}": {"default": getattr(defaults, n), "demo": value} for n, value in mine.items()}
    fixed = {
        "dtype": "float32", "data_dir": data_dir, "port": port, "dashboard_port": 0, "redis_url": None,
        "database_url": None,
    }  # fmt: skip
    settings = base.model_copy(update=update | fixed)
    if settings.draft == "none":
        raise SettingsError(
            "draft = 'none': the demonstration shows a draft that learns; leave --draft out or name one"
        )
    return settings, changed


class Service:
    """A running deployment.

    The roles end with this process, however it ends.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        for name in ("REDIS_URL", "DATABASE_URL"):  # the demonstration keeps to its own folder
            os.environ.pop(name, None)
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self._database = open_database(settings.database)
        migrate(self._database)
        self.accounting = Accounting(self._database)
        self.facts = Facts(self._database)
        self.jobs = Jobs(self._database)
        self.registry = Registry(self._database, announce=announcer(settings))
        self._supervisor = Supervisor(settings, roles_for(settings, ROLES))
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._error: DraftsmithError | None = None

    def start(self) -> None:
        """Start every process."""
        self._supervisor.start()  # on the main thread: the roles are told when the thread that started them ends
        self._thread.start()

    def stop(self) -> None:
        """Take every process down."""
        self._supervisor.stop()
        if self._thread.is_alive():
            self._thread.join()
        self._database.dispose()

    @property
    def error(self) -> str | None:
        """Why the service cannot run, once it is known that it cannot."""
        return None if self._error is None else str(self._error)

    @property
    def url(self) -> str | None:
        """Where the API listens, once it does."""
        return (self.facts.get(SERVING) or {}).get("url")

    @property
    def dashboard_url(self) -> str | None:
        """Where the dashboard listens, once it does."""
        return (self.facts.get(WATCHER) or {}).get("dashboard_url")

    @property
    def pair(self) -> Pair | None:
        """What is served, once the engine has said so."""
        return pair_from_facts(self.facts)

    @property
    def job(self) -> Job | None:
        """The newest training job."""
        return next(iter(self.jobs.latest(1)), None)

    @property
    def live(self) -> int:
        """The version that is live in the registry."""
        return self.registry.live().live

    @property
    def swaps(self) -> list[dict[str, Any]]:
        """The swaps since start, oldest first."""
        return list((self.facts.get(SWAPS) or {}).get("swaps", []))

    def loop_sentence(self) -> str:
        """Say what the learning loop is doing, in its own words."""
        return str(((self.facts.get(WATCHER) or {}).get("loop") or {}).get("sentence", "starting"))

    def drift(self) -> dict[str, Any]:
        """Return the drift detector of the default segment as the watcher showed it last; may be empty."""
        shown = (self.facts.get(DRIFT) or {}).get("shown") or {}
        return dict((shown.get("segments") or {}).get("default") or {})

    def _watch(self) -> None:
        try:
            self._supervisor.run()
        except RoleCannotStart as error:
            self._error = error


def training_of(job: Job) -> dict[str, Any]:
    """Return a job's part of the report."""
    result = job.result or {}
    return {
        "seconds": result.get("seconds"),
        "blocks": result.get("blocks"),
        "gate": result.get("gate"),
        "state": job.state if job.state != "done" else result.get("state"),
        "reason": job.reason,
        "error": job.error,
        "progress": msgspec.to_builtins(job.progress),
    }
