"""What the dashboard shows, read from SQL alone and returned as plain JSON values.

Every number names its window and its n.  Reads never take the write lock, and nothing here knows
HTTP or HTML.
"""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import Engine, Integer, Select, cast, func, select

from adapter.accounting import Window, summarise
from adapter.alerting import Alerts
from adapter.contracts import FLOOR_VERSION, RegistryError
from adapter.facts import ADVICE, DRIFT, PAIR, PAYOFF, WATCHER, Facts
from adapter.jobs import OPEN_STATES, Job, Jobs
from adapter.registry import Registry
from adapter.tables import windows
from adapter.versions import AuditEntry, Draft, Live

NOW_S = 900.0  # "now" is the last quarter of an hour, or since the promotion
VERSIONS_S = 86400.0
STALE_S = 30.0
RANGES = {"15m": 900, "1h": 3600, "6h": 21600, "24h": 86400, "7d": 604800}
_POINTS = 120
_VERSIONS_SHOWN = 8
_MOVES = ("promote", "roll_back")
_SUMS = (
    "requests",
    "rounds",
    "drafted",
    "examined",
    "accepted",
    "delivered",
    "acceptance_sum",
    "acceptance_sum_squares",
    "judged_requests",
)


def overview(engine: Engine, now_s: float) -> dict[str, Any]:
    """Return everything on the page but the chart."""
    registry, facts = Registry(engine), Facts(engine)
    watcher, drift, pair = facts.get(WATCHER) or {}, facts.get(DRIFT) or {}, facts.get(PAIR) or {}
    drafts, audit = registry.drafts(), registry.audit(60)
    live = _live_or_none(registry)
    jobs, alerts = Jobs(engine).latest(6), Alerts(engine).latest(40)
    loop = watcher.get("loop") or {}
    now = _now(engine, live, audit, now_s)
    return {
        "now_s": now_s,
        "target": pair.get("target_name"),
        "generation": live.generation if live else None,
        "live": _live_card(live, drafts, audit, now_s),
        "loop": {"phase": loop.get("phase"), "sentence": loop.get("sentence"), "since_s": loop.get("since_s")},
        "attention": _attention(alerts, watcher, live, now_s),
        "now": now,
        "advice": facts.get(ADVICE),
        "segments": _segments(engine, live, drift.get("shown") or {}, now_s),
        "versions": _versions(engine, drafts, live, facts.get(PAYOFF) or {}, now_s),
        "job": _job(jobs, now_s),
        "alerts": [msgspec.to_builtins(alert) for alert in alerts[:12]],
        "audit": [msgspec.to_builtins(entry) for entry in audit[:25]],
    }


def series(engine: Engine, now_s: float, range_s: float) -> dict[str, Any]:
    """Return acceptance and tokens per round over time, one line a version, and every move of the alias.

    A point is a bucket of windows; `times` are the buckets' ends, ascending, only those with traffic.
    """
    since = now_s - range_s
    with engine.execution_options(readonly=True).begin() as connection:
        span = connection.execute(
            select(func.min(windows.c.at_s), func.max(windows.c.at_s)).where(windows.c.at_s > since)
        ).one()
    bucket = _nice(((span[1] or now_s) - (span[0] or since)) / _POINTS)
    rows = _sums(engine, since, now_s, bucket=bucket)
    times = sorted({row["bucket"] for row in rows})
    position = {number: index for index, number in enumerate(times)}
    lines: dict[int, dict[str, Any]] = {}
    for row in rows:
        if row["version"] is None:
            continue
        line = lines.setdefault(
            row["version"],
            {name: [None] * len(times) for name in ("acceptance", "tokens_per_round", "requests")}
            | {"version": row["version"]},
        )
        here = summarise([_window(row)])
        index = position[row["bucket"]]
        line["acceptance"][index], line["requests"][index] = here.value, row["judged_requests"]
        line["tokens_per_round"][index] = here.tokens_per_round
    newest = sorted(lines)[-_VERSIONS_SHOWN:]
    marks = [
        {"at_s": row.at_s, "verb": row.verb, "version": row.to_version, "actor": row.actor, "reason": row.reason}
        for row in reversed(Registry(engine).audit(200))
        if row.verb in _MOVES and row.at_s > since
    ]
    return {
        "bucket_s": bucket,
        "times": [(number + 1) * bucket for number in times],
        "versions": [lines[version] for version in newest],
        "marks": marks,
    }


def rollback_target(live: Live, drafts: list[Draft]) -> int | None:
    """Return where a roll back would lead, as the registry decides it; None when nowhere."""
    ready = {draft.version for draft in drafts if draft.state == "ready"}
    to = live.previous if live.previous in ready else FLOOR_VERSION
    return None if to == live.live else to


def _live_or_none(registry: Registry) -> Live | None:
    try:
        return registry.live()
    except RegistryError:
        return None


def _live_since(live: Live, audit: list[AuditEntry]) -> AuditEntry | None:
    verbs = (*_MOVES, "install")
    return next((row for row in audit if row.verb in verbs and row.generation <= live.generation), None)


def _live_card(live: Live | None, drafts: list[Draft], audit: list[AuditEntry], now_s: float) -> dict[str, Any] | None:
    if live is None:
        return None
    move = _live_since(live, audit)
    return {
        "version": live.live,
        "is_floor": live.live == FLOOR_VERSION,
        "previous": live.previous,
        "rollback_to": rollback_target(live, drafts),
        "age_s": now_s - move.at_s if move else None,
        "at_s": move.at_s if move else None,
        "verb": move.verb if move else None,
        "actor": move.actor if move else None,
        "automatic": move.automatic if move else None,
        "reason": move.reason if move else "",
    }


def _now(engine: Engine, live: Live | None, audit: list[AuditEntry], now_s: float) -> dict[str, Any]:
    """Return the tiles: the live version since it is live, a quarter of an hour at the most."""
    rows = _sums(engine, now_s - NOW_S, now_s)
    move = _live_since(live, audit) if live else None
    seconds = min(NOW_S, now_s - move.at_s) if move else NOW_S
    mine = _sums(engine, now_s - seconds, now_s)
    here = summarise([_window(row) for row in mine if live and row["version"] == live.live])
    requests = sum(row["requests"] for row in rows)
    return {
        "seconds": seconds,
        "acceptance": here.value,
        "interval": here.interval,
        "judged_requests": here.n,
        "tokens_per_round": here.tokens_per_round,
        "requests": requests,
        "requests_seconds": NOW_S,
        "requests_per_s": requests / NOW_S,
        "delivered": sum(row["delivered"] for row in rows),
        "plain_requests": sum(row["requests"] for row in rows if row["version"] is None),
    }


def _attention(alerts: list[Any], watcher: dict[str, Any], live: Live | None, now_s: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    saved_at_s = watcher.get("saved_at_s")
    if saved_at_s is None or now_s - saved_at_s > STALE_S:
        text = "The watcher has not reported yet" if saved_at_s is None else "The watcher stopped reporting"
        found.append({"severity": "ticket", "title": "WatcherStale", "text": text, "since_s": saved_at_s})
    if live is None:
        text = "Nothing was served from this data folder yet; `draftsmith up` starts everything"
        found.append({"severity": "info", "title": "NothingLive", "text": text, "since_s": None})
    return found + [
        {"severity": alert.severity, "title": alert.rule, "text": alert.summary, "since_s": alert.opened_at_s}
        for alert in alerts
        if alert.resolved_at_s is None and alert.severity != "info"
    ]


def _segments(engine: Engine, live: Live | None, shown: dict[str, Any], now_s: float) -> list[dict[str, Any]]:
    if live is None:
        return []
    detectors = shown.get("segments", {}) if shown.get("version") == live.live else {}
    rows = {
        row["segment"]: summarise([_window(row)])
        for row in _sums(engine, now_s - NOW_S, now_s, by_segment=True)
        if row["version"] == live.live
    }
    found = []
    for name in sorted(rows.keys() | detectors.keys()):
        here, detector = rows.get(name), detectors.get(name)
        found.append(
            {
                "segment": name,
                "n": here.n if here else 0,
                "acceptance": here.value if here else None,
                "interval": here.interval if here else None,
                "detector": detector,
                "state": _detector_state(detector),
            }
        )
    return found


def _detector_state(detector: dict[str, Any] | None) -> str:
    if detector is None:
        return "no data"
    if detector["drifting"]:
        return "drift"
    return "learning" if detector["baseline"] is None else "steady"


def _versions(
    engine: Engine, drafts: list[Draft], live: Live | None, payoff: dict[str, Any], now_s: float
) -> list[dict[str, Any]]:
    rows = {row["version"]: summarise([_window(row)]) for row in _sums(engine, now_s - VERSIONS_S, now_s)}
    found = []
    for draft in drafts[:20]:
        here = rows.get(draft.version)
        role = ""
        if live is not None:
            named = [("live", [live.live]), ("alternate", live.alternates), ("previous", [live.previous])]
            role = next((name for name, numbers in named if draft.version in numbers), "")
        found.append(
            {
                "version": draft.version,
                "parent": draft.parent,
                "state": draft.state,
                "role": role,
                "gate": draft.gate.get("verdict") or draft.reason,
                "acceptance": here.value if here else None,
                "interval": here.interval if here else None,
                "n": here.n if here else 0,
                "bytes": draft.artifact_bytes,
                "sha256": draft.artifact_sha256,
                "created_at_s": draft.created_at_s,
                "requests": draft.trained_on.get("requests"),
                "payoff": payoff.get(str(draft.version)),
                "promotable": draft.state == "ready" and live is not None and draft.version != live.live,
            }
        )
    return found


def _job(jobs: list[Job], now_s: float) -> dict[str, Any] | None:
    """Return the open job, or the last one that ended."""
    job = next((item for item in jobs if item.state in OPEN_STATES), jobs[0] if jobs else None)
    if job is None:
        return None
    done, steps = job.progress.get("step"), job.progress.get("steps")
    return {
        **msgspec.to_builtins(job),
        "open": job.state in OPEN_STATES,
        "age_s": now_s - job.created_at_s,
        "share": done / steps if isinstance(done, int | float) and steps else None,
        "eta_s": job.progress.get("eta_s"),
        "verdict": job.result.get("verdict"),
    }


def _sums(
    engine: Engine, since_s: float, until_s: float, *, bucket: float | None = None, by_segment: bool = False
) -> list[dict[str, Any]]:
    keys: list[Any] = [windows.c.version]
    if by_segment:
        keys.append(windows.c.segment)
    if bucket is not None:
        place = windows.c.at_s / bucket
        floor = cast(place, Integer) if engine.dialect.name == "sqlite" else cast(func.floor(place), Integer)
        keys.append(floor.label("bucket"))
    query: Select[Any] = (
        select(*keys, *[func.sum(windows.c[name]).label(name) for name in _SUMS])
        .where(windows.c.at_s > since_s, windows.c.at_s <= until_s)
        .group_by(*keys)
    )
    with engine.execution_options(readonly=True).begin() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def _window(row: dict[str, Any]) -> Window:
    return Window(at_s=0.0, seconds=0.0, segment="", version=row["version"], **{name: row[name] for name in _SUMS})


def _nice(seconds: float) -> float:
    """Round a bucket up to a length that people use."""
    steps = (5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
    return float(next((step for step in steps if step >= seconds), 7200))
