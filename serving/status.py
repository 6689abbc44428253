"""What `draftsmith status` shows: the pair, the aliases, recent acceptance, the processes."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from sqlalchemy import Engine

from adapter.accounting import Accounting, summarise
from adapter.alerting import Alerts
from adapter.contracts import RegistryError
from adapter.facts import ENGINE, SERVING, SWAPS, WATCHER, Facts
from adapter.jobs import Jobs
from adapter.pairs import pair_from_facts
from adapter.registry import Registry
from adapter.settings import Settings
from serving.roles import read_roles

RECENT_S = 300.0


def collect_status(settings: Settings, database: Engine, now_s: float | None = None) -> dict[str, Any]:
    """Read everything from SQL and the role table; works while any process is down.

    `acceptance` covers the live version over the last five minutes.
    """
    now = time.time() if now_s is None else now_s
    facts = Facts(database)
    pair = pair_from_facts(facts)
    status: dict[str, Any] = {
        "data_dir": str(settings.data_dir),
        "target": pair.target_name if pair else None,
        "target_path": pair.target_path if pair else None,
        "dtype": pair.dtype if pair else None,
        "draft": pair.draft_path if pair else None,
        "live": None,
        "previous": None,
        "alternates": [],
        "generation": None,
    }
    try:
        live = Registry(database).live()
        status.update(
            live=live.live, previous=live.previous, alternates=list(live.alternates), generation=live.generation
        )
    except RegistryError:
        pass
    recent = [row for row in Accounting(database).between(now - RECENT_S) if row.version == status["live"]]
    acceptance = msgspec.to_builtins(summarise(recent))
    acceptance["seconds"] = RECENT_S
    serving, watcher = facts.get(SERVING) or {}, facts.get(WATCHER) or {}
    status.update(
        acceptance=acceptance,
        swaps=facts.get(SWAPS) or {"swaps": [], "median_step_ms": None},
        job=next((msgspec.to_builtins(job) for job in Jobs(database).latest(1)), None),
        alerts=[msgspec.to_builtins(a) for a in Alerts(database).latest() if a.resolved_at_s is None],
        api_url=serving.get("url"),
        dashboard_url=watcher.get("dashboard_url"),
        roles=read_roles(settings),
        log=_log_of(facts.get(ENGINE)),
    )
    return status


def _log_of(engine: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the engine last said of its log: whether it reaches Redis, entries written and dropped."""
    if not engine or "log_connected" not in engine:
        return None
    return {name: engine[f"log_{name}"] for name in ("connected", "written", "dropped")}
