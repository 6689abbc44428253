"""The watcher's Prometheus metrics: raw counters and states, never rates.

Served at the dashboard's `/metrics`.  The label `version` says live, previous, floor or other,
because version numbers grow without bound.  acceptance = accepted / examined, for example
`rate(draftsmith_acceptance_accepted_tokens_total[5m]) / rate(draftsmith_acceptance_examined_tokens_total[5m])`.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.metrics import MetricWrapperBase

from adapter.contracts import FLOOR_VERSION, RequestOutcome
from adapter.versions import Live
from monitors.acceptance import ReaderCounters
from monitors.alerts import NotifierCounters
from monitors.drift import DriftDetector

ROLES = ("live", "previous", "floor", "other")
_JOB_STATES = ("queued", "running", "done", "failed", "cancelled")
_SEVERITIES = ("page", "ticket", "info")


def role_of(version: int, live: Live | None) -> str:
    """Return the bounded name of a version."""
    if live is not None and version == live.live:
        return "live"
    if live is not None and version == live.previous:
        return "previous"
    return "floor" if version == FLOOR_VERSION else "other"


class Metrics:
    """All metrics of the watcher in a registry of their own, every series present from the start."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("acceptance_requests", "Requests with speculation", ROLES)
        self.rounds = self._counter("acceptance_rounds", "Speculative rounds", ROLES)
        self.drafted = self._counter("acceptance_drafted_tokens", "Tokens drafted", ROLES)
        self.examined = self._counter("acceptance_examined_tokens", "Drafted tokens that verification looked at", ROLES)
        self.accepted = self._counter("acceptance_accepted_tokens", "Drafted tokens that were kept", ROLES)
        self.plain_requests = self._plain("plain_requests", "Requests for which the draft model drafted nothing")
        self.delivered = self._plain(
            "delivered_tokens",
            "Tokens that clients received; a stop string found after the engine ended the answer takes none off",
        )
        self.outcomes = self._labelled("outcomes", "Outcome entries read", "result", ("ok", "garbage", "duplicate"))
        self.redis_errors = self._plain("watcher_redis_errors", "Failed Redis calls of the watcher")
        self.notifications = self._labelled(
            "notifications", "Alert deliveries", "result", ("sent", "retried", "failed", "dropped")
        )
        self.generation = Gauge("draftsmith_watcher_generation", "Alias generation in force", registry=self.registry)
        self.redis_up = Gauge("draftsmith_redis_up", "1 while the watcher reads Redis", registry=self.registry)
        self.evidence = Gauge(
            "draftsmith_drift_evidence_log10", "Evidence for a drop of acceptance", ["segment"], registry=self.registry
        )
        self.needed = Gauge(
            "draftsmith_drift_evidence_needed_log10", "Evidence at which drift is called", registry=self.registry
        )
        self.drifting = Gauge("draftsmith_drifting_segments", "Segments below their baseline", registry=self.registry)
        self.alerts = Gauge("draftsmith_alerts_firing", "Open alerts", ["severity"], registry=self.registry)
        self.jobs = Gauge("draftsmith_train_jobs", "Training jobs by state", ["state"], registry=self.registry)
        for gauge, values in ((self.alerts, _SEVERITIES), (self.jobs, _JOB_STATES)):
            for value in values:
                gauge.labels(value).set(0)

    def count(self, outcome: RequestOutcome, live: Live | None) -> None:
        """Add one request."""
        self.delivered.inc(outcome.delivered_tokens)
        if not outcome.by_version:
            self.plain_requests.inc()
            return
        owner = max(outcome.by_version, key=lambda item: item.counts.num_rounds)
        self.requests.labels(role_of(owner.version, live)).inc()
        for item in outcome.by_version:
            role = role_of(item.version, live)
            self.rounds.labels(role).inc(item.counts.num_rounds)
            self.drafted.labels(role).inc(item.counts.num_drafted)
            self.examined.labels(role).inc(item.counts.num_examined)
            self.accepted.labels(role).inc(item.counts.num_accepted)

    def show_reader(self, counters: ReaderCounters, notifier: NotifierCounters, connected: bool) -> None:
        """Carry over the counters that others keep."""
        for label, value in (
            ("ok", counters.outcomes),
            ("garbage", counters.garbage),
            ("duplicate", counters.duplicates),
        ):
            _raise_to(self.outcomes.labels(label), value)
        for name in ("sent", "retried", "failed", "dropped"):
            _raise_to(self.notifications.labels(name), getattr(notifier, name))
        _raise_to(self.redis_errors, counters.redis_errors)
        self.redis_up.set(connected)

    def show_drift(self, detectors: Mapping[str, DriftDetector]) -> None:
        """Show the detectors of the live version; series of former segments go away."""
        self.evidence.clear()
        for segment, detector in detectors.items():
            self.evidence.labels(segment).set(detector.evidence)
            self.needed.set(detector.needed)
        self.drifting.set(sum(detector.drifting for detector in detectors.values()))

    def show_states(self, live: Live | None, alerts: Mapping[str, int], jobs: Mapping[str, int]) -> None:
        """Show what SQL says; `alerts` by severity and `jobs` by state."""
        self.generation.set(live.generation if live else 0)
        for severity in _SEVERITIES:
            self.alerts.labels(severity).set(alerts.get(severity, 0))
        for state in _JOB_STATES:
            self.jobs.labels(state).set(jobs.get(state, 0))

    def _counter(self, name: str, text: str, roles: tuple[str, ...]) -> Counter:
        return self._labelled(name, text, "version", roles)

    def _labelled(self, name: str, text: str, label: str, values: tuple[str, ...]) -> Counter:
        counter = Counter(f"draftsmith_{name}", text, [label], registry=self.registry)
        for value in values:
            counter.labels(value)
        return counter

    def _plain(self, name: str, text: str) -> Counter:
        return Counter(f"draftsmith_{name}", text, registry=self.registry)


def _raise_to(counter: MetricWrapperBase, value: int) -> None:
    current = counter._value.get()  # type: ignore[attr-defined]  # the library has no reader outside its tests
    if value > current:
        counter.inc(value - current)  # type: ignore[attr-defined]
