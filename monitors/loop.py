"""The learning loop: watching -> collecting -> training -> observing -> watching; cooling, and held.

Acts through the registry, the job table and alerts, and reads the segment book and the guard.  Its
state is one small document; every transition can be repeated after a crash, because it is decided
from what the registry and the job table say and not from what the loop believes it did.  What each
state needs and when it ends is in `monitors.cadence`.  Knows no Redis; `monitors.announcer` tells
the workers about jobs.  `monitors.watcher` calls it.
"""

from __future__ import annotations

import contextlib
import math

from adapter.contracts import ConflictError, RegistryError
from adapter.jobs import OPEN_STATES, Job
from monitors import cadence
from monitors.drift import DriftDetector
from monitors.guard import Guard, Judgement
from monitors.notices import LOOP
from monitors.outcomes import ADMIT, Outcome, admit, outcome_of, promote
from monitors.segments import Observation
from monitors.transitions import Transitions

ACTOR = "watcher"


class LearningLoop(Transitions):
    """Drive one deployment from drift to a new live version and back; arguments as `Transitions` takes them."""

    def observe(self, observation: Observation) -> None:
        """Feed one request of one version; only requests of the live version are judged."""
        if observation.version != self.state.live:
            return
        detector = self._book.observe(observation)
        name = self._book.segment_name(observation.version, observation.segment)
        if detector.drift_detected:
            self.state.collected += detector.since
            self.state.evidence.doublings.pop(name, None)
        elif detector.drifting:
            self.state.collected += 1
        if observation.value is not None and self.state.guard is not None:
            self.state.guard.observe(name, observation.value)

    def served(self, segment: str) -> None:
        """Count one request that was answered and may be learned from, whether or not anything was drafted for it.

        The log holds what the target thought of every token, so a request that drafting did not pay for teaches, too.
        """
        if self.state.live is not None:
            self.state.evidence.add(self._book.segment_name(self.state.live, segment))

    def forget(self, segment: str) -> None:
        """Drop what is known about a segment that nobody uses any more."""
        self._book.forget(segment)
        self.state.evidence.forget(segment)

    def step(self) -> None:
        """Look at the registry and the jobs, and do what is due."""
        try:
            live = self._registry.live()
        except RegistryError:
            return  # nothing was ever served here
        if live.generation != self.state.generation:
            self._moved(live)
        getattr(self, f"_{self.state.phase}")()
        now_live = live.live if self.state.live is None else self.state.live
        self._notices.follow_drift(self._book.detectors(now_live), now_live)
        self._notices.follow_tails(self._book.tails(now_live), now_live)
        self._notices.follow_jobs(self._jobs.latest(5))
        self._notices.expire()

    # -- the phases --------------------------------------------------------------------------

    def _watching(self) -> None:
        if self._adopt_open_job() or not self._settings.monitors.adapt:
            return
        if self._notices.is_open("TrainingBudgetSpent", LOOP):
            self._spent()
        if (loss := self._loses(self.state.resumed_at_s)) is not None:
            self._hold("AdaptationDoesNotPay", loss, until_s=0.0)
            return
        drifting = self._drifting()
        if drifting:
            self._enter("collecting", f"acceptance fell on {_names(drifting)}; collecting requests to train on")
        elif self._evidence_is_there():
            count = sum(self.state.evidence.counted.values())
            self._request(f"{count:,} requests were served since the last training, without any drift", ())

    def _collecting(self) -> None:
        if self._adopt_open_job():
            return
        drifting = self._drifting()
        if not drifting or not self._settings.monitors.adapt:
            self._watch("acceptance recovered by itself" if not drifting else None)
        elif self.state.collected >= self._settings.distill.min_requests:
            self._request(self._why(drifting), sorted(drifting))
        elif self._clock() - self.state.since_s > cadence.DAY_S:
            self._cool(f"only {self.state.collected} requests came in a day since acceptance fell", failed=False)

    def _training(self) -> None:
        try:
            job = self._jobs.get(self.state.job_id or "")
        except RegistryError:
            self.state.job_id = None
            self._enter("watching", "the training job is gone")
            return
        if job.state in OPEN_STATES:
            self._end_unclaimed(job)
        elif job.state == "done":
            self._trained(job)
        elif job.state == "cancelled":
            self.state.job_id = None
            self._cool(f"training {job.id} was cancelled: {job.error or 'no reason'}", failed=False)
        else:
            self._failed(job, f"training {job.id} failed after {job.attempts} attempts: {job.error or 'no reason'}")

    def _observing(self) -> None:
        guard = self.state.guard
        if self.state.job_id is None and (job := self._open_job()) is not None:
            self._follow(job)  # it may end before the guard has spoken
        if guard is None:
            self._watch(f"v{self.state.live} is live")
            return
        waited = self._clock() - self.state.since_s > cadence.DAY_S
        if guard.served == self._judged and not waited:
            return
        self._judged = guard.served
        judgement = guard.judge(self._settings.monitors)
        # A close question must not hold up learning: the next version is compared with this one anyway.
        lost = math.inf if judgement.difference is None else -judgement.difference
        close = lost <= self._settings.monitors.guard_margin and self._evidence_is_there()
        if judgement.verdict == "wait" and not waited and not close:
            self.state.sentence = judgement.reason
        elif judgement.verdict == "roll_back":
            self._undo(guard, judgement)
        else:
            why = "after a day" if waited else "to learn on"
            reason = judgement.reason if judgement.verdict == "keep" else f"kept {why}: {judgement.reason}"
            self._notices.resolve("DraftPromoted", f"v{guard.version}", reason)
            self._judged_hook(guard, self.state.generation, True)
            self.state.guard, self.state.failures, self.state.in_vain = None, 0, 0
            self._enter("watching", reason)

    def _cooling(self) -> None:
        if self._adopt_open_job() or 0 < self.state.until_s - self._clock() <= self._longest_pause():
            return
        if self._notices.is_open("TrainingBudgetSpent", LOOP) and self._budget_spent():
            return
        self._watch()

    def _held(self) -> None:
        if self._adopt_open_job():
            self._resumed("a training was asked for")
        elif self.state.until_s and not 0 < self.state.until_s - self._clock() <= cadence.DAY_S:
            self._resumed("a day has passed")
            self._watch()

    # -- asking for trainings ----------------------------------------------------------------

    def _request(self, reason: str, segments: list[str] | tuple[str, ...]) -> None:
        if self._budget_spent():
            return
        job = self._jobs.request(reason=reason, requested_by=ACTOR, segments=segments)
        if job is not None:
            self._train(job)

    def _budget_spent(self) -> bool:
        """Cool down if the trainings of a day are used up."""
        used = self._spent()
        if used.free_at_s is None:
            return False
        now, sentence = self._clock(), cadence.budget_sentence(used, self._settings.monitors)
        evidence = {"trainings": used.trainings, "seconds": used.seconds, "free_at_s": used.free_at_s}
        self._notices.open("TrainingBudgetSpent", LOOP, "ticket", sentence, evidence)
        self.state.until_s = min(used.free_at_s, now + self._longest_pause())
        self._enter("cooling", sentence)
        return True

    def _spent(self) -> cadence.Spent:
        """Add up a day's trainings, and tell people when there is room again."""
        now = self._clock()
        used = cadence.spent(self._jobs.since(now - cadence.DAY_S), self._settings.monitors, now)
        if used.free_at_s is None:
            self._notices.resolve("TrainingBudgetSpent", LOOP, "there is room for a training again")
        return used

    def _evidence_is_there(self) -> bool:
        """Whether enough was served since the last training for another one."""
        return self._settings.monitors.adapt and self.state.evidence.weight >= self._needed() and self._rested()

    def _rested(self) -> bool:
        ended = max((job.finished_at_s or job.created_at_s for job in self._jobs.latest(5)), default=None)
        return ended is None or self._clock() - ended >= self._settings.monitors.retrain_cooldown_s

    def _open_job(self) -> Job | None:
        return next((item for item in self._jobs.latest(5) if item.state in OPEN_STATES), None)

    def _adopt_open_job(self) -> bool:
        """Follow a job whose end was not seen yet, or that somebody else requested."""
        if self.state.job_id is not None:
            self._enter("training", f"training {self.state.job_id}")
            return True
        job = self._open_job()
        if job is not None:
            self._train(job)
        return job is not None

    def _train(self, job: Job) -> None:
        self._follow(job)
        self._enter("training", f"training {job.id}: {job.reason}")

    def _follow(self, job: Job) -> None:
        self.state.job_id, self.state.collected = job.id, 0
        self.state.evidence.take()

    def _end_unclaimed(self, job: Job) -> None:
        now = self._clock()
        silent = job.state == "queued" or (job.lease_until_s or 0) < now
        if job.requested_by == ACTOR and silent and now - job.created_at_s > cadence.DAY_S:
            with contextlib.suppress(RegistryError):  # a worker took it after all
                self._jobs.cancel(job.id, because="no worker took it for a day")

    # -- how trainings end -------------------------------------------------------------------

    def _trained(self, job: Job) -> None:
        outcome = outcome_of(job)
        if outcome is None:
            self._failed(job, f"training {job.id} ended with a result that cannot be read: {job.result!r}")
        elif outcome.state == "rejected":
            self._refused(job, outcome)
        elif self._settings.monitors.auto_promote and outcome.action == ADMIT:
            self._admit(outcome)
        elif self._settings.monitors.auto_promote:
            self._promote(job, outcome)
        else:
            self._passed()
            sentence = f"v{outcome.version} passed its gate and waits for a person: {outcome.sentence}"
            self._notices.open("CandidateReady", f"v{outcome.version}", "ticket", sentence, {})
            self._cool(sentence, failed=False)

    def _passed(self) -> None:
        self.state.job_id, self.state.refused = None, 0
        self.state.evidence.passed()

    def _refused(self, job: Job, outcome: Outcome) -> None:
        sentence = f"v{outcome.version} did not pass its gate: {outcome.sentence}"
        self._notices.open("CandidateRejected", f"v{outcome.version}", "info", sentence, {})
        self.state.job_id = None
        self.state.refused += 1
        if job.requested_by == ACTOR and not job.segments:  # asking for more evidence is pause enough
            self.state.evidence.refused()
            self._pause(sentence)
        else:
            self._in_vain(sentence, counts=job.requested_by == ACTOR)

    def _failed(self, job: Job, sentence: str) -> None:
        self._notices.open("TrainingFailed", job.id, "ticket", sentence, {})
        self.state.job_id = None
        self._in_vain(sentence, counts=job.requested_by == ACTOR)

    def _promote(self, job: Job, outcome: Outcome) -> None:
        if outcome.version == self.state.live:  # promoted just before a crash
            self._passed()
            self._watch(f"v{outcome.version} is live")
            return
        generation, live = self.state.generation, self.state.live
        done = promote(self._registry, outcome, job, live=live or 0, generation=generation, actor=ACTOR)
        if done.refused is not None:
            self.state.job_id = None
            self._cool(f"v{outcome.version} was not promoted: {done.refused}", failed=False)
        elif done.live is not None:
            self._passed()
            self._moved(done.live, because=outcome.sentence)

    def _admit(self, outcome: Outcome) -> None:
        """Let a version draft beside the live one; an attempt that somebody was faster than is made again."""
        if outcome.version in self._registry.live().alternates:  # admitted just before a crash
            self._passed()
            self._watch(f"v{self.state.live} stays live; {outcome.sentence}")
            return
        done = admit(
            self._registry, outcome, most=self._settings.engine.alternates, live=self.state.live or 0,
            generation=self.state.generation, actor=ACTOR,
        )  # fmt: skip
        if done.refused is not None:
            self.state.job_id = None
            self._cool(f"v{outcome.version} was not admitted: {done.refused}", failed=False)
        elif done.live is not None:
            self.state.generation = done.live.generation
            self._book.look_again(self.state.live or 0)  # what it lost on has another version now
            self._passed()
            self._cool(f"v{self.state.live} stays live; {outcome.sentence}", failed=False)

    def _undo(self, guard: Guard, judgement: Judgement) -> None:
        """Leave a version that is worse; one that is only back on the wrong traffic stays allowed."""
        reason, evidence = judgement.reason, judgement.evidence
        if guard.switch:
            with contextlib.suppress(ConflictError):  # somebody moved the alias; the next step sees it
                self._registry.roll_back(
                    actor=ACTOR, automatic=True, reason=reason, evidence=evidence,
                    expected_generation=self.state.generation,
                )  # fmt: skip
        else:
            self._registry.quarantine(guard.version, actor=ACTOR, automatic=True, reason=reason, evidence=evidence)
        self._moved(self._registry.live(), because=reason)


def _names(drifting: dict[str, DriftDetector]) -> str:
    names = sorted(drifting)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
