"""Figures from what the watcher recorded and from what clients saw, over stretches of time.

A stretch begins when all earlier requests have ended and are recorded, so no window holds requests
of two of them.  Reads SQL through `adapter.accounting`; called by `serving.demo.stages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapter.accounting import Accounting, Window, summarise
from serving.demo.traffic import Reply


def acceptance(accounting: Accounting, since_s: float, until_s: float, version: int) -> dict[str, Any]:
    """Return acceptance of one version over a stretch: value, n and 95 % interval, None where unknown."""
    rows = [row for row in accounting.between(since_s, until_s) if row.version == version]
    found = summarise(rows)
    return {
        "value": None if found.value is None else round(found.value, 4),
        "n": found.n,
        "interval": None if found.interval is None else [round(edge, 4) for edge in found.interval],
    }


def recorded_requests(accounting: Accounting, since_s: float) -> int:
    """Return how many ended requests the watcher has recorded since then."""
    return sum(row.requests for row in accounting.between(since_s))


def throughput(replies: Sequence[Reply], until_s: float | None = None) -> float | None:
    """Return delivered tokens a second while every client was busy.

    Counts from the first request's start to the last one's start (or to `until_s`); after that the
    loop runs empty.  A request that lies partly inside counts by its share of time.
    """
    good = [reply for reply in replies if not reply.failed and reply.completion_tokens]
    if not good:
        return None
    begin = min(reply.started_s for reply in good)
    end = max(reply.started_s for reply in good) if until_s is None else until_s
    tokens = 0.0
    for reply in good:
        inside = min(reply.finished_s, end) - reply.started_s
        tokens += reply.completion_tokens * max(0.0, min(1.0, inside / (reply.finished_s - reply.started_s)))  # type: ignore[operator]
    return round(tokens / (end - begin), 2) if end > begin else None


def series(rows: Sequence[Window], since_s: float, until_s: float, columns: int) -> list[float | None]:
    """Return acceptance of all versions together in `columns` equal slices of time; None where nothing ran."""
    examined, accepted = [0] * columns, [0] * columns
    for row in rows:
        place = (row.at_s - since_s) / max(1e-9, until_s - since_s)
        if row.version is None or not 0 <= place <= 1:
            continue
        column = min(columns - 1, int(place * columns))
        examined[column] += row.examined
        accepted[column] += row.accepted
    return [a / e if e else None for a, e in zip(accepted, examined, strict=True)]
