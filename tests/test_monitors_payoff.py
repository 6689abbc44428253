"""What versions cost and save, and the champions of segments, over real SQLite with a clock moved by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine

from adapter.accounting import Accounting, Window
from adapter.facts import CHAMPIONS, ENGINE, PAYOFF, Facts
from adapter.jobs import Jobs
from adapter.registry import Registry
from adapter.sections import MonitorSettings
from adapter.settings import Settings
from monitors.cadence import DAY_S
from monitors.champions import REQUESTS, Champions
from monitors.guard import Guard
from monitors.payoff import Payoff
from monitors.savings import saving_of, seconds_per_token

ENGINE_SAYS = {
    "median_batch": 1.0,
    "controller": {"costs": {
        "table": {"target": {"rows": [1, 5], "ms": [20.0, 24.0]}, "draft": {"rows": [1, 4], "ms": [2.0, 2.0]}},
        "corrections": {"target": {"factor": 1.0}, "draft": {"factor": 1.5}}, "overhead_ms": 1.0,
    }},
}  # fmt: skip


class Books:
    """A deployment of which only SQL exists."""

    def __init__(self, database: Engine, folder: Path) -> None:
        self.now = 1_000_000.0
        self.database, self.facts = database, Facts(database)
        self.registry = Registry(database, clock=self.clock)
        self.jobs = Jobs(database, clock=self.clock)
        self.registry.install_base(target_fingerprint="a" * 64, base_fingerprint="b" * 64, actor="engine")
        self.facts.put(ENGINE, ENGINE_SAYS)
        self.settings = Settings(data_dir=folder, monitors=MonitorSettings(guard_min_requests=20))
        self.payoff = self.open()

    def clock(self) -> float:
        return self.now

    def open(self) -> Payoff:
        return Payoff(self.database, self.settings, self.clock)

    def job(self, took_s: float, **result: Any) -> None:
        job = self.jobs.request(reason="r", requested_by="watcher")
        assert job is not None
        claimed = self.jobs.claim(job.id, worker="w", lease_s=30)
        assert claimed is not None
        self.now += took_s
        assert self.jobs.finish(job.id, claimed.epoch, result=result)

    def go_live(self) -> tuple[int, int]:
        """Publish and promote a version; return it and its generation."""
        draft = self.registry.publish(
            parent=self.registry.live().live, state="ready", artifact_sha256="c" * 64, artifact_bytes=1, trained_on={},
            gate={}, reason="r", job_id=None, actor="trainer",
        )  # fmt: skip
        return draft.version, self.registry.promote(draft.version, actor="watcher", reason="better").generation

    def deliver(self, version: int | None, tokens: int, seconds: float = 100.0) -> None:
        self.now += seconds
        row = Window(at_s=self.now, seconds=5.0, segment="chat", version=version, requests=1, delivered=tokens)
        Accounting(self.database).add([row])

    def judge(self, version: int, generation: int, gain: float, pairs: int = 400) -> None:
        """Let the guard have compared a version whose acceptance is 0.4 + gain with one of 0.4."""
        self.payoff.judged(compared(version, gain, pairs), generation)

    def account(self, version: int) -> dict[str, Any]:
        document = self.facts.get(PAYOFF)
        assert document is not None
        return dict(document[str(version)])


def compared(version: int, gain: float, pairs: int, segment: str = "chat", seed: int = 3) -> Guard:
    rng = np.random.default_rng(seed)
    old = np.clip(rng.normal(0.4, 0.05, pairs), 0, 1)
    guard = Guard(version=version, previous=version - 1, reference={segment: [float(x) for x in old]})
    for value in old[::-1]:
        guard.observe(segment, float(np.clip(value + gain, 0, 1)))
    return guard


@pytest.fixture
def books(database: Engine, tmp_path: Path) -> Books:
    return Books(database, tmp_path)


def test_seconds_of_a_token_are_those_of_the_best_draft_length() -> None:
    """By hand: rounds of 21, 25, 29, 33 and 37 ms bring 1, 1.5, 1.75, 1.875 and 1.9375 tokens at acceptance 0.5."""
    assert seconds_per_token(ENGINE_SAYS, 0.5, 4) == pytest.approx(min(0.021, 0.025 / 1.5, 0.029 / 1.75))
    assert seconds_per_token(ENGINE_SAYS, 0.0, 4) == pytest.approx(0.021)
    assert seconds_per_token(ENGINE_SAYS, 1.0, 4) == pytest.approx(0.037 / 5, rel=0.01)
    assert seconds_per_token(ENGINE_SAYS, 0.9, 0) == pytest.approx(0.021)


@pytest.mark.parametrize(
    "said", [None, {}, {"controller": None}, ENGINE_SAYS | {"controller": {"controller": "fixed"}}]
)
def test_an_engine_that_tells_no_costs_makes_no_saving(said: dict[str, Any] | None) -> None:
    """Nothing is invented: the saving is None and says why."""
    assert seconds_per_token(said, 0.5, 4) is None
    saving = saving_of(compared(1, 0.1, 50), said, need=20, gamma_max=4)
    assert (saving.seconds, saving.interval, saving.pairs) == (None, None, 50)
    assert "the engine tells no costs" in saving.why
    few = saving_of(compared(1, 0.1, 19), ENGINE_SAYS, need=20, gamma_max=4)
    assert (few.seconds, few.why[:2]) == (None, "19")


def test_a_saving_is_the_difference_between_both_versions() -> None:
    """n = 400 pairs, seed 3, gain 0.1: the point is that of the mean acceptances, and the interval holds it."""
    saving = saving_of(compared(1, 0.1, 400), ENGINE_SAYS, need=20, gamma_max=4)
    assert saving.seconds is not None
    assert saving.interval is not None
    assert (saving.before, saving.after) == (pytest.approx(0.4, abs=0.01), pytest.approx(0.5, abs=0.01))
    expected = (seconds_per_token(ENGINE_SAYS, saving.before or 0, 4) or 0) - (
        seconds_per_token(ENGINE_SAYS, saving.after or 0, 4) or 0
    )
    assert saving.seconds == pytest.approx(expected)
    assert 0 < saving.interval[0] < saving.seconds < saving.interval[1]
    worse = saving_of(compared(1, -0.1, 400), ENGINE_SAYS, need=20, gamma_max=4)
    assert (worse.seconds or 0) < 0


def test_an_account_charges_failed_trainings_and_counts_own_tokens(books: Books) -> None:
    """v1 pays for a failed training before its own, v2 for its own; tokens end with the stay, joules where read."""
    books.job(100.0)
    books.job(50.0, joules=300.0, seconds=60.0)
    one, generation = books.go_live()
    books.deliver(one, 1000)
    books.judge(one, generation, 0.1)
    books.job(30.0)
    two, _ = books.go_live()
    books.deliver(one, 7)  # a request that ends late
    books.deliver(two, 500)
    books.deliver(None, 900)
    books.payoff.refresh()

    first, second = books.account(one), books.account(two)
    assert (first["trainings"], first["training_s"], first["joules"], first["tokens"]) == (2, 160.0, 300.0, 1000)
    assert first["saved_s"] == pytest.approx(1000 * first["stays"][0]["saving"]["seconds"], abs=1e-3)
    assert first["stays"][0]["tokens_since"] == 1507
    assert (second["trainings"], second["training_s"], second["joules"], second["tokens"]) == (1, 30.0, None, 500)
    assert (second["saved_s"], second["why"]) == (None, "it was not compared with the version before it yet")


def test_accounts_survive_a_restart(books: Books) -> None:
    """What the guard found is read back; everything else is read from SQL again."""
    one, generation = books.go_live()
    books.deliver(one, 1000)
    books.judge(one, generation, 0.1)
    before = books.account(one)
    books.payoff = books.open()
    assert books.account(one) == before
    assert before["saved_s"] > 0


def lived(books: Books, *, gain: float, tokens: int, job_s: float, costs: bool = True) -> None:
    """One version before the days that count, then four of a day each in them, each charged with `job_s`."""
    if not costs:
        books.facts.put(ENGINE, {})
    for _ in range(5):
        books.job(job_s)
        version, generation = books.go_live()
        books.judge(version, generation, gain)
        books.deliver(version, tokens, seconds=0.79 * DAY_S)
    books.payoff.refresh()


def test_trainings_that_certainly_cost_more_than_they_save_are_said_so(books: Books) -> None:
    """Four versions in three days that save about nothing for 1,000 s each; since a resumption nothing is known."""
    lived(books, gain=0.0, tokens=10_000, job_s=1000.0)
    sentence = books.payoff.loss(0.0)
    assert sentence is not None
    assert sentence.startswith("training does not pay: ")
    assert "each counted as a second of serving" in sentence
    assert "draftsmith drafts train" in sentence
    assert books.payoff.loss(books.now - DAY_S) is None


@pytest.mark.parametrize(
    ("gain", "tokens", "job_s", "costs"),
    [(0.1, 1_000_000, 1000.0, True), (0.0, 10_000, 1.0, True), (0.0, 10_000, 1000.0, False)],
    ids=["they save more", "they cost next to nothing", "savings are not known"],
)
def test_nothing_is_stopped_that_may_pay(books: Books, gain: float, tokens: int, job_s: float, costs: bool) -> None:
    """Where versions save enough, may save enough, or nobody knows what they save, adaptation goes on."""
    lived(books, gain=gain, tokens=tokens, job_s=job_s, costs=costs)
    assert books.payoff.loss(0.0) is None


def test_too_young_accounts_and_too_few_versions_stop_nothing(books: Books) -> None:
    """Three versions on the first day have had no time to pay, and two are too few."""
    for _ in range(4):
        books.job(1000.0)
        version, generation = books.go_live()
        books.judge(version, generation, 0.0)
        books.deliver(version, 10)
    books.payoff.refresh()
    assert books.payoff.loss(0.0) is None
    books.now += 2.5 * DAY_S
    for _ in range(2):
        books.job(1000.0)
        version, generation = books.go_live()
        books.judge(version, generation, 0.0)
    books.now += DAY_S
    books.payoff.refresh()
    assert books.payoff.loss(0.0) is None


def test_a_gain_counts_under_successors_until_a_roll_back(books: Books) -> None:
    """The most a version can have saved runs over all tokens since, up to the first roll back."""
    one, generation = books.go_live()
    books.judge(one, generation, 0.1)
    books.deliver(one, 100)
    two, _ = books.go_live()
    books.deliver(two, 200)
    books.registry.roll_back(actor="ana", reason="r")
    books.deliver(one, 400)
    books.payoff.refresh()
    stay = books.payoff.stays[0]
    assert (stay.version, stay.tokens, stay.tokens_since) == (one, 100, 300)
    assert stay.saving.interval is not None
    assert stay.most_s == pytest.approx(300 * stay.saving.interval[1])


# -- champions -------------------------------------------------------------------------------


@pytest.fixture
def champions(books: Books) -> Champions:
    return Champions(books.facts, books.registry, books.clock)


def champion(books: Books, segment: str) -> tuple[int, int] | None:
    found = (books.facts.get(CHAMPIONS) or {}).get(segment)
    return None if found is None else (found["version"], found["requests"])


def test_a_kept_version_is_champion_where_it_was_better(books: Books, champions: Champions) -> None:
    """Segments where it lost, or was compared too seldom, keep their champion."""
    one, _ = books.go_live()
    guard = compared(one, 0.1, 50)
    for segment, gain, pairs in (("code", -0.1, 50), ("rag", 0.1, 9)):
        guard.seen |= compared(one, gain, pairs, segment).seen
    champions.keep(guard)
    assert champion(books, "chat") == (one, 50)
    assert champion(books, "code") is champion(books, "rag") is None
    stored = books.facts.get(CHAMPIONS) or {}
    assert stored["chat"]["acceptance"] == pytest.approx(0.5, abs=0.02)
    assert stored["chat"]["at_s"] == books.now


def test_two_hundred_better_requests_make_a_champion(books: Books, champions: Champions) -> None:
    """One fewer or a lower mean makes none."""
    one, _ = books.go_live()
    two, _ = books.go_live()
    champions.follow(one, {"chat": [0.5] * REQUESTS, "code": [0.5] * (REQUESTS - 1)})
    champions.follow(two, {"chat": [0.49] * REQUESTS})
    champions.store()
    assert (champion(books, "chat"), champion(books, "code")) == ((one, REQUESTS), None)
    champions.follow(two, {"chat": [0.1] * 50 + [0.51] * REQUESTS})
    champions.store()
    assert champion(books, "chat") == (two, REQUESTS)


def test_quarantined_champions_are_dropped_and_others_survive_a_restart(books: Books, champions: Champions) -> None:
    """A version that may not be served is nobody's champion; the document is read back."""
    one, _ = books.go_live()
    two, _ = books.go_live()
    champions.follow(one, {"chat": [0.5] * REQUESTS})
    champions.follow(two, {"code": [0.5] * REQUESTS})
    champions.store()
    books.registry.quarantine(one, actor="ana", reason="r")
    again = Champions(books.facts, books.registry, books.clock)
    again.store()
    assert (champion(books, "chat"), champion(books, "code")) == (None, (two, REQUESTS))


def test_champions_are_bounded(books: Books, champions: Champions) -> None:
    """The segment that was crowned longest ago makes room for the sixty-fifth."""
    for number in range(65):
        books.now += 1
        champions.follow(0, {f"s{number}": [0.5] * REQUESTS})
    champions.store()
    stored = books.facts.get(CHAMPIONS) or {}
    assert set(stored) == {f"s{number}" for number in range(1, 65)}
    assert all(math.isclose(item["acceptance"], 0.5) for item in stored.values())
