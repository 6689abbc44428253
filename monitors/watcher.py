"""The watcher: reads outcomes, keeps detectors and windows, and drives the learning loop.

One thread calls `tick` a few times a second.  Redis or the database may be gone at any tick: what
was read is kept, and the next tick goes on.  Started by `python -m monitors`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import redis
import structlog
from sqlalchemy import Engine, delete, func, select

from adapter import tables
from adapter.accounting import Accounting
from adapter.alerting import Alerts
from adapter.contracts import RegistryError
from adapter.facts import ADVICE, DRIFT, ENGINE, WATCHER, Facts
from adapter.jobs import Jobs
from adapter.registry import Registry
from adapter.settings import Settings
from adapter.versions import Live
from monitors.acceptance import OutcomeReader, observations_of
from monitors.advisor import advise, load_of
from monitors.alerts import AlertDesk, Notifier
from monitors.announcer import Announcer
from monitors.champions import Champions
from monitors.guard import Guard
from monitors.loop import LearningLoop
from monitors.loop_state import loop_state
from monitors.metrics import Metrics
from monitors.payoff import Payoff
from monitors.segments import SegmentBook
from monitors.traffic import TrafficWindow

log = structlog.get_logger(__name__)

TICK_S = 0.25
_REDIS_SLACK_S = 3.0
_STATE = 1  # layout of the DRIFT document
_KEEP_WINDOWS_S = 30 * 86400.0
_PRUNE_EVERY_S = 3600.0


class Watcher:
    """Everything that runs beside the dashboard.

    Args:
        engine: a migrated database.
        client: a Redis client whose calls end by themselves.
        clock: epoch seconds.
        announce: tells a worker that a job waits; False when it could not.
        dashboard_url: where the operator finds the dashboard.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        *,
        client: redis.Redis,
        announce: Callable[[str], bool],
        notifier: Notifier | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.time,
        dashboard_url: str | None = None,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._facts = Facts(engine, clock=clock)
        self._accounting = Accounting(engine)
        self._registry = Registry(engine, clock=clock)
        self._announcer = Announcer(Jobs(engine, clock=clock), announce, clock)
        self._notifier = notifier or Notifier(settings.monitors.webhook_urls)
        self._metrics = metrics or Metrics()
        self._dashboard_url = dashboard_url
        self._down_since_s: float | None = None
        self._pruned_at_s = float("-inf")
        drift = self._facts.get(DRIFT) or {}
        self._traffic = TrafficWindow()
        self._prefix_cache = settings.engine.prefix_cache
        self.book = SegmentBook(settings.monitors)
        if drift.get("layout") == _STATE:
            self.book.restore(drift["versions"])
        self.reader = OutcomeReader(
            client, clock=clock, window_s=settings.monitors.window_s, watermark=str(drift.get("watermark", "0-0"))
        )
        for segment in sorted(self.book.known()):  # those of before the restart go on under their names
            self.reader.segments.name(segment, clock())
        self._desk = AlertDesk(Alerts(engine, clock=clock), self._notifier.send)
        self.champions = Champions(self._facts, self._registry, clock)
        self.payoff = Payoff(engine, settings, clock)
        self.loop = LearningLoop(
            settings,
            engine,
            book=self.book,
            desk=self._desk,
            clock=clock,
            state=loop_state(self._facts.get(WATCHER)),
            save=lambda state: self._save_watcher(),
            judged=self._judged,
            loses=self.payoff.loss,
        )
        self._save_watcher()

    def tick(self) -> None:
        """Do everything that is due now."""
        was_connected = self.reader.connected
        self.loop.step()
        outcomes = self.reader.poll()
        while self.reader.segments.expired:
            self.loop.forget(self.reader.segments.expired.pop())
        live = self._live() if outcomes else None
        for outcome in outcomes:
            self._metrics.count(outcome, live)
            self._traffic.add(outcome)
            if outcome.learn and outcome.delivered_tokens:
                self.loop.served(outcome.segment)
            for observation in observations_of(outcome):
                self.loop.observe(observation)
        self._watch_redis()
        if self.reader.connected:
            if was_connected is False:
                self._announcer.forget()
            self._announcer.tick()
        if self.reader.due():
            self.commit()

    def commit(self) -> None:
        """Store the open window and all states, then acknowledge what went into them."""
        self._accounting.add(self.reader.close_window())
        self._facts.put(
            DRIFT,
            {
                "layout": _STATE,
                "watermark": self.reader.last_entry(),
                "versions": self.book.to_state(),
                "shown": self._shown(),
            },
        )
        self._save_watcher()
        self._advise()
        self._learn_champions()
        self.payoff.follow()
        self.reader.committed()
        self._show()
        self._prune()

    def run(self, stop: threading.Event) -> None:
        """Tick until `stop` is set; then store what is in hand."""
        while not stop.is_set():
            self._guarded(self.tick)
            stop.wait(TICK_S)
        self._guarded(self.commit)
        self._notifier.close()

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:  # a locked database or a bug in one rule must not end the watch
            log.exception("tick_failed")

    def _live(self) -> Live | None:
        try:
            return self._registry.live()
        except RegistryError:
            return None

    def _watch_redis(self) -> None:
        if self.reader.connected:
            if self._down_since_s is not None:
                self._down_since_s = None
                self._desk.resolve("RedisDown", "redis", "the watcher reads Redis again")
            return
        now = self._clock()
        if self._down_since_s is None:
            self._down_since_s = now
        elif now - self._down_since_s > _REDIS_SLACK_S:
            self._desk.open(
                "RedisDown", "redis", "ticket", "Redis cannot be reached: serving goes on, learning is paused"
            )

    def _advise(self) -> None:
        load = load_of(self._facts.get(ENGINE) or {}, prefix_cache=self._prefix_cache)
        advice = advise(self._traffic.summarise(), load)
        self._facts.put(ADVICE, msgspec.to_builtins(advice) | {"at_s": self._clock()})

    def _prune(self) -> None:
        """Forget windows that no chart shows any more."""
        now = self._clock()
        if abs(now - self._pruned_at_s) < _PRUNE_EVERY_S:
            return
        with self._engine.begin() as connection:
            connection.execute(delete(tables.windows).where(tables.windows.c.at_s < now - _KEEP_WINDOWS_S))
        self._pruned_at_s = now

    def _judged(self, guard: Guard, generation: int, kept: bool) -> None:
        self.payoff.judged(guard, generation)
        if kept:
            self.champions.keep(guard)

    def _learn_champions(self) -> None:
        live = self.loop.state.live
        if live is not None and self.loop.state.guard is None:
            self.champions.follow(live, self.book.recent(live))
        self.champions.store()

    def _save_watcher(self) -> None:
        document: dict[str, Any] = {
            "loop": msgspec.to_builtins(self.loop.state) if hasattr(self, "loop") else {},
            "dashboard_url": self._dashboard_url,
            "pid": os.getpid(),
            "saved_at_s": self._clock(),
            "redis_up": bool(self.reader.connected),
            "garbage": self.reader.counters.garbage,
        }
        self._facts.put(WATCHER, document)

    def _shown(self) -> dict[str, Any]:
        """Return the live version's detectors as the dashboard shows them."""
        live = self.loop.state.live
        return {
            "version": live,
            "segments": {
                name: {
                    "requests": item.requests,
                    "baseline_requests": item.baseline_requests,
                    "baseline": item.baseline_mean,
                    "drifting": item.drifting,
                    "evidence": round(item.evidence, 3),
                    "needed": round(item.needed, 3),
                    "since": item.since,
                    "recent_mean": item.recent_mean,
                    "skipped": item.skipped,
                }
                for name, item in (self.book.detectors(live) if live is not None else {}).items()
            },
        }

    def _show(self) -> None:
        live = self._live()
        self._metrics.show_reader(self.reader.counters, self._notifier.counters, bool(self.reader.connected))
        self._metrics.show_drift(self.book.detectors(live.live) if live else {})
        firing = Counter(alert.severity for alert in self._desk.firing())
        with self._engine.execution_options(readonly=True).begin() as connection:
            query = select(tables.jobs.c.state, func.count()).group_by(tables.jobs.c.state)
            jobs = {str(state): int(number) for state, number in connection.execute(query)}
        self._metrics.show_states(live, firing, jobs)
