"""The whole loop by real processes on a tiny pair: traffic changes, a draft learns it, goes live, is rolled back.

The target answers small letters with small letters and capitals with capitals; the base draft knows
small letters only (`two_dialects`).  Everything between is the product: API, engine, Valkey, watcher,
worker, trainer, gate, registry, CLI.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import poll_until
from deployment import Clients, Deployment, alive, answer, body, cli, client_of, family
from two_dialects import capital_prompt, small_prompt, write_dialects

from adapter.accounting import Accounting, summarise
from adapter.alerting import Alerts
from adapter.database import open_database
from adapter.facts import DRIFT, SWAPS, Facts
from adapter.jobs import Job, Jobs
from adapter.registry import Registry

MODEL = "dialects-target"
SECTIONS: dict[str, dict[str, Any]] = {
    "monitors": {
        "window_s": 0.5, "baseline_requests": 20, "drift_false_alarms_per_30_days": 1e5, "guard_min_requests": 10,
        "retrain_cooldown_s": 3600.0,
    },
    "distill": {
        "min_requests": 40, "epochs": 6.0, "max_seconds": 30.0, "learning_rates": (3e-3,), "batch_tokens": 512,
        "rank": 8, "alpha": 16.0, "holdout_share": 0.3, "gate_min_requests": 5, "nice": 0, "lease_s": 3.0,
        "busy_share": 0.5,
    },
}  # fmt: skip


class Traffic:
    """Requests of one dialect or the other, each with a seed of its own; `speak` changes the dialect."""

    def __init__(self) -> None:
        self._pick = random.Random(0)
        self._sent = 0
        self.speak: Callable[[random.Random], str] = small_prompt

    def __call__(self) -> dict[str, Any]:
        self._sent += 1
        hot = 1.0 if self._sent % 4 else 0.0
        return body(self.speak(self._pick), MODEL, max_tokens=16, temperature=hot, seed=self._sent)


class Observer:
    """Reads what the processes write, from outside: SQL and the engine's own counters."""

    def __init__(self, deployment: Deployment) -> None:
        self.database = open_database(f"sqlite:///{deployment.data / 'draftsmith.db'}")
        self.registry, self.jobs = Registry(self.database), Jobs(self.database)
        self.facts, self.alerts = Facts(self.database), Alerts(self.database)
        self.url = deployment.url

    @property
    def job(self) -> Job | None:
        return next(iter(self.jobs.latest(1)), None)

    def engine(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/debug/engine", trust_env=False, timeout=10).json())

    def detector(self) -> dict[str, Any]:
        shown = (self.facts.get(DRIFT) or {}).get("shown") or {}
        return dict((shown.get("segments") or {}).get("default") or {})

    def acceptance(self, version: int) -> float:
        rows = [row for row in Accounting(self.database).between(0) if row.version == version]
        value = summarise(rows).value
        assert value is not None
        return value

    def alerted(self) -> set[str]:
        return {alert.rule for alert in self.alerts.latest()}

    def firing(self) -> set[str]:
        return {alert.rule for alert in self.alerts.latest() if alert.resolved_at_s is None}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_dialects(tmp_path_factory.mktemp("dialects"))


@pytest.fixture
def deployment(tmp_path: Path, pair: tuple[Path, Path]) -> Iterator[Deployment]:
    target, draft = pair
    made = Deployment(tmp_path / "d", ["--target", str(target), "--draft", str(draft)], SECTIONS)
    try:
        made.start()
        yield made
    finally:
        made.close()


def fixed_answers(client: httpx.Client) -> list[dict[str, Any]]:
    """A greedy and two sampled requests with seeds, in both dialects, each with and without speculation."""
    asks = [
        {"prompt": "gnkuhmp", "temperature": 0.0}, {"prompt": "KVBQDHV", "temperature": 1.0, "seed": 11},
        {"prompt": "QJMTR", "temperature": 0.7, "top_p": 0.9, "seed": 12},
    ]  # fmt: skip
    found = []
    for ask in asks:
        fast = answer(client, body(model=MODEL, max_tokens=48, **ask))
        assert fast == answer(client, body(model=MODEL, max_tokens=48, **ask, speculative={"enabled": False}))
        found.append(fast)
    return found


def trainer_of(deployment: Deployment) -> int | None:
    """The trainer process below the deployment's worker, once there is one."""
    for pid in family(deployment.pids().get("worker", -1)):
        with contextlib.suppress(psutil.Error):
            if "distill.trainer" in psutil.Process(pid).cmdline():
                return pid
    return None


def until_drift(observer: Observer, traffic: Traffic, clients: Clients) -> None:
    """Let the watcher learn small letters, then send capitals until it asks for a training."""
    poll_until(lambda: observer.detector().get("baseline") is not None, 60)
    clients.wait_more(20)
    assert observer.jobs.latest(1) == []
    assert observer.alerted() == set()
    traffic.speak = capital_prompt
    poll_until(lambda: observer.job is not None, 60)


def until_live(observer: Observer) -> Job:
    """Wait for the end of the training and for the engine to draft with what came of it."""
    poll_until(lambda: observer.job.state not in ("queued", "running"), 120)
    job = observer.job
    assert job.state == "done", job
    assert job.result["state"] == "ready", job.result
    poll_until(lambda: observer.engine()["version"] == 1, 20)
    poll_until(lambda: "DraftPromoted" in observer.alerted(), 20)
    return job


def test_traffic_changes_a_draft_learns_it_and_is_rolled_back(deployment: Deployment) -> None:
    """Drift, training, gate, promotion, swap, guard and roll back follow one another by themselves.

    No request fails, fixed seeded requests give the same tokens before, between and after and without
    speculation, and the audit log has one row a change.
    """
    observer, traffic = Observer(deployment), Traffic()
    clients = Clients(observer.url, traffic, 3)
    with client_of(observer.url) as client:
        before = fixed_answers(client)
        with clients.sending():
            until_drift(observer, traffic, clients)
            job = until_live(observer)
            poll_until(lambda: "DraftPromoted" not in observer.firing(), 60)  # the guard has judged and kept it
            learned = fixed_answers(client)
            engine = observer.engine()
            done = cli("drafts", "rollback", "--json", "--data-dir", deployment.data, "--reason", "a test says so")
            assert done.returncode == 0, done.stderr
            poll_until(lambda: observer.engine()["version"] == 0, 20)
            clients.wait_more(5)
        after = fixed_answers(client)

    assert clients.failures == []
    assert before == learned == after
    assert (engine["version"], engine["previous"], engine["generation"]) == (1, 0, 3)
    assert engine["alternates"] == [0]  # what was live before drafts on, where it fits better
    assert json.loads(done.stdout) == {"generation": 4, "live": 0, "previous": 1, "alternates": []}
    assert observer.engine()["generation"] == 4
    gate = job.result["gate"]
    assert gate["passed"]
    assert gate["interval"][0] > 0
    rows = list(reversed(observer.registry.audit()))
    assert [(row.verb, row.from_version, row.to_version, row.generation) for row in rows] == [
        ("install", None, 0, 1), ("publish", 0, 1, 1), ("promote", 0, 1, 2), ("admit", None, 0, 3),
        ("roll_back", 1, 0, 4),
    ]  # fmt: skip
    assert [row.automatic for row in rows] == [True, True, True, True, False]
    assert rows[2].actor == rows[3].actor == "watcher"
    assert rows[4].reason == "a test says so"
    swaps = observer.facts.get(SWAPS)["swaps"]
    assert [(swap["version"], swap["replaced"]) for swap in swaps if swap["generation"] > 1] == [(1, 0), (0, 1)]
    assert swaps[-1]["at_s"] - rows[4].at_s < 1.0  # the promise: back within a second
    assert observer.acceptance(1) > gate["live"] + 0.3  # live traffic says what the gate forecast
    assert observer.alerted() >= {"AcceptanceDrift", "DraftPromoted"}
    assert len(observer.jobs.latest()) == 1


@pytest.mark.slow
def test_the_loop_survives_the_death_of_trainer_valkey_and_worker(deployment: Deployment) -> None:
    """Killed trainer, Valkey and worker cost time only: the one job ends in the one version, no request fails."""
    observer, traffic = Observer(deployment), Traffic()
    clients = Clients(observer.url, traffic, 3)
    with client_of(observer.url) as client:
        before = fixed_answers(client)
        with clients.sending():
            until_drift(observer, traffic, clients)
            poll_until(lambda: trainer_of(deployment) is not None and bool(observer.job.progress), 60)
            os.kill(trainer_of(deployment), signal.SIGKILL)

            valkey = deployment.pids()["valkey"]
            os.kill(valkey, signal.SIGKILL)
            deployment.wait_restarted("valkey", valkey)
            clients.wait_more(10)

            poll_until(lambda: trainer_of(deployment) is not None and observer.job.attempts == 2, 60)
            worker = deployment.pids()["worker"]
            orphans = family(worker)
            os.kill(worker, signal.SIGKILL)
            deployment.wait_restarted("worker", worker)
            clients.wait_more(10)
            until_live(observer)
        after = fixed_answers(client)
    assert clients.failures == []
    assert before == after
    poll_until(lambda: not alive(orphans), 30)
    assert len(observer.jobs.latest()) == 1
    verbs = [(row.verb, row.to_version) for row in reversed(observer.registry.audit())]
    assert verbs == [("install", 0), ("publish", 1), ("promote", 1), ("admit", 0)]
    assert observer.engine()["log_connected"]
