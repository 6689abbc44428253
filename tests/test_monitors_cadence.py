"""When the loop asks for trainings and when it stops: LearningLoop over real SQLite, with a clock moved by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sqlalchemy import Engine

from adapter.alerting import Alerts
from adapter.jobs import Job, Jobs
from adapter.registry import Registry
from adapter.sections import DistillSettings, MonitorSettings
from adapter.settings import Settings
from monitors.alerts import AlertDesk
from monitors.cadence import DAY_S, Evidence, seconds_of, spent
from monitors.guard import Guard
from monitors.loop import LearningLoop
from monitors.loop_state import LoopState, loop_state
from monitors.segments import Observation, SegmentBook

STOPS = {"TrainingBudgetSpent", "AdaptationGivesUp", "AdaptationDoesNotPay"}


class Rig:
    """A loop without a watcher: the test serves, trains and lets time pass."""

    def __init__(self, database: Engine, folder: Path, **monitors: Any) -> None:
        self.now, self.database, self.folder = 1_000_000.0, database, folder
        self.rng = np.random.default_rng(7)
        self.loss: str | None = None
        self.asked_since: list[float] = []
        self.judged: list[tuple[int, int, bool]] = []
        self.registry = Registry(database, clock=self.clock)
        self.jobs = Jobs(database, clock=self.clock)
        self.registry.install_base(target_fingerprint="a" * 64, base_fingerprint="b" * 64, actor="engine")
        self.book: SegmentBook | None = None
        self.stored: dict[str, Any] = {}
        self.start(**monitors)

    def clock(self) -> float:
        return self.now

    def start(self, **monitors: Any) -> None:
        """Start a loop over what the last one left, as after a crash; the segment book comes back as it was."""
        options = {
            "baseline_requests": 40, "guard_min_requests": 20, "retrain_cooldown_s": 30.0, "evidence_requests": 100,
            "drift_false_alarms_per_30_days": 1000.0,
        } | monitors  # fmt: skip
        self.options = monitors
        self.settings = Settings(
            data_dir=self.folder, distill=DistillSettings(min_requests=30), monitors=MonitorSettings(**options)
        )
        book = SegmentBook(self.settings.monitors)
        if self.book is not None:
            book.restore(self.book.to_state())
        self.book = book
        self.loop = LearningLoop(
            self.settings, self.database, book=book, clock=self.clock, state=loop_state(self.stored),
            desk=AlertDesk(Alerts(self.database, clock=self.clock), lambda message: None), save=self.save,
            judged=lambda guard, generation, kept: self.judged.append((guard.version, generation, kept)),
            loses=self.loses,
        )  # fmt: skip
        self.loop.step()

    def restart(self) -> None:
        self.start(**self.options)

    def save(self, state: LoopState) -> None:
        self.stored = {"loop": msgspec.json.decode(msgspec.json.encode(state))}

    def loses(self, since_s: float) -> str | None:
        self.asked_since.append(since_s)
        return self.loss if since_s < 1_000_000.0 + 60 else None

    def serve(self, requests: int, level: float | None = 0.6, segment: str = "chat", step: int = 10) -> None:
        """Let requests of the live version end, one a second."""
        for number in range(requests):
            live = self.registry.live().live
            value = None if level is None else float(np.clip(self.rng.normal(level, 0.05), 0, 1))
            self.loop.served(segment)
            self.loop.observe(Observation(segment=segment, version=live, value=value))
            self.now += 1
            if number % step == step - 1:
                self.loop.step()
        self.save(self.loop.state)
        self.loop.step()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.loop.step()

    def publish(self, state: str = "ready", job_id: str | None = None) -> int:
        return self.registry.publish(
            parent=self.registry.live().live, state=state, artifact_sha256="c" * 64, artifact_bytes=10, trained_on={},
            gate={"verdict": "Passed"}, reason="r", job_id=job_id, actor="trainer",
        ).version  # fmt: skip

    def train(self, state: str = "ready", took_s: float = 60.0, **result: Any) -> int:
        """Do what a worker does with the open job; return the version that its result names."""
        job = self.jobs.claim(self.jobs.claimable()[0], worker="w", lease_s=30)
        assert job is not None
        compared = self.registry.live().live
        version = result.get("version") or self.publish("rejected" if state == "rejected" else "ready", job.id)
        self.now += took_s
        said = {"action": "train", "version": version, "state": state, "verdict": "words", "compared_with": compared}
        assert self.jobs.finish(job.id, job.epoch, result=said | result)
        self.loop.step()
        return version

    def fail(self) -> None:
        job = self.jobs.claim(self.jobs.claimable()[0], worker="w", lease_s=30)
        assert job is not None
        assert self.jobs.fail(job.id, job.epoch, error="loss is not finite", retry=False)
        self.loop.step()

    def ask(self) -> None:
        assert self.jobs.request(reason="by hand", requested_by="ana") is not None
        self.loop.step()

    def drift(self) -> None:
        """Serve until a segment drifted and a training on it was asked for."""
        self.serve(60)
        self.serve(60, 0.3)
        assert (self.phase, self.job.segments) == ("training", ("chat",))

    @property
    def job(self) -> Job:
        return self.jobs.latest(1)[0]

    @property
    def phase(self) -> str:
        return self.loop.state.phase

    @property
    def sentence(self) -> str:
        return self.loop.state.sentence

    def firing(self) -> set[str]:
        return {alert.rule for alert in Alerts(self.database).latest() if alert.resolved_at_s is None}

    def verbs(self) -> list[str]:
        return [row.verb for row in reversed(self.registry.audit())]


@pytest.fixture
def rig(database: Engine, tmp_path: Path) -> Rig:
    return Rig(database, tmp_path)


# -- what starts a training ------------------------------------------------------------------


def test_enough_evidence_starts_a_training_without_drift(rig: Rig) -> None:
    """The hundredth drafted request asks for a job that names no segment; the ninety-ninth does not."""
    rig.serve(99)
    assert (rig.phase, rig.jobs.latest()) == ("watching", [])
    rig.serve(1)
    assert (rig.phase, rig.job.segments, rig.job.requested_by) == ("training", (), "watcher")
    assert "100 requests were served since the last training" in rig.job.reason


def test_requests_that_drafting_did_not_pay_for_teach_too(rig: Rig) -> None:
    """Nothing was examined, so nothing drifts; but what was served is logged, and enough of it asks for a training."""
    rig.serve(99, None)
    assert (rig.phase, rig.jobs.latest(5)) == ("watching", [])
    rig.serve(1000, None)
    assert rig.phase == "training"
    assert rig.job.segments == ()
    assert "without any drift" in rig.job.reason


def test_time_alone_starts_no_training(rig: Rig) -> None:
    """Without requests nothing is asked for, however long nobody comes."""
    for _ in range(50):
        rig.wait(86_400.0)
    assert (rig.phase, rig.jobs.latest(5)) == ("watching", [])


def test_drift_starts_a_training_that_names_its_segments(rig: Rig) -> None:
    """Only the segment that fell is named, and the wait of min_requests is observed."""
    rig.start(evidence_requests=1000)
    rig.serve(60, segment="code")
    rig.serve(60)
    assert rig.phase == "watching"
    rig.serve(60, 0.3)
    assert (rig.phase, rig.job.segments) == ("training", ("chat",))
    assert "acceptance of chat fell" in rig.job.reason


def test_evidence_waits_for_the_cool_down_of_the_last_training(rig: Rig) -> None:
    """Evidence that came while the last one was trained and observed starts the next after the pause, not before."""
    rig.ask()
    rig.serve(150)
    rig.loop.observe(Observation(segment="chat", version=0, value=0.5))
    job = rig.jobs.claim(rig.job.id, worker="w", lease_s=30)
    assert job is not None
    rig.jobs.finish(job.id, job.epoch, result={"version": rig.publish(), "state": "ready", "compared_with": 0})
    rig.loop.step()
    assert rig.phase == "observing"
    rig.loop.state.guard = None
    rig.wait(20.0)
    rig.wait(9.0)
    assert rig.phase == "watching"
    rig.wait(1.0)
    assert rig.phase == "training"


def test_the_settings_switch_off_asking_and_nothing_else(database: Engine, tmp_path: Path) -> None:
    """With adapt off neither drift nor evidence asks; a job that a person asked for is followed and promoted."""
    rig = Rig(database, tmp_path, adapt=False)
    rig.serve(120)
    rig.serve(200, 0.3)
    assert (rig.phase, rig.jobs.latest()) == ("watching", [])
    assert "AcceptanceDrift" in rig.firing()
    rig.ask()
    assert rig.phase == "training"
    version = rig.train()
    assert (rig.phase, rig.registry.live().live) == ("observing", version)


def test_switching_off_ends_collecting(rig: Rig) -> None:
    """A loop that is started again without adapt leaves collecting and says why it asks for nothing."""
    rig.serve(60)
    while rig.phase == "watching":
        rig.serve(1, 0.3, step=1)
    assert rig.phase == "collecting"
    rig.start(adapt=False)
    assert rig.phase == "watching"
    assert "monitors.adapt is off" in rig.sentence


# -- back-off --------------------------------------------------------------------------------


def test_refused_evidence_asks_for_twice_as_much_up_to_sixteen_times(rig: Rig) -> None:
    """Needed requests are 100, 200, 400, 800, 1600, 1600: each one fewer starts nothing."""
    for needed in (100, 200, 400, 800, 1600, 1600):
        have = sum(rig.loop.state.evidence.counted.values())
        rig.serve(needed - have - 1)
        assert rig.phase == "watching", needed
        rig.serve(1)
        assert rig.phase == "training", needed
        rig.train("rejected")
        assert rig.phase == "cooling"
        rig.wait(31.0)
    assert rig.registry.live().live == 0


def test_a_pass_ends_the_back_off(rig: Rig) -> None:
    """After a refusal and a pass, one hundred requests are enough again."""
    rig.serve(100)
    rig.train("rejected")
    rig.wait(31.0)
    rig.serve(200)
    rig.train()
    assert rig.phase == "observing"
    assert rig.loop.state.evidence.doublings == {}


def test_drift_ends_the_back_off_of_its_segment_alone(rig: Rig) -> None:
    """Two segments were learnt from in vain; when one drifts, only its requests count in full again."""
    rig.serve(50, segment="chat")
    rig.serve(50, segment="code")
    rig.train("rejected")
    assert rig.loop.state.evidence.doublings == {"chat": 1, "code": 1}
    rig.wait(31.0)
    while "chat" in rig.loop.state.evidence.doublings:
        rig.serve(1, 0.3, segment="chat", step=1)
    assert rig.loop.state.evidence.doublings == {"code": 1}


def test_evidence_weighs_and_says_what_is_missing() -> None:
    """Requests of a segment that failed twice count a quarter; what is missing is said in requests of this mix."""
    evidence = Evidence(counted={"a": 40, "b": 40}, doublings={"b": 2})
    assert evidence.weight == 50.0
    assert evidence.missing(100) == 80
    evidence.take()
    evidence.refused()
    assert (evidence.counted, evidence.doublings) == ({}, {"a": 1, "b": 3})
    assert evidence.missing(100) == 320  # of the last training's segments: 0.3125 a request
    evidence.forget("b")
    assert evidence.doublings == {"a": 1}


# -- the budget ------------------------------------------------------------------------------


def test_a_spent_number_of_trainings_waits_for_the_oldest_to_age(database: Engine, tmp_path: Path) -> None:
    """Two a day: the third waits, with a ticket, until a day after the first began; a restart forgets nothing."""
    rig = Rig(database, tmp_path, trainings_per_day=2, evidence_requests=30)
    first_s = rig.now
    for _ in range(2):
        rig.ask()
        rig.train("rejected")
        rig.wait(40.0)
        rig.wait(4000.0)
    rig.serve(30)
    assert rig.phase == "cooling"
    assert "the training budget of 24 hours is spent: 2 of 2 trainings" in rig.sentence
    assert rig.firing() & STOPS == {"TrainingBudgetSpent"}
    rig.restart()
    for _ in range(12):
        rig.wait(3601.0)
    assert rig.phase == "cooling"
    assert len(rig.jobs.latest()) == 2
    rig.now = first_s + DAY_S - 100
    rig.wait(0.0)
    assert rig.phase == "cooling"
    rig.wait(3600.0)
    rig.loop.step()
    assert rig.phase == "training"
    assert rig.firing() & STOPS == set()


def test_spent_seconds_stop_trainings_and_no_person(database: Engine, tmp_path: Path) -> None:
    """An hour is spent by one training, so drift waits; a person's job is followed at once."""
    rig = Rig(database, tmp_path, training_seconds_per_day=3600.0)
    rig.ask()
    rig.train("rejected", took_s=3700.0)
    rig.wait(40.0)
    rig.serve(60)
    rig.serve(60, 0.3)
    assert rig.phase == "cooling"
    assert "3,700 of 3,600 s" in rig.sentence
    rig.ask()
    assert rig.phase == "training"
    rig.train()
    rig.serve(20, 0.6)
    assert "TrainingBudgetSpent" in rig.firing()
    rig.wait(2 * DAY_S)
    rig.wait(1.0)
    assert rig.phase == "watching"
    assert rig.firing() & STOPS == set()


def test_the_budget_counts_what_ran_within_a_day(rig: Rig) -> None:
    """Jobs nobody claimed cost nothing, running ones what they ran, and the older of result and clock counts."""
    rig.ask()
    rig.jobs.cancel(rig.job.id)
    rig.ask()
    rig.train("rejected", took_s=100.0, seconds=250.0)
    rig.ask()
    assert rig.jobs.claim(rig.job.id, worker="w", lease_s=30) is not None
    rig.now += 40
    jobs = rig.jobs.since(0.0)
    assert [seconds_of(job, rig.now) for job in jobs] == [0.0, 250.0, 40.0]
    used = spent(jobs, MonitorSettings(trainings_per_day=2), rig.now)
    assert (used.trainings, used.seconds) == (2, 290.0)
    assert used.free_at_s == 1_000_000.0 + DAY_S
    assert spent(jobs, MonitorSettings(trainings_per_day=3), rig.now).free_at_s is None
    assert spent(jobs, MonitorSettings(trainings_per_day=1), rig.now + DAY_S + 100).trainings == 0


# -- giving up and being held ----------------------------------------------------------------


def give_up(rig: Rig) -> None:
    """Refuse or fail five trainings on drift."""
    rig.drift()
    for number in range(5):
        rig.fail() if number % 2 else rig.train("rejected")
        if number < 4:
            assert rig.phase == "cooling"
            rig.wait(30.0 * 2**number + 1)
            rig.serve(40, 0.3)
            assert rig.phase == "training"
    assert rig.phase == "held"
    assert rig.firing() & STOPS == {"AdaptationGivesUp"}
    assert "gave up after 5 trainings on drift" in rig.sentence
    assert "draftsmith drafts train" in rig.sentence


@pytest.mark.parametrize("end", ["day", "person", "version"])
def test_five_in_vain_are_given_up_until_somebody_acts_or_a_day_is_over(rig: Rig, end: str) -> None:
    """Held asks for nothing, whatever comes, also after a restart, and each of its three ends counts afresh."""
    give_up(rig)
    rig.restart()
    rig.serve(300, 0.3)
    assert (rig.phase, len(rig.jobs.latest())) == ("held", 5)
    if end == "day":
        rig.wait(DAY_S + 1)
        assert rig.phase == "watching"
    elif end == "person":
        rig.ask()
        assert rig.phase == "training"
    else:
        rig.registry.promote(rig.publish(), actor="ana", reason="by hand")
        rig.loop.step()
        assert rig.phase == "observing"
    assert rig.loop.state.in_vain == 0
    assert rig.firing() & STOPS == set()


def test_refusals_without_drift_or_for_a_person_do_not_give_up(rig: Rig) -> None:
    """Six refused trainings that a person asked for leave the loop at work, and its back-off as it was."""
    rig.serve(50)
    for _ in range(6):
        rig.ask()
        rig.train("rejected")
        rig.wait(3601.0)
    assert rig.phase == "watching"
    assert rig.firing() & STOPS == set()
    assert (rig.loop.state.evidence.doublings, rig.loop.state.in_vain) == ({}, 0)


def test_versions_that_the_guard_undoes_count_as_in_vain(database: Engine, tmp_path: Path) -> None:
    """A refused training and a version that is rolled back make two, and two are the limit here."""
    rig = Rig(database, tmp_path, failures_in_a_row=2)
    rig.drift()
    rig.train("rejected")
    rig.wait(31.0)
    rig.serve(40, 0.3)
    rig.train()
    while rig.phase == "observing":
        rig.serve(1, 0.05)
    assert (rig.phase, rig.registry.live().live) == ("held", 0)
    assert "gave up after 2 trainings on drift" in rig.sentence


def test_a_version_that_is_kept_ends_the_row(rig: Rig) -> None:
    """Failures before a version that the guard keeps are over."""
    rig.drift()
    rig.train("rejected")
    assert (rig.loop.state.in_vain, rig.loop.state.refused) == (1, 1)
    rig.wait(31.0)
    rig.serve(40, 0.3)
    rig.train()
    assert rig.loop.state.refused == 0
    rig.serve(60, 0.5)
    assert (rig.phase, rig.loop.state.in_vain) == ("watching", 0)


def test_trainings_that_do_not_pay_are_stopped_until_a_person_asks(rig: Rig) -> None:
    """The sentence of the accounts holds the loop for as long as nobody asks; then accounts begin anew."""
    rig.now += 100
    rig.loss = "training does not pay: …"
    rig.loop.step()
    assert (rig.phase, rig.sentence) == ("held", rig.loss)
    assert rig.firing() == {"AdaptationDoesNotPay"}
    rig.wait(3 * DAY_S)
    rig.restart()
    assert rig.phase == "held"
    rig.ask()
    assert (rig.phase, rig.firing()) == ("training", set())
    rig.train("rejected")
    rig.wait(40.0)
    rig.wait(1.0)
    assert rig.phase == "watching"
    assert rig.asked_since[-1] == rig.loop.state.resumed_at_s > 1_000_000.0


def test_twenty_refused_candidates_promote_nothing_and_say_so(rig: Rig) -> None:
    """Mixed traffic with a good draft: evidence asks, the gate refuses, 20 times; live stays and nothing pays."""
    for _ in range(20):
        while rig.phase != "training":
            rig.serve(100)
        rig.train("rejected")
        rig.wait(31.0)
    assert rig.registry.live().live == 0
    assert set(rig.verbs()) == {"install", "publish"}
    assert "nothing pays at present: none of the last 20 trainings" in rig.sentence
    assert "1,6" in rig.sentence or "1,5" in rig.sentence  # requests that are missing, of 1,600


def test_refused_trainings_of_a_person_are_said_to_bring_nothing_too(database: Engine, tmp_path: Path) -> None:
    """With adapt off, 20 cycles that somebody else asked for end in the same words, without a promise of a next one."""
    rig = Rig(database, tmp_path, adapt=False)
    for _ in range(20):
        rig.ask()
        rig.train("rejected")
        rig.wait(3601.0)
    assert (rig.phase, rig.registry.live().live) == ("watching", 0)
    assert "nothing pays at present: none of the last 20 trainings" in rig.sentence
    assert rig.sentence.endswith("the next comes when a person asks for it")


# -- switching to a kept version -------------------------------------------------------------


def kept_version(rig: Rig) -> int:
    """Have v1 and v2 live one after the other, then drift: v1 is kept."""
    rig.start(evidence_requests=1000)
    for _ in range(2):
        rig.ask()
        rig.train()
        rig.serve(200, 0.6)
        assert rig.phase == "watching"
    assert rig.registry.live().live == 2
    rig.serve(80, 0.3)
    assert (rig.phase, rig.job.segments) == ("training", ("chat",))
    return 1


def test_a_kept_version_is_switched_to_and_rolled_back_without_a_quarantine(rig: Rig) -> None:
    """The audit log says it is a switch; when the guard finds it worse it is left and stays allowed."""
    kept = kept_version(rig)
    before = rig.registry.live().live
    rig.train(action="switch", version=kept, gate={"difference": 0.1})
    assert (rig.phase, rig.registry.live().live) == ("observing", kept)
    move = next(row for row in rig.registry.audit() if row.verb == "promote")
    assert move.reason.startswith(f"switched to v{kept}, which was kept: ")
    assert move.evidence == {"difference": 0.1, "action": "switch", "compared_with": before}
    rig.restart()
    while rig.phase == "observing":
        rig.serve(1, 0.05)
    assert rig.registry.live().live == before
    assert rig.registry.draft(kept).state == "ready"
    assert rig.phase == "cooling"
    assert "DraftRolledBack" in rig.firing()
    assert rig.judged[-1][::2] == (kept, False)


def test_a_switch_ends_the_old_drift_of_the_version_that_returns(rig: Rig) -> None:
    """v1 was left because it drifted; back on its own traffic it is not trained for that again."""
    kept = kept_version(rig)
    rig.book.detectors(kept)["chat"].drifting = True  # type: ignore[union-attr]
    rig.train(action="switch", version=kept)
    rig.serve(60, 0.6)
    assert rig.phase == "watching"
    assert rig.loop.state.sentence.startswith(f"kept v{kept}")


def test_a_switch_that_was_judged_against_another_version_is_not_made(rig: Rig) -> None:
    """What was live when it was judged must still be; the parent of the old version says nothing."""
    kept = kept_version(rig)
    live = rig.registry.live().live
    rig.train(action="switch", version=kept, compared_with=live + 7)
    assert (rig.phase, rig.registry.live().live) == ("cooling", live)
    assert f"compared with v{live + 7}, and v{live} is live now" in rig.sentence


def test_a_training_is_compared_with_what_its_result_says(rig: Rig) -> None:
    """`compared_with` counts before the parent, and the parent where an older trainer is silent."""
    rig.ask()
    version = rig.train(compared_with=5)
    assert (rig.phase, rig.registry.live().live) == ("cooling", 0)
    rig.wait(31.0)
    rig.ask()
    version = rig.train(compared_with=None)
    assert rig.registry.live().live == version


@pytest.mark.parametrize("result", [
    {"action": "switch", "state": "rejected"}, {"action": "switch", "compared_with": None}, {"version": "two"},
    {"action": "dance"}, {"state": "done"},
])  # fmt: skip
def test_a_result_that_makes_no_sense_fails_the_training(rig: Rig, result: dict[str, Any]) -> None:
    """It opens TrainingFailed with what was said, and promotes nothing."""
    rig.ask()
    rig.train(**{"version": rig.publish(), "state": "ready"} | result)
    assert (rig.phase, rig.registry.live().live) == ("cooling", 0)
    assert "TrainingFailed" in rig.firing()


def test_a_promotion_that_was_undone_is_not_made_again(rig: Rig) -> None:
    """A crash after the promotion, then a person's roll back: the finished job must not promote a second time."""
    rig.ask()
    stored = rig.stored
    version = rig.train()
    rig.registry.roll_back(actor="ana", reason="not now")
    rig.stored = stored
    rig.restart()
    for _ in range(5):
        rig.wait(31.0)
    assert rig.registry.live().live == 0
    assert [row.to_version for row in rig.registry.audit() if row.verb == "promote"] == [version]


# -- every state ends, and survives a restart ------------------------------------------------


def test_collecting_ends_after_a_day_without_requests(rig: Rig) -> None:
    """Drift with too few requests to train on does not stay open for ever."""
    rig.serve(60)
    while rig.phase == "watching":
        rig.serve(1, 0.3, step=1)
    rig.wait(DAY_S + 1)
    assert rig.phase == "cooling"
    assert "came in a day since acceptance fell" in rig.sentence


def test_a_job_that_nobody_takes_is_cancelled_after_a_day(rig: Rig) -> None:
    """The loop's own job is taken back; a person's stays for as long as the person wants."""
    rig.serve(100)
    rig.wait(DAY_S + 1)
    rig.wait(1.0)
    assert (rig.phase, rig.job.state) == ("cooling", "cancelled")
    assert "no worker took it for a day" in rig.sentence
    rig.wait(31.0)
    rig.ask()
    rig.wait(DAY_S + 1)
    rig.wait(1.0)
    assert (rig.phase, rig.job.state) == ("training", "queued")


def test_observing_ends_after_a_day_without_requests(rig: Rig) -> None:
    """A version that nobody asks anything is kept; what was asked decides nothing."""
    rig.ask()
    version = rig.train()
    rig.serve(3)
    rig.wait(DAY_S - 10)
    assert rig.phase == "observing"
    rig.wait(20.0)
    assert (rig.phase, rig.registry.live().live) == ("watching", version)
    assert rig.sentence.startswith("kept after a day: ")


def test_a_job_that_ends_while_the_guard_watches_is_not_lost(rig: Rig) -> None:
    """A person asks during observing and the worker is faster than the guard: its version is judged next."""
    rig.ask()
    rig.train()
    rig.ask()
    assert rig.phase == "observing"
    rig.train("rejected")
    assert rig.phase == "observing"
    rig.wait(DAY_S + 1)
    rig.wait(1.0)
    rig.wait(1.0)
    assert "CandidateRejected" in rig.firing()


@pytest.mark.parametrize("phase", ["watching", "collecting", "training", "observing", "cooling", "held"])
def test_a_restart_goes_on_in_each_phase(rig: Rig, phase: str) -> None:
    """The new loop stands where the old one stood, with the same counts, and moves nothing by starting."""
    if phase == "watching":
        rig.serve(50)
    elif phase == "collecting":
        rig.serve(60)
        while rig.phase == "watching":
            rig.serve(1, 0.3, step=1)
    elif phase == "held":
        give_up(rig)
    else:
        rig.drift()
        if phase != "training":
            rig.train("ready" if phase == "observing" else "rejected")
    rig.loop.step()
    rig.save(rig.loop.state)
    state, verbs, jobs = rig.stored, rig.verbs(), rig.jobs.latest()
    rig.restart()
    rig.loop.step()
    rig.save(rig.loop.state)
    assert rig.phase == phase
    assert (rig.stored, rig.verbs(), rig.jobs.latest()) == (state, verbs, jobs)


def test_a_document_of_another_layout_starts_afresh() -> None:
    """Phases and fields that this version does not know are no reason to stop."""
    assert loop_state({"loop": {"phase": "gating"}}) is None
    assert loop_state({"loop": {"evidence": 3}}) is None
    old = loop_state({"loop": {"phase": "cooling", "failures": 2, "guard": None}})
    assert old is not None
    assert (old.phase, old.failures, old.evidence) == ("cooling", 2, Evidence())


def test_the_guard_tells_segments_apart() -> None:
    """Sums run over all requests of a segment and over those with a comparable one."""
    guard = Guard(version=2, previous=1, reference={"chat": [0.5]})
    for segment, value in (("chat", 0.75), ("chat", 0.25), ("code", 0.5)):
        guard.observe(segment, value)
    chat, code = guard.seen["chat"], guard.seen["code"]
    assert (chat.requests, chat.total, chat.pairs, chat.paired, chat.gain) == (2, 1.0, 1, 0.75, 0.25)
    assert (code.requests, code.total, code.pairs) == (1, 0.5, 0)
