"""Open and resolve alerts, log them, and deliver them to people.

The alert table decides what is new; delivery happens on a thread of its own behind a bounded
queue, so a dead or slow webhook delays other messages at worst and the watcher never.  Webhook
addresses are secrets: only their scheme and host are logged.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import apprise
import structlog

from adapter.alerting import Alert, Alerts, Severity

log = structlog.get_logger(__name__)

_ATTEMPTS = 6
_KINDS = {
    "page": apprise.NotifyType.FAILURE,
    "ticket": apprise.NotifyType.WARNING,
    "info": apprise.NotifyType.INFO,
    "resolved": apprise.NotifyType.SUCCESS,
}


@dataclass(frozen=True, slots=True)
class Message:
    """What a person receives. `kind` is a severity, or `resolved`."""

    kind: str
    title: str
    body: str


@dataclass(slots=True)
class NotifierCounters:
    """Messages times addresses since start."""

    sent: int = 0
    retried: int = 0
    failed: int = 0
    dropped: int = 0


def apprise_url(url: str) -> str:
    """Turn a plain http(s) address into Apprise's JSON POST; leave every other URL alone.

    Apprise takes query arguments that start with a dash as arguments of the address itself.
    """
    parts = urlsplit(url)
    scheme = {"http": "json", "https": "jsons"}.get(parts.scheme)
    if scheme is None:
        return url
    query = urlencode([(f"-{name}", value) for name, value in parse_qsl(parts.query, keep_blank_values=True)])
    return urlunsplit((scheme, parts.netloc, parts.path or "/", query, ""))


def shown_url(url: str) -> str:
    """Return the part of a webhook address that is no secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}"


class Notifier:
    """Deliver messages to every address, with retries, from one thread.

    Args:
        urls: Apprise URLs, or plain http(s) addresses that receive a JSON POST.
        retry_s: pause before the second attempt; it doubles with every further one.
        capacity: deliveries waiting at the most; what does not fit is dropped and counted.
    """

    def __init__(self, urls: Sequence[str], *, retry_s: float = 2.0, capacity: int = 256) -> None:
        self._targets = [(shown_url(url), target) for url in urls if (target := _target(url)) is not None]
        self._retry_s = retry_s
        self._capacity = capacity
        self._waiting: list[tuple[float, int, int, int, Message]] = []  # due, order, attempt, target, message
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._stopped = False
        self.counters = NotifierCounters()
        self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)
        if self._targets:
            self._thread.start()

    def send(self, message: Message) -> None:
        """Queue a message for every address; never blocks."""
        with self._changed:
            for index in range(len(self._targets)):
                self._push(0.0, 1, index, message)
            self._changed.notify()

    def close(self, timeout_s: float = 0.5) -> None:
        """Stop; what is not delivered by now stays in the alert table only."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _push(self, delay_s: float, attempt: int, index: int, message: Message) -> None:
        if len(self._waiting) >= self._capacity:
            self.counters.dropped += 1
            return
        heapq.heappush(self._waiting, (time.monotonic() + delay_s, next(self._order), attempt, index, message))

    def _next(self) -> tuple[int, int, Message] | None:
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                if self._waiting and self._waiting[0][0] <= now:
                    _, _, attempt, index, message = heapq.heappop(self._waiting)
                    return attempt, index, message
                self._changed.wait(self._waiting[0][0] - now if self._waiting else None)
        return None

    def _run(self) -> None:
        while (item := self._next()) is not None:
            attempt, index, message = item
            shown, target = self._targets[index]
            if _deliver(target, message):
                self.counters.sent += 1
                continue
            log.warning("notification_failed", address=shown, title=message.title, attempt=attempt)
            with self._changed:
                if attempt >= _ATTEMPTS:
                    self.counters.failed += 1
                else:
                    self.counters.retried += 1
                    self._push(self._retry_s * 2 ** (attempt - 1), attempt + 1, index, message)


def _target(url: str) -> apprise.Apprise | None:
    target = apprise.Apprise()
    if target.add(apprise_url(url)):
        return target
    log.error("webhook_unusable", address=shown_url(url), expected="an Apprise URL, or http:// or https://")
    return None


def _deliver(target: apprise.Apprise, message: Message) -> bool:
    try:
        return bool(target.notify(title=message.title, body=message.body, notify_type=_KINDS[message.kind]))
    except Exception as error:  # a plug-in may raise anything, and the thread must outlive it
        log.warning("notification_error", title=message.title, error=repr(error))
        return False


class AlertDesk:
    """Open and resolve alerts; each real change is logged and delivered once."""

    def __init__(self, alerts: Alerts, notify: Callable[[Message], None]) -> None:
        self._alerts = alerts
        self._notify = notify

    def open(
        self, rule: str, key: str, severity: Severity, summary: str, evidence: dict[str, Any] | None = None
    ) -> Alert | None:
        """Open an alert; None when the same one is firing already."""
        alert = self._alerts.open(rule, key, severity, summary, evidence or {})
        if alert is not None:
            log.warning("alert_opened", rule=rule, key=key, severity=severity, summary=summary)
            self._notify(Message(severity, f"Draftsmith: {rule} ({key})", summary))
        return alert

    def resolve(self, rule: str, key: str, because: str) -> Alert | None:
        """Resolve an alert; None when it is not firing."""
        alert = self._alerts.resolve(rule, key)
        if alert is not None:
            log.info("alert_resolved", rule=rule, key=key, because=because)
            self._notify(Message("resolved", f"Draftsmith: {rule} ({key}) resolved", because))
        return alert

    def firing(self) -> list[Alert]:
        """Return the alerts that are open."""
        return [alert for alert in self._alerts.latest(500) if alert.resolved_at_s is None]
