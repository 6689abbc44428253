"""Which alerts the learning loop raises, when they end by themselves, and in what words.

Alerts about a condition (drift, a job nobody takes) follow the condition; notices about an event
(a promotion, a failed training) end after an hour or when the loop says so.  Open ones are read
from SQL at start, so a restart neither repeats nor forgets them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adapter.alerting import Severity
from adapter.jobs import Job
from monitors.alerts import AlertDesk
from monitors.drift import DriftDetector
from monitors.tails import ALL_ACCEPTED, NONE_ACCEPTED, Tails, tail_sentence

_STAYS_S = 3600.0
_UNCLAIMED_S = 120.0
_EVENTS = ("DraftPromoted", "DraftRolledBack", "TrainingFailed", "CandidateRejected")
_TAILS = (NONE_ACCEPTED, ALL_ACCEPTED)
_STOPS = ("TrainingBudgetSpent", "AdaptationGivesUp", "AdaptationDoesNotPay")
_OWN = (*_EVENTS, *_TAILS, *_STOPS, "AcceptanceDrift", "CandidateReady", "TrainingUnclaimed")
LOOP = "loop"  # the key of alerts about the loop as a whole


class Notices:
    """The loop's alerts. `clock` is epoch seconds."""

    def __init__(self, desk: AlertDesk, clock: Callable[[], float]) -> None:
        self._desk = desk
        self._clock = clock
        self._open = {(item.rule, item.key): item.opened_at_s for item in desk.firing() if item.rule in _OWN}

    def open(self, rule: str, key: str, severity: Severity, summary: str, evidence: dict[str, Any]) -> None:
        """Open an alert unless it is open."""
        if (rule, key) not in self._open:
            self._desk.open(rule, key, severity, summary, evidence)
            self._open[rule, key] = self._clock()

    def resolve(self, rule: str, key: str, because: str) -> None:
        """Resolve an alert if it is open."""
        if (rule, key) in self._open:
            self._desk.resolve(rule, key, because)
            del self._open[rule, key]

    def is_open(self, rule: str, key: str) -> bool:
        """Tell whether an alert is open."""
        return (rule, key) in self._open

    def stop(self, rule: str, sentence: str) -> None:
        """Tell people that the loop asks for no more trainings, in one of the sentences of `monitors.cadence`."""
        self.open(rule, LOOP, "ticket", sentence, {})

    def go_on(self, because: str) -> None:
        """Resolve what `stop` told."""
        for rule in ("AdaptationGivesUp", "AdaptationDoesNotPay"):
            self.resolve(rule, LOOP, because)

    def expire(self) -> None:
        """Resolve events that have been on the screen long enough."""
        now = self._clock()
        for rule, key in [name for name, at_s in self._open.items() if now - at_s > _STAYS_S]:
            if rule in _EVENTS:
                self.resolve(rule, key, "an hour has passed")

    def follow_drift(self, detectors: dict[str, DriftDetector], live: int) -> None:
        """Keep one alert open for each segment of the live version that is below its baseline."""
        for name, detector in detectors.items():
            if detector.drifting:
                self.open("AcceptanceDrift", name, "ticket", drift_sentence(name, detector), drift_evidence(detector))
        for rule, name in [item for item in self._open if item[0] == "AcceptanceDrift"]:
            current = detectors.get(name)
            if current is None or not current.drifting:
                learning = current is None or current.baseline is None
                because = f"v{live} is live and sets its own baseline" if learning else "acceptance is back"
                self.resolve(rule, name, because)

    def follow_tails(self, tails: dict[str, Tails], live: int) -> None:
        """Keep one alert open for each end at which a segment of the live version has more requests than it had."""
        for segment, ends in tails.items():
            for rule, test in ends.tests.items():
                if test.drifting:
                    self.open(rule, segment, "ticket", tail_sentence(rule, segment, test), drift_evidence(test))
        for rule, segment in [item for item in self._open if item[0] in _TAILS]:
            if segment not in tails:
                self.resolve(rule, segment, f"v{live} is live and sets its own baseline")
            elif not tails[segment].tests[rule].drifting:
                self.resolve(rule, segment, "as many requests as before")

    def follow_jobs(self, jobs: list[Job]) -> None:
        """Keep one alert open for each job that no worker takes."""
        now = self._clock()
        waiting = {job.id: now - job.created_at_s for job in jobs if job.state == "queued" and not job.attempts}
        for job_id, seconds in waiting.items():
            if seconds > _UNCLAIMED_S:
                sentence = f"training {job_id} has waited for {seconds:.0f} s and no worker takes it"
                self.open("TrainingUnclaimed", job_id, "ticket", sentence, {})
        for rule, key in [item for item in self._open if item[0] == "TrainingUnclaimed"]:
            if key not in waiting:
                self.resolve(rule, key, "it no longer waits")


def drift_sentence(name: str, detector: DriftDetector) -> str:
    """Say what happened to a segment."""
    now = f" to {detector.recent_mean:.3f}" if detector.recent_mean is not None else ""
    return f"acceptance of {name} fell from {detector.baseline_mean or 0:.3f}{now} over {detector.since} requests"


def drift_evidence(detector: DriftDetector) -> dict[str, Any]:
    """Return the numbers behind a drift alert; the tails tell corruption (0) and repetition loops (1)."""
    return {
        "baseline_mean": detector.baseline_mean,
        "baseline_bound": detector.baseline,
        "mean_since": detector.recent_mean,
        "requests_since": detector.since,
        "evidence_needed_log10": round(detector.needed, 3),
        "near_zero": detector.near_zero,
        "exact_zero": detector.exact_zero,
        "near_one": detector.near_one,
        "requests": detector.requests,
        "skipped": detector.skipped,
    }
