"""Acceptance windows in SQL: what each draft version did for each segment, a few seconds a row.

The watcher writes them from request outcomes; the dashboard, the CLI and the demo read them.  Rows
hold counts and sums, never rates.  Judgements are about requests, because the tokens of one
request go together: `acceptance_sum` and `acceptance_sum_squares` run over requests.
"""

from __future__ import annotations

import math

import msgspec
from sqlalchemy import Engine, func, insert, select

from adapter.tables import windows

_Z95 = 1.959963984540054


class Tally(msgspec.Struct, kw_only=True):
    """Counts and sums of one segment and version, while they are added up."""

    requests: int = 0
    rounds: int = 0
    drafted: int = 0
    examined: int = 0
    accepted: int = 0
    delivered: int = 0
    acceptance_sum: float = 0.0
    acceptance_sum_squares: float = 0.0
    judged_requests: int = 0


class Window(Tally, frozen=True, kw_only=True):  # type: ignore[misc]  # msgspec can freeze a subclass alone
    """One window of one segment and version. `version` None is traffic the draft model had no part in."""

    at_s: float
    seconds: float
    segment: str
    version: int | None


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """Acceptance with its 95 % interval over requests; None where nothing was examined.

    `value` is Σ accepted / Σ examined.  The interval is the normal one for the mean of
    per-request acceptance, which respects that tokens of one request are not independent.
    """

    value: float | None
    n: int  # requests
    interval: tuple[float, float] | None
    tokens_per_round: float | None


def summarise(rows: list[Window]) -> Acceptance:
    """Merge windows into one acceptance with its interval."""
    examined = sum(row.examined for row in rows)
    accepted = sum(row.accepted for row in rows)
    rounds = sum(row.rounds for row in rows)
    n = sum(row.judged_requests for row in rows)
    if not examined or not n:
        return Acceptance(value=None, n=n, interval=None, tokens_per_round=None)
    value = accepted / examined
    mean = sum(row.acceptance_sum for row in rows) / n
    variance = max(0.0, sum(row.acceptance_sum_squares for row in rows) / n - mean * mean)
    half = _Z95 * math.sqrt(variance / max(1, n - 1)) if n > 1 else 1.0
    interval = (max(0.0, value - half), min(1.0, value + half))
    return Acceptance(value=value, n=n, interval=interval, tokens_per_round=1 + accepted / rounds if rounds else None)


class Accounting:
    """Append and read windows."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._read = engine.execution_options(readonly=True)

    def add(self, rows: list[Window]) -> None:
        """Store windows."""
        if rows:
            with self._engine.begin() as connection:
                connection.execute(insert(windows), [msgspec.structs.asdict(row) for row in rows])

    def between(self, since_s: float, until_s: float | None = None) -> list[Window]:
        """Return windows that ended after `since_s` and not after `until_s`, oldest first."""
        query = select(*[windows.c[name] for name in Window.__struct_fields__]).where(windows.c.at_s > since_s)
        if until_s is not None:
            query = query.where(windows.c.at_s <= until_s)
        with self._read.begin() as connection:
            return [
                Window(**row) for row in connection.execute(query.order_by(windows.c.at_s, windows.c.id)).mappings()
            ]

    def newest_at_s(self) -> float | None:
        """Return when the newest window ended."""
        with self._read.begin() as connection:
            return connection.execute(select(func.max(windows.c.at_s))).scalar_one_or_none()
