"""The learning loop: watching -> collecting -> training -> observing -> watching, and cooling.

Acts through the registry, the job table and alerts, and reads the segment book and the guard.  Its
state is one small document; every transition can be repeated after a crash, because it is decided
from what the registry and the job table say and not from what the loop believes it did.  Knows no
Redis; `monitors.announcer` tells the workers about jobs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
import structlog
from sqlalchemy import Engine

from adapter.contracts import FLOOR_VERSION, ConflictError, RegistryError
from adapter.hints import announcer
from adapter.jobs import OPEN_STATES, Job, Jobs
from adapter.registry import Registry
from adapter.settings import Settings
from adapter.versions import AuditEntry, Live
from monitors.alerts import AlertDesk
from monitors.drift import DriftDetector
from monitors.guard import Guard
from monitors.notices import Notices, drift_sentence
from monitors.segments import Observation, SegmentBook

log = structlog.get_logger(__name__)

ACTOR = "watcher"
Phase = Literal["watching", "collecting", "training", "observing", "cooling"]

_LONGEST_COOLING_S = 3600.0
_MOVES = ("promote", "roll_back", "install")


class LoopState(msgspec.Struct, kw_only=True):
    """Where the loop stands. `sentence` is what it is doing, in words for the screen."""

    phase: Phase = "watching"
    since_s: float = 0.0
    sentence: str = "waiting for the first requests"
    job_id: str | None = None
    generation: int = 0
    live: int | None = None
    until_s: float = 0.0
    failures: int = 0
    collected: int = 0
    guard: Guard | None = None


class LearningLoop:
    """Drive one deployment from drift to a new live version and back.

    Args:
        save: called with the state after every transition.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        *,
        book: SegmentBook,
        desk: AlertDesk,
        clock: Callable[[], float],
        state: LoopState | None = None,
        save: Callable[[LoopState], None] = lambda state: None,
    ) -> None:
        self._settings = settings
        self._registry = Registry(engine, clock=clock, announce=announcer(settings))
        self._jobs = Jobs(engine, clock=clock)
        self._book = book
        self._clock = clock
        self._save = save
        self.state = state or LoopState(since_s=clock())
        self._notices = Notices(desk, clock)
        self._judged = -1  # requests the guard had seen when it was last asked

    def observe(self, observation: Observation) -> None:
        """Feed one request of one version; only requests of the live version are judged."""
        if observation.version != self.state.live:
            return
        detector = self._book.observe(observation)
        if detector.drift_detected:
            self.state.collected += detector.since
        elif detector.drifting:
            self.state.collected += 1
        guard = self.state.guard
        if guard is not None and observation.value is not None:
            guard.observe(self._book.segment_name(observation.version, observation.segment), observation.value)

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
        if self._adopt_open_job():
            return
        drifting = self._drifting()
        if drifting:
            self._enter("collecting", f"acceptance fell on {_names(drifting)}; collecting requests to train on")

    def _collecting(self) -> None:
        if self._adopt_open_job():
            return
        drifting = self._drifting()
        if not drifting:
            self._enter("watching", "acceptance recovered by itself")
            return
        need = self._settings.distill.min_requests
        if self.state.collected < need:
            return
        job = self._jobs.request(reason=self._why(drifting), requested_by=ACTOR)
        if job is not None:
            self.state.collected = 0
            self._train(job)

    def _training(self) -> None:
        try:
            job = self._jobs.get(self.state.job_id or "")
        except RegistryError:
            self.state.job_id = None
            self._enter("watching", "the training job is gone")
            return
        if job.state in OPEN_STATES:
            return
        if job.state == "done":
            self._trained(job)
            return
        self.state.job_id = None
        if job.state == "cancelled":
            self._cool(f"training {job.id} was cancelled", failed=False)
        else:
            self._failed(job.id, f"training {job.id} failed after {job.attempts} attempts: {job.error or 'no reason'}")

    def _observing(self) -> None:
        guard = self.state.guard
        if guard is None:
            self._enter("watching", f"v{self.state.live} is live")
            return
        if guard.served == self._judged:
            return
        self._judged = guard.served
        judgement = guard.judge(self._settings.monitors)
        if judgement.verdict == "wait":
            self.state.sentence = judgement.reason
        elif judgement.verdict == "keep":
            self._notices.resolve("DraftPromoted", f"v{guard.version}", judgement.reason)
            self.state.guard, self.state.failures = None, 0
            self._enter("watching", judgement.reason)
        else:
            self._registry.quarantine(
                guard.version, actor=ACTOR, automatic=True, reason=judgement.reason, evidence=judgement.evidence
            )
            self._moved(self._registry.live(), because=judgement.reason)

    def _cooling(self) -> None:
        if not 0 < self.state.until_s - self._clock() <= self._longest_pause():
            self._enter("watching", "watching acceptance")

    # -- transitions -------------------------------------------------------------------------

    def _enter(self, phase: Phase, sentence: str) -> None:
        log.info("loop", phase=phase, was=self.state.phase, sentence=sentence)
        self.state.phase, self.state.sentence, self.state.since_s = phase, sentence, self._clock()
        self._save(self.state)

    def _train(self, job: Job) -> None:
        self.state.job_id = job.id
        self._enter("training", f"training {job.id}: {job.reason}")

    def _adopt_open_job(self) -> bool:
        """Follow a job whose end was not seen yet, or that somebody else requested."""
        if self.state.job_id is not None:
            self._enter("training", f"training {self.state.job_id}")
            return True
        job = next((item for item in self._jobs.latest(5) if item.state in OPEN_STATES), None)
        if job is not None:
            self._train(job)
        return job is not None

    def _cool(self, sentence: str, *, failed: bool) -> None:
        self.state.failures = self.state.failures + 1 if failed else 0
        pause = self._settings.monitors.retrain_cooldown_s * 2 ** max(0, min(self.state.failures, 12) - 1)
        self.state.until_s = self._clock() + min(pause, self._longest_pause())
        self.state.collected = 0
        self._enter("cooling", sentence)

    def _longest_pause(self) -> float:
        return max(_LONGEST_COOLING_S, self._settings.monitors.retrain_cooldown_s)

    def _failed(self, key: str, sentence: str) -> None:
        self._notices.open("TrainingFailed", key, "ticket", sentence, {})
        self._cool(sentence, failed=True)

    def _trained(self, job: Job) -> None:
        version, verdict = job.result.get("version"), str(job.result.get("verdict") or "no verdict")
        promotable = job.result.get("state") == "ready" and self._settings.monitors.auto_promote
        if isinstance(version, int) and promotable:
            self._promote(version, verdict)
            return
        self.state.job_id = None
        if not isinstance(version, int) or job.result.get("state") not in ("ready", "rejected"):
            self._failed(job.id, f"training {job.id} ended with a result that cannot be read: {job.result!r}")
        elif job.result["state"] == "rejected":
            sentence = f"v{version} did not pass its gate: {verdict}"
            self._notices.open("CandidateRejected", f"v{version}", "info", sentence, {})
            self._cool(sentence, failed=True)
        else:
            sentence = f"v{version} passed its gate and waits for a person: {verdict}"
            self._notices.open("CandidateReady", f"v{version}", "ticket", sentence, {})
            self._cool(sentence, failed=False)

    def _promote(self, version: int, verdict: str) -> None:
        if version == self.state.live:  # promoted just before a crash
            self.state.job_id = None
            self._enter("watching", f"v{version} is live")
            return
        try:
            draft = self._registry.draft(version)
            if draft.parent != self.state.live:  # somebody moved the alias while it was being trained
                self.state.job_id = None
                self._cool(
                    f"v{version} was not promoted: it was compared with v{draft.parent}, and v{self.state.live} is "
                    "live now",
                    failed=False,
                )
                return
            live = self._registry.promote(
                version,
                actor=ACTOR,
                automatic=True,
                reason=verdict,
                evidence=draft.gate,
                expected_generation=self.state.generation,
            )
        except ConflictError:
            return  # somebody moved the alias; the next step sees it and decides again
        except RegistryError as error:
            self.state.job_id = None
            self._cool(f"v{version} was not promoted: {error}", failed=False)
            return
        self.state.job_id = None
        self._moved(live, because=verdict)

    def _moved(self, live: Live, because: str | None = None) -> None:
        """Take note that another version is live, whoever moved the alias."""
        first_look, left = self.state.generation == 0, self.state.live
        move = self._last_move(live.generation)
        reason = because or (move.reason if move else "")
        self.state.generation, self.state.live = live.generation, live.live
        if left is not None and left != live.live:
            self._notices.resolve("DraftPromoted", f"v{left}", f"v{live.live} is live now: {reason}")
        self.state.guard, self._judged = None, -1
        if first_look:
            self._enter("watching", f"v{live.live} is live")
        elif move is not None and move.verb == "promote" and live.live != FLOOR_VERSION:
            self._observe_new(live, move.actor, reason)
        elif left != live.live:
            automatic = move is not None and move.automatic
            if automatic and move is not None:
                self._notices.open("DraftRolledBack", f"v{left}", "ticket", reason, move.evidence)
            self._cool(f"v{live.live} is live again: {reason}", failed=automatic)
        else:
            self._save(self.state)

    def _observe_new(self, live: Live, actor: str, reason: str) -> None:
        previous = FLOOR_VERSION if live.previous is None else live.previous
        self.state.guard = Guard(version=live.live, previous=previous, reference=self._book.recent(previous))
        self.state.collected = 0
        self._notices.resolve("CandidateReady", f"v{live.live}", f"v{live.live} was promoted")
        self._notices.open("DraftPromoted", f"v{live.live}", "info", f"{actor} promoted v{live.live}: {reason}", {})
        self._enter("observing", f"v{live.live} is live and compared with v{previous}")

    # -- words -------------------------------------------------------------------------------

    def _drifting(self) -> dict[str, DriftDetector]:
        return {} if self.state.live is None else self._book.drifting(self.state.live)

    def _why(self, drifting: dict[str, DriftDetector]) -> str:
        return "; ".join(drift_sentence(name, detector) for name, detector in sorted(drifting.items())[:3])

    def _last_move(self, generation: int) -> AuditEntry | None:
        return next(
            (row for row in self._registry.audit(50) if row.generation == generation and row.verb in _MOVES), None
        )


def _names(drifting: dict[str, DriftDetector]) -> str:
    names = sorted(drifting)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
