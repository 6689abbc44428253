"""The watcher over real SQLite and a real Valkey: drift, training, promotion, roll back, restarts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import redis
from sqlalchemy import Engine

from adapter import keys
from adapter.accounting import Accounting
from adapter.alerting import Alerts
from adapter.contracts import SCHEMA_VERSION, Counts, RequestOutcome, Sampling, VersionCounts
from adapter.facts import CHAMPIONS, DRIFT, ENGINE, PAYOFF, WATCHER, Facts
from adapter.jobs import Jobs
from adapter.registry import Registry
from adapter.sections import DistillSettings, EngineSettings, LogSettings, MonitorSettings
from adapter.settings import Settings
from adapter.streams import connect
from adapter.wire import to_wire
from monitors.acceptance import OutcomeReader, split_delivered
from monitors.metrics import Metrics
from monitors.watcher import Watcher

SEGMENT = "chat"


class Bench:
    """A deployment without an engine and a worker: the test plays both.  Versions draft one at a time, if not told."""

    def __init__(self, database: Engine, url: str, *, alternates: int = 0, **monitors: Any) -> None:
        self.now = 1_000_000.0
        self.database = database
        options = {
            "window_s": 5.0, "baseline_requests": 40, "guard_min_requests": 20, "retrain_cooldown_s": 30.0,
            "drift_false_alarms_per_30_days": 1000.0, "evidence_requests": 5000,
        } | monitors  # fmt: skip
        self.settings = Settings(
            redis_url=url,
            engine=EngineSettings(alternates=alternates),
            distill=DistillSettings(min_requests=30),
            log=LogSettings(timeout_s=0.3),
            monitors=MonitorSettings(**options),
        )
        self.registry = Registry(database, clock=self.clock)
        self.jobs = Jobs(database, clock=self.clock)
        self.announced: list[str] = []
        self.rng = np.random.default_rng(11)
        self.sent = 0
        self.client = connect(url, 5.0)
        self.metrics = Metrics()
        self.registry.install_base(target_fingerprint="a" * 64, base_fingerprint="b" * 64, actor="engine")
        self.restart()

    def clock(self) -> float:
        return self.now

    def restart(self) -> None:
        """Start a new watcher over the same database and Redis, as after a crash."""
        self.metrics = Metrics()
        self.watcher = Watcher(
            self.settings,
            self.database,
            client=connect(self.settings.redis, self.settings.log.timeout_s),
            announce=lambda job_id: self.announced.append(job_id) is None,
            metrics=self.metrics,
            clock=self.clock,
        )

    def serve(self, requests: int, acceptance: float, version: int | None = None) -> None:
        """Let requests end, ten a tick, one second apart."""
        for start in range(0, requests, 10):
            live = self.registry.live().live if version is None else version
            for _ in range(min(10, requests - start)):
                self.sent += 1
                level = float(np.clip(self.rng.normal(acceptance, 0.05), 0, 1))
                self.put(outcome(f"r{self.sent}", self.now, live, level))
            self.tick()

    def put(self, record: RequestOutcome | bytes) -> None:
        payload = record if isinstance(record, bytes) else to_wire(record)
        self.client.xadd(keys.OUTCOMES, {keys.PAYLOAD_FIELD: payload})

    def tick(self, times: int = 1, seconds: float = 1.0) -> None:
        for _ in range(times):
            self.watcher.tick()
            self.now += seconds

    def facts_of_an_engine(self) -> None:
        """Have an engine say what rounds cost."""
        table = {"target": {"rows": [1, 5], "ms": [20.0, 24.0]}, "draft": {"rows": [1, 4], "ms": [2.0, 2.0]}}
        costs = {
            "table": table, "corrections": {"target": {"factor": 1.0}, "draft": {"factor": 1.0}}, "overhead_ms": 1.0,
        }  # fmt: skip
        Facts(self.database).put(ENGINE, {"median_batch": 1.0, "controller": {"costs": costs}})

    def train(self, *, state: str = "ready", seconds: float = 0.0, **result: Any) -> int:
        """Do what a worker does with the open job; return the version it made."""
        job_id = self.jobs.claimable()[0]
        job = self.jobs.claim(job_id, worker="w", lease_s=30)
        assert job is not None
        self.now += seconds
        draft = self.registry.publish(
            parent=self.registry.live().live, state=state, artifact_sha256="c" * 64, artifact_bytes=10, trained_on={},
            gate={"verdict": "Passed: +0.100"}, reason="drift", job_id=job_id, actor="trainer",
        )  # fmt: skip
        assert self.jobs.finish(
            job_id, job.epoch,
            result={"version": draft.version, "state": state, "verdict": "Passed: +0.100"} | result,
        )  # fmt: skip
        return draft.version

    def drift(self) -> None:
        """Serve good traffic, then bad, until a training was requested."""
        self.serve(100, 0.60)
        self.serve(200, 0.35)
        assert "training" == self.phase

    @property
    def phase(self) -> str:
        return self.watcher.loop.state.phase

    def firing(self) -> set[str]:
        return {alert.rule for alert in Alerts(self.database).latest() if alert.resolved_at_s is None}

    def verbs(self) -> list[str]:
        return [row.verb for row in reversed(self.registry.audit())]


def outcome(name: str, at_s: float, version: int | None, level: float, examined: int = 40) -> RequestOutcome:
    accepted = round(level * examined)
    counts = Counts(num_rounds=20, num_drafted=60, num_examined=examined, num_accepted=accepted)
    return RequestOutcome(
        schema=SCHEMA_VERSION, request_id=name, segment=SEGMENT, finish_reason="stop", sampling=Sampling(),
        prompt_tokens=10, delivered_tokens=20 + accepted, plain_rounds=0 if version is not None else 30,
        by_version=() if version is None else (VersionCounts(version=version, counts=counts),),
        accepted_by_position=(), queue_s=0.0, first_token_s=0.1, total_s=1.0, finished_at_s=at_s,
    )  # fmt: skip


@pytest.fixture
def bench(database: Engine, valkey_url: str) -> Bench:
    return Bench(database, valkey_url)


def test_drift_trains_promotes_and_keeps_a_better_version(bench: Bench) -> None:
    """The whole circle: drift alert, job announced, promotion with its gate, guard says keep, alert resolved."""
    bench.drift()
    assert {"AcceptanceDrift"} == bench.firing()
    assert "acceptance of chat fell from 0." in bench.jobs.latest()[0].reason
    assert bench.announced

    version = bench.train()
    bench.tick()
    assert version == bench.registry.live().live
    assert "observing" == bench.phase
    assert {"DraftPromoted"} == bench.firing()
    promotion = bench.registry.audit()[0]
    assert ("promote", "watcher", True) == (promotion.verb, promotion.actor, promotion.automatic)
    assert {"verdict": "Passed: +0.100"} == promotion.evidence

    bench.serve(60, 0.55)
    bench.tick()
    assert "watching" == bench.phase
    assert set() == bench.firing()
    assert bench.watcher.loop.state.sentence.startswith(f"kept v{version}: acceptance +0.")


def test_the_watcher_keeps_champions_and_accounts(bench: Bench) -> None:
    """A kept version is champion of its segment and charged with its training; both survive a restart."""
    bench.drift()
    version = bench.train()
    bench.tick()
    bench.serve(60, 0.55)
    bench.tick(times=6)
    for _ in range(2):
        facts = Facts(bench.database)
        champion = (facts.get(CHAMPIONS) or {})[SEGMENT]
        account = (facts.get(PAYOFF) or {})[str(version)]
        assert (champion["version"], account["trainings"], account["saved_s"]) == (version, 1, None)
        assert account["why"].startswith("the engine tells no costs of rounds")
        assert account["stays"][0]["saving"]["after"] > account["stays"][0]["saving"]["before"]
        bench.restart()
        bench.tick(times=70)


def test_a_version_that_serves_long_and_well_is_champion_without_a_guard(bench: Bench) -> None:
    """Two hundred requests of the base draft crown it, and no version has an account yet."""
    bench.serve(210, 0.5)
    bench.tick(times=6)
    facts = Facts(bench.database)
    assert (facts.get(CHAMPIONS) or {})[SEGMENT]["version"] == 0
    assert facts.get(PAYOFF) is None


def test_the_watcher_stops_an_adaptation_that_does_not_pay(database: Engine, valkey_url: str) -> None:
    """Four versions that bring nothing for ten hours of training each end in held, with the accounts' sentence."""
    bench = Bench(database, valkey_url, payoff_days=1.0, training_seconds_per_day=1e6)
    bench.facts_of_an_engine()
    for _ in range(4):
        bench.serve(60, 0.5)
        job = bench.jobs.request(reason="by hand", requested_by="ana")
        assert job is not None
        bench.tick()
        bench.train(seconds=36_000.0)
        bench.tick()
        bench.serve(250, 0.5)
        assert bench.phase in ("watching", "held")
    bench.tick(times=3, seconds=61.0)
    assert bench.phase == "held"
    assert bench.watcher.loop.state.sentence.startswith("training does not pay: ")
    assert "AdaptationDoesNotPay" in bench.firing()


def test_a_version_judged_against_another_one_is_not_promoted(bench: Bench) -> None:
    """A person moved the alias during the training: the gate's comparison no longer says anything."""
    bench.drift()
    trained = bench.train()
    other = bench.registry.publish(
        parent=0, state="ready", artifact_sha256="d" * 64, artifact_bytes=10, trained_on={}, gate={}, reason="by hand",
        job_id=None, actor="ana",
    ).version  # fmt: skip
    bench.registry.promote(other, actor="ana", reason="try this one")

    bench.tick(3)
    bench.serve(60, 0.55)
    bench.tick(5)

    assert other == bench.registry.live().live
    assert trained not in [row.to_version for row in bench.registry.audit() if row.verb == "promote"]


def test_a_worse_version_is_rolled_back_by_the_guard(bench: Bench) -> None:
    """A promoted version that loses acceptance is quarantined, previous is live, and people are told why."""
    bench.drift()
    version = bench.train()
    bench.tick()
    bench.serve(100, 0.15, version)
    bench.tick()

    assert 0 == bench.registry.live().live
    assert "quarantined" == bench.registry.draft(version).state
    assert ["install", "publish", "promote", "quarantine", "roll_back"] == bench.verbs()
    assert "cooling" == bench.phase
    rolled = next(alert for alert in Alerts(bench.database).latest() if alert.rule == "DraftRolledBack")
    assert rolled.summary.startswith(f"rolled back v{version}: acceptance -0.")
    assert rolled.evidence["pairs"] >= 20


def test_after_a_roll_back_the_drift_is_remembered_and_trained_again(bench: Bench) -> None:
    """The previous version finds its own baseline again, so cooling ends in collecting, not in forgetting."""
    bench.drift()
    version = bench.train()
    bench.tick()
    bench.serve(100, 0.15, version)
    bench.tick()
    bench.tick(times=4, seconds=20.0)
    assert "collecting" == bench.phase
    assert "AcceptanceDrift" in bench.firing()

    bench.serve(40, 0.35)
    assert "training" == bench.phase


def test_a_rejected_version_cools_down_and_is_never_live(bench: Bench) -> None:
    """The gate's no is final: nothing is promoted, and the pause grows with every failure in a row."""
    bench.drift()
    bench.train(state="rejected")
    bench.tick()
    assert "cooling" == bench.phase
    assert 0 == bench.registry.live().live
    assert "CandidateRejected" in bench.firing()
    first_pause = bench.watcher.loop.state.until_s - bench.now

    bench.tick(times=3, seconds=31.0)
    bench.serve(40, 0.35)
    bench.train(state="rejected")
    bench.tick()
    assert bench.watcher.loop.state.until_s - bench.now > 1.5 * first_pause


def test_a_failed_training_alerts_and_cools_down(bench: Bench) -> None:
    """A job that failed for good opens TrainingFailed with its error."""
    bench.drift()
    job_id = bench.jobs.claimable()[0]
    job = bench.jobs.claim(job_id, worker="w", lease_s=30)
    assert job is not None
    bench.jobs.fail(job_id, job.epoch, error="loss is not finite", retry=False)
    bench.tick()

    assert "cooling" == bench.phase
    assert {"AcceptanceDrift", "TrainingFailed"} == bench.firing()
    assert (
        "loss is not finite" in next(a for a in Alerts(bench.database).latest() if a.rule == "TrainingFailed").summary
    )


def test_without_auto_promote_a_person_is_asked(database: Engine, valkey_url: str) -> None:
    """A ready version stays unpromoted and opens CandidateReady; the promotion by hand is observed."""
    bench = Bench(database, valkey_url, auto_promote=False)
    bench.drift()
    version = bench.train()
    bench.tick()
    assert 0 == bench.registry.live().live
    assert "CandidateReady" in bench.firing()

    bench.registry.promote(version, actor="an operator", reason="looks right")
    bench.tick()
    assert "observing" == bench.phase
    assert "CandidateReady" not in bench.firing()


@pytest.mark.parametrize("crash_at", ["drift", "training", "trained", "observing"])
def test_a_restart_resumes_where_the_watcher_was(bench: Bench, crash_at: str) -> None:
    """A new process over the same SQL goes on: one job, one promotion, one verdict, no second alert."""
    bench.serve(100, 0.60)
    bench.serve(60, 0.35)
    if crash_at == "drift":
        bench.restart()
    bench.serve(140, 0.35)
    if crash_at == "training":
        bench.restart()
    version = bench.train()
    if crash_at == "trained":
        bench.restart()
    bench.tick()
    bench.serve(10, 0.55)
    if crash_at == "observing":
        bench.restart()
    bench.serve(60, 0.55)
    bench.tick()

    assert version == bench.registry.live().live
    assert "watching" == bench.phase
    assert ["install", "publish", "promote"] == bench.verbs()
    assert 1 == len(bench.jobs.latest())
    rules = [alert.rule for alert in Alerts(bench.database).latest()]
    assert ["AcceptanceDrift", "DraftPromoted"] == sorted(rules)


def test_a_crash_between_commit_and_acknowledgement_counts_nothing_twice(bench: Bench) -> None:
    """Entries whose rows are stored are only acknowledged again; unstored ones are counted once."""
    bench.serve(20, 0.5)
    bench.tick(times=6)
    bench.put(outcome("stored-by-nobody", bench.now, 0, 0.5))
    bench.watcher.tick()
    bench.restart()
    bench.tick(times=8)

    rows = Accounting(bench.database).between(0)
    assert 21 == sum(row.requests for row in rows)
    assert 0 == bench.client.xpending(keys.OUTCOMES, keys.WATCHER_GROUP)["pending"]


def test_a_job_is_announced_again_until_somebody_claims_it(bench: Bench) -> None:
    """A lost message is repeated with growing pauses; a claimed job is left alone; an expired lease is announced."""
    bench.drift()
    bench.announced.clear()
    bench.tick(times=30)
    told = len(bench.announced)
    assert 2 <= told <= 8

    job = bench.jobs.claim(bench.announced[0], worker="w", lease_s=30)
    assert job is not None
    bench.tick(times=20)
    assert told == len(bench.announced)
    bench.tick(times=20)
    assert told < len(bench.announced)


def test_redis_gone_crashes_nothing_and_is_told(bench: Bench, valkey: Any) -> None:
    """While Redis is down ticks go on and RedisDown fires; afterwards it resolves and reading goes on."""
    bench.serve(20, 0.5)
    valkey.stop()
    bench.tick(times=6)
    assert {"RedisDown"} == bench.firing()
    valkey.start()
    bench.tick()
    assert set() == bench.firing()

    bench.client = valkey.client
    bench.serve(10, 0.5)
    bench.tick(times=6)
    assert 30 == sum(row.requests for row in Accounting(bench.database).between(0))


def test_redis_that_lost_everything_is_read_again(bench: Bench) -> None:
    """After FLUSHALL the group is created anew and new outcomes are counted."""
    bench.serve(20, 0.5)
    bench.tick(times=6)
    bench.client.flushall()
    bench.serve(10, 0.5)
    bench.tick(times=6)

    assert 30 == sum(row.requests for row in Accounting(bench.database).between(0))


def test_garbage_and_repeated_entries_are_counted_and_passed_over(bench: Bench) -> None:
    """An unreadable entry stops nobody, and an outcome written twice counts once."""
    bench.put(b"\x00 not msgpack")
    twice = outcome("twice", bench.now, 0, 0.5)
    bench.put(twice)
    bench.put(twice)
    bench.tick(times=8)

    assert (1, 1, 1) == (
        bench.watcher.reader.counters.outcomes,
        bench.watcher.reader.counters.garbage,
        bench.watcher.reader.counters.duplicates,
    )
    assert 1 == sum(row.requests for row in Accounting(bench.database).between(0))
    assert 0 == bench.client.xpending(keys.OUTCOMES, keys.WATCHER_GROUP)["pending"]


def test_windows_add_up_over_swaps_and_plain_requests(bench: Bench) -> None:
    """One request over two versions is one request; delivered tokens add up; plain ones have no version."""
    parts = (
        VersionCounts(version=0, counts=Counts(num_rounds=3, num_drafted=9, num_examined=6, num_accepted=3)),
        VersionCounts(version=1, counts=Counts(num_rounds=8, num_drafted=24, num_examined=20, num_accepted=15)),
    )
    spanning = outcome("spanning", bench.now, 0, 0.5)
    spanning = type(spanning)(
        **{name: getattr(spanning, name) for name in spanning.__dataclass_fields__ if name != "by_version"},
        by_version=parts,
    )
    bench.put(spanning)
    bench.put(outcome("plain", bench.now, None, 0.0))
    bench.tick(times=8)

    rows = {row.version: row for row in Accounting(bench.database).between(0)}
    assert {None, 0, 1} == set(rows)
    assert (0, 1, 1) == (rows[0].requests, rows[1].requests, rows[None].requests)
    assert (1, 1, 0) == (rows[0].judged_requests, rows[1].judged_requests, rows[None].judged_requests)
    assert (0.5, 0.75) == (rows[0].acceptance_sum, rows[1].acceptance_sum)
    assert spanning.delivered_tokens == rows[0].delivered + rows[1].delivered
    assert 30 == rows[None].rounds
    assert sum(split_delivered(spanning)) == spanning.delivered_tokens


def test_requests_that_examined_nothing_do_not_move_the_detector(bench: Bench) -> None:
    """A request whose rounds drafted nothing examined is skipped and counted, never fed as zero."""
    for number in range(100):
        bench.put(outcome(f"empty{number}", bench.now, 0, 0.0, examined=0))
    bench.tick(times=8)

    detector = bench.watcher.book.detectors(0)[SEGMENT]
    assert (0, 100) == (detector.requests, detector.skipped)


def test_metrics_name_roles_and_never_versions(bench: Bench) -> None:
    """Counters carry live, previous, floor or other; redis and drift are shown."""
    bench.drift()
    bench.train()
    bench.tick()
    bench.serve(30, 0.55)
    bench.tick(times=6)
    value = bench.metrics.registry.get_sample_value

    assert 300 <= (value("draftsmith_acceptance_requests_total", {"version": "live"}) or 0)
    assert 0 == value("draftsmith_acceptance_requests_total", {"version": "other"})
    assert 1 == value("draftsmith_redis_up")
    assert 2 == value("draftsmith_watcher_generation")
    assert 1 == value("draftsmith_train_jobs", {"state": "done"})
    assert value("draftsmith_drift_evidence_log10", {"segment": SEGMENT}) is not None


def test_states_are_stored_as_documents(bench: Bench) -> None:
    """The drift document carries a watermark, the watcher's one the loop; both are plain JSON."""
    bench.serve(60, 0.5)
    bench.tick(times=6)
    facts = Facts(bench.database)
    drift, watcher = facts.get(DRIFT), facts.get(WATCHER)

    assert drift is not None
    assert watcher is not None
    assert "0-0" != drift["watermark"]
    assert 0.45 < drift["shown"]["segments"][SEGMENT]["baseline"] < 0.55
    assert "watching" == watcher["loop"]["phase"]


def test_a_reader_that_restarts_takes_over_more_than_one_batch(valkey_url: str, wait_for: Callable[..., None]) -> None:
    """Entries left pending by a crash are taken over batch by batch, none lost (1,300 entries)."""
    client = connect(valkey_url, 5.0)
    dead = OutcomeReader(client, clock=lambda: 0.0, window_s=5.0)
    dead.poll()
    dead.committed()
    for number in range(1300):
        client.xadd(keys.OUTCOMES, {keys.PAYLOAD_FIELD: to_wire(outcome(f"r{number}", 0.0, 0, 0.5))})
    assert 1300 == len(dead.poll()) + len(dead.poll())

    again = OutcomeReader(client, clock=lambda: 0.0, window_s=5.0)
    counted = 0
    for _ in range(6):
        counted += len(again.poll())
        if again.due():
            again.close_window()
            again.committed()
    with contextlib.suppress(redis.RedisError):
        client.close()

    assert 1300 == counted


def test_names_from_a_header_are_bounded_in_windows_and_detectors(valkey_url: str, database: Engine) -> None:
    """Requests under 300 segment names make 64 of their own and one for the rest; a day later new names get places."""
    bench = Bench(database, valkey_url)

    def serve(prefix: str, count: int) -> None:
        for number in range(count):
            record = outcome(f"{prefix}{number}", bench.now, 0, 0.5)
            bench.put(dataclasses.replace(record, segment=f"{prefix}{number}"))
        bench.tick(20)

    serve("a", 300)
    first = {row.segment for row in Accounting(database).between(0.0)}
    assert first == {f"a{number}" for number in range(64)} | {"other"}
    assert sum(row.requests for row in Accounting(database).between(0.0)) == 300
    assert len(bench.watcher.book.detectors(0)) <= 65

    bench.restart()
    serve("b", 5)
    assert {row.segment for row in Accounting(database).between(0.0)} == first, "a restart is no way round the cap"

    began = bench.now = bench.now + 90_000.0
    serve("c", 5)
    assert {row.segment for row in Accounting(database).between(began - 1)} == {f"c{number}" for number in range(5)}
    assert {f"c{number}" for number in range(5)} <= set(bench.watcher.book.detectors(0))
    assert len(bench.watcher.book.detectors(0)) <= 65


def _serve_ends(bench: Bench, requests: int, level: float, every: int) -> None:
    """Let ordinary requests of acceptance 0.5 end, one in `every` of them at `level` instead."""
    for number in range(requests):
        bench.sent += 1
        own = level if number % every == 0 else 0.5
        bench.put(outcome(f"r{bench.sent}", bench.now, bench.registry.live().live, own))
        if number % 10 == 9:
            bench.tick()


@pytest.mark.parametrize(("level", "rule"), [(0.0, "AcceptanceNearZero"), (1.0, "AcceptanceNearOne")])
def test_monitors_q2_both_ends_of_acceptance_alarm(bench: Bench, level: float, rule: str) -> None:
    """More requests at one end raise that end's alert, survive a restart, and resolve when they are gone."""
    _serve_ends(bench, 200, level, 20)  # one in twenty is this segment's habit
    assert bench.firing() & {"AcceptanceNearZero", "AcceptanceNearOne"} == set()
    _serve_ends(bench, 100, level, 2)
    assert rule in bench.firing()
    bench.restart()
    bench.tick()
    told = [alert for alert in Alerts(bench.database).latest() if alert.rule == rule]
    assert len(told) == 1
    assert "rose from 5%" in told[0].summary
    _serve_ends(bench, 600, level, 20)
    assert rule not in bench.firing()


def test_monitors_q2_a_loop_is_seen_though_the_mean_stays(bench: Bench) -> None:
    """Half of the requests at one end and half at the other leave the mean where it was: only the ends speak."""
    bench.serve(150, 0.5)
    for _ in range(60):
        _serve_ends(bench, 1, 0.0, 1)
        _serve_ends(bench, 1, 1.0, 1)
    bench.tick(2)  # one to read them, one to look
    assert {"AcceptanceNearZero", "AcceptanceNearOne"} <= bench.firing()
    assert "AcceptanceDrift" not in bench.firing()


def test_what_was_live_goes_on_drafting_where_it_fits(database: Engine, valkey_url: str) -> None:
    """After a promotion by the loop the version before is an alternate, once, over a restart too; the guard goes on."""
    bench = Bench(database, valkey_url, alternates=2)
    bench.drift()
    version = bench.train()
    bench.tick()
    live = bench.registry.live()
    assert (live.live, live.alternates, bench.phase) == (version, (0,), "observing")
    assert bench.verbs()[-2:] == ["promote", "admit"]
    bench.restart()
    bench.serve(60, 0.55)
    bench.tick()
    assert bench.phase == "watching"
    assert bench.watcher.loop.state.sentence.startswith(f"kept v{version}: acceptance +0.")
    assert bench.verbs().count("admit") == 1


def test_a_person_who_promotes_decides_alone(database: Engine, valkey_url: str) -> None:
    """A version promoted by hand drafts for all requests: nothing is kept beside it."""
    bench = Bench(database, valkey_url, alternates=2)
    bench.serve(20, 0.5)
    version = bench.registry.publish(
        parent=0, state="ready", artifact_sha256="d" * 64, artifact_bytes=10, trained_on={}, gate={}, reason="by hand",
        job_id=None, actor="ana",
    ).version  # fmt: skip
    bench.registry.promote(version, actor="ana", reason="try this one")
    bench.tick(3)
    assert bench.registry.live().alternates == ()


def test_alternates_that_come_and_go_disturb_no_guard(database: Engine, valkey_url: str) -> None:
    """A person dismisses one while a new version is observed: it is still judged, with what was seen before."""
    bench = Bench(database, valkey_url, alternates=2)
    bench.drift()
    version = bench.train()
    bench.tick()
    bench.serve(10, 0.55)
    seen = bench.watcher.loop.state.guard.served
    bench.registry.dismiss(0, actor="ana", reason="not needed")
    bench.tick()
    assert (bench.phase, bench.watcher.loop.state.guard.served) == ("observing", seen)
    assert bench.watcher.loop.state.generation == bench.registry.live().generation
    bench.serve(100, 0.15, version)
    bench.tick()
    assert bench.registry.live().live == 0


def test_a_version_that_wins_in_one_segment_drafts_beside_what_is_live(database: Engine, valkey_url: str) -> None:
    """It is admitted and not promoted, the loop rests, and the failures in a row begin afresh."""
    bench = Bench(database, valkey_url, alternates=1)
    bench.drift()
    version = bench.train(action="admit", compared_with=0, verdict="Rejected, it loses: it gains in segment chat")
    bench.tick()
    live = bench.registry.live()
    assert (live.live, live.alternates, bench.phase) == (0, (version,), "cooling")
    assert bench.registry.audit()[0].reason.startswith(f"v{version} drafts beside it, where it fits better: ")
    assert "CandidateRejected" not in bench.firing()
    assert bench.watcher.loop.state.refused == 0


def test_an_admission_against_another_version_is_not_made(database: Engine, valkey_url: str) -> None:
    """Somebody promoted during the training: what the gate compared with is not live any more."""
    bench = Bench(database, valkey_url, alternates=1)
    bench.drift()
    bench.train(action="admit", compared_with=7)
    bench.tick()
    assert bench.registry.live().alternates == ()
    assert "was not admitted: it was compared with v7" in bench.watcher.loop.state.sentence


def test_a_close_question_holds_up_no_training(database: Engine, valkey_url: str) -> None:
    """The guard cannot tell two like versions apart; with enough new evidence the next training begins anyway."""
    bench = Bench(database, valkey_url, evidence_requests=150, guard_margin=0.002)
    bench.serve(200, 0.5)
    assert bench.phase == "training"
    version = bench.train()
    bench.tick()
    bench.serve(100, 0.5)
    assert bench.phase == "observing"
    assert bench.watcher.loop.state.sentence.startswith(f"watching v{version}: ")
    bench.now += 40.0  # the pause after a training
    bench.serve(60, 0.5)
    bench.tick(times=3)
    assert bench.phase == "training"
    assert "requests were served since the last training" in bench.jobs.latest()[0].reason
    assert bench.registry.live().live == version


def test_a_guard_that_has_seen_too_little_is_waited_for(database: Engine, valkey_url: str) -> None:
    """Evidence alone does not end an observation before its first verdict is possible."""
    bench = Bench(database, valkey_url, evidence_requests=30, guard_min_requests=60)
    bench.serve(100, 0.5)
    assert bench.phase == "training"
    bench.train()
    bench.tick()
    bench.serve(50, 0.5)
    assert bench.phase == "observing"
    assert "is judged after 60 comparable requests" in bench.watcher.loop.state.sentence
