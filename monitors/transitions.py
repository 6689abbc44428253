"""The learning loop's state and how it changes: pauses, holds, and moves of the alias that it takes note of.

Base of `monitors.loop.LearningLoop`, which decides when; knows nothing of how jobs end.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
from sqlalchemy import Engine

from adapter.contracts import FLOOR_VERSION, RegistryError
from adapter.hints import announcer
from adapter.jobs import Jobs
from adapter.registry import Registry
from adapter.settings import Settings
from adapter.versions import AuditEntry, Live
from monitors import cadence
from monitors.alerts import AlertDesk
from monitors.drift import DriftDetector
from monitors.guard import Guard
from monitors.loop_state import LoopState, Phase
from monitors.notices import Notices, drift_sentence
from monitors.outcomes import SWITCH
from monitors.segments import SegmentBook

log = structlog.get_logger(__name__)

LONGEST_COOLING_S = 3600.0
_MOVES = ("promote", "roll_back", "install")  # of the alias `live`


class Transitions:
    """What one deployment's loop is doing, and every way to change that.

    Args:
        save: called with the state after every transition.
        judged: called with a guard that has seen enough or was cut short, its version's generation, and whether it
            stays.
        loses: says in a sentence that trainings do not pay since a time (epoch seconds), or None.
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
        judged: Callable[[Guard, int, bool], None] = lambda guard, generation, kept: None,
        loses: Callable[[float], str | None] = lambda since_s: None,
    ) -> None:
        self._settings = settings
        self._registry = Registry(engine, clock=clock, announce=announcer(settings))
        self._jobs = Jobs(engine, clock=clock)
        self._book = book
        self._clock = clock
        self._save, self._judged_hook, self._loses = save, judged, loses
        self.state = state or LoopState(since_s=clock())
        self._notices = Notices(desk, clock)
        self._judged = -1  # requests the guard had seen when it was last asked

    def _enter(self, phase: Phase, sentence: str) -> None:
        log.info("loop", phase=phase, was=self.state.phase, sentence=sentence)
        self.state.phase, self.state.sentence, self.state.since_s = phase, sentence, self._clock()
        self._save(self.state)

    def _watch(self, sentence: str | None = None) -> None:
        if sentence is None:
            settings = self._settings.monitors
            if self.state.refused >= settings.failures_in_a_row:
                missing = self.state.evidence.missing(self._needed()) if settings.adapt else None
                sentence = cadence.nothing_pays_sentence(self.state.refused, self.state.live, missing)
            else:
                why = "" if settings.adapt else "; a training starts only when a person asks: monitors.adapt is off"
                sentence = "watching acceptance" + why
        self._enter("watching", sentence)

    def _cool(self, sentence: str, *, failed: bool) -> None:
        self.state.failures = self.state.failures + 1 if failed else 0
        self._pause(sentence)

    def _pause(self, sentence: str) -> None:
        pause = self._settings.monitors.retrain_cooldown_s * 2 ** max(0, min(self.state.failures, 12) - 1)
        self.state.until_s = self._clock() + min(pause, self._longest_pause())
        self.state.collected = 0
        self._enter("cooling", sentence)

    def _longest_pause(self) -> float:
        return max(LONGEST_COOLING_S, self._settings.monitors.retrain_cooldown_s)

    def _hold(self, rule: str, sentence: str, *, until_s: float) -> None:
        self._notices.stop(rule, sentence)
        self.state.until_s = until_s
        self._enter("held", sentence)

    def _resumed(self, because: str) -> None:
        """Note that the loop may ask for trainings again."""
        self._notices.go_on(because)
        self.state.resumed_at_s = self._clock()
        self.state.in_vain = self.state.failures = 0
        self._save(self.state)

    def _moved(self, live: Live, because: str | None = None) -> None:
        """Take note that another version is live, whoever moved the alias."""
        first_look, left, was = self.state.generation == 0, self.state.live, self.state.generation
        move = self._last_move(was, live.generation)
        if not first_look and move is None and left == live.live:  # alternates came or went
            self.state.generation = live.generation
            self._save(self.state)
            return
        reason = because or (move.reason if move else "")
        held = self.state.phase == "held"
        self.state.generation, self.state.live = live.generation, live.live
        if left is not None and left != live.live:
            self._notices.resolve("DraftPromoted", f"v{left}", f"v{live.live} is live now: {reason}")
        if self.state.guard is not None:
            self._judged_hook(self.state.guard, was, False)
        self.state.guard, self._judged = None, -1
        if held:
            self._resumed(f"v{live.live} is live now")
        if first_look:
            self._watch(f"v{live.live} is live")
        elif move is not None and move.verb == "promote" and live.live != FLOOR_VERSION:
            self._observe_new(live, move, reason)
        elif left != live.live:
            self._went_back(live, left, move, reason)
        elif held:
            self._watch()
        else:
            self._save(self.state)

    def _went_back(self, live: Live, left: int | None, move: AuditEntry | None, reason: str) -> None:
        sentence = f"v{live.live} is live again: {reason}"
        if move is not None and move.automatic:
            self._notices.open("DraftRolledBack", f"v{left}", "ticket", reason, move.evidence)
            self._in_vain(sentence, counts=self._settings.monitors.adapt)
        else:
            self._cool(sentence, failed=False)

    def _observe_new(self, live: Live, move: AuditEntry, reason: str) -> None:
        previous = FLOOR_VERSION if live.previous is None else live.previous
        switch = move.evidence.get("action") == SWITCH
        if switch:
            self._book.look_again(live.live)  # what made it drift once was other traffic
        self.state.guard = Guard(
            version=live.live, previous=previous, reference=self._book.recent(previous), switch=switch
        )
        self.state.collected = 0
        self._keep_beside(previous, live, move)
        self._notices.resolve("CandidateReady", f"v{live.live}", f"v{live.live} was promoted")
        self._notices.open(
            "DraftPromoted", f"v{live.live}", "info", f"{move.actor} promoted v{live.live}: {reason}", {}
        )
        self._enter("observing", f"v{live.live} is live and compared with v{previous}")

    def _keep_beside(self, previous: int, live: Live, move: AuditEntry) -> None:
        """Let what was live go on drafting for requests it fits better, where nobody but the loop decided."""
        most = self._settings.engine.alternates
        if not (move.automatic and most) or previous in live.alternates:
            return
        reason = f"it was live before v{live.live}, and some requests may still fit it better"
        try:
            after = self._registry.admit(
                previous, most=most, actor=move.actor, automatic=True, reason=reason,
                expected_generation=live.generation,
            )  # fmt: skip
        except RegistryError as error:  # a conflict, or a version that may not draft any more
            log.info("not_kept_beside", version=previous, reason=str(error))
        else:
            self.state.generation = after.generation

    def _in_vain(self, sentence: str, *, counts: bool) -> None:
        """Cool down, or give up where this was one time too often."""
        self.state.in_vain += counts
        if counts and self.state.in_vain >= self._settings.monitors.failures_in_a_row:
            gave_up = cadence.given_up_sentence(self.state.in_vain, sentence)
            self._hold("AdaptationGivesUp", gave_up, until_s=self._clock() + cadence.DAY_S)
        else:
            self._cool(sentence, failed=True)

    def _needed(self) -> int:
        return max(self._settings.monitors.evidence_requests, self._settings.distill.min_requests)

    def _drifting(self) -> dict[str, DriftDetector]:
        return {} if self.state.live is None else self._book.drifting(self.state.live)

    def _why(self, drifting: dict[str, DriftDetector]) -> str:
        return "; ".join(drift_sentence(name, detector) for name, detector in sorted(drifting.items())[:3])

    def _last_move(self, after: int, generation: int) -> AuditEntry | None:
        """Return the newest move of the alias `live` in these generations."""
        rows = (row for row in self._registry.audit(50) if after < row.generation <= generation)
        return next((row for row in rows if row.verb in _MOVES), None)
