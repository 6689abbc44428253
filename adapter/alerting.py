"""Open and resolved alerts in SQL; at most one open alert for each (rule, key)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec
from sqlalchemy import Engine, insert, select, update

from adapter.tables import alerts

Severity = Literal["page", "ticket", "info"]


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """One alert; `resolved_at_s` None means it is firing."""

    id: int
    rule: str
    key: str
    severity: str
    summary: str
    evidence: dict[str, Any]
    opened_at_s: float
    resolved_at_s: float | None


class Alerts:
    """The alert table."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._read = engine.execution_options(readonly=True)
        self._clock = clock

    def open(self, rule: str, key: str, severity: Severity, summary: str, evidence: dict[str, Any]) -> Alert | None:
        """Open an alert; None when the same one is open already."""
        with self._engine.begin() as connection:
            same = (alerts.c.rule == rule) & (alerts.c.key == key) & alerts.c.resolved_at_s.is_(None)
            if connection.execute(select(alerts.c.id).where(same)).first():
                return None
            new = insert(alerts).values(
                rule=rule, key=key, severity=severity, summary=summary, evidence=evidence, opened_at_s=self._clock()
            )
            return Alert(**connection.execute(new.returning(*alerts.c)).mappings().one())

    def resolve(self, rule: str, key: str) -> Alert | None:
        """Resolve the open alert of (rule, key); None when there is none."""
        with self._engine.begin() as connection:
            same = (alerts.c.rule == rule) & (alerts.c.key == key) & alerts.c.resolved_at_s.is_(None)
            row = connection.execute(select(alerts).where(same)).mappings().first()
            if row is None:
                return None
            now = self._clock()
            connection.execute(update(alerts).where(alerts.c.id == row["id"]).values(resolved_at_s=now))
            return Alert(**{**row, "resolved_at_s": now})

    def latest(self, limit: int = 50) -> list[Alert]:
        """Return firing alerts first, then resolved ones, newest first."""
        with self._read.begin() as connection:
            order = (alerts.c.resolved_at_s.is_not(None), alerts.c.opened_at_s.desc())
            return [Alert(**row) for row in connection.execute(select(alerts).order_by(*order).limit(limit)).mappings()]
