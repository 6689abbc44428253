"""The processes of a deployment: what runs each, and who keeps which file."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import Any

import psutil

from adapter.settings import Settings, child_environment
from serving.valkey import valkey_command

ROLES_FILE = "roles.json"
LOCK_FILE = "up.lock"
MODULES = {"engine": "serving.engine", "api": "serving.api", "worker": "distill", "watcher": "monitors"}


@dataclass(frozen=True, slots=True)
class Role:
    """One process: its name, its command and its environment."""

    name: str
    command: list[str]
    env: dict[str, str]


def roles_for(settings: Settings, names: list[str]) -> list[Role]:
    """Return the roles to start, in order; the bundled Valkey first where no Redis is given."""
    env = child_environment(settings)
    env["PYTHONUNBUFFERED"] = "1"
    # A decoding step has hundreds of short parallel regions: threads that sleep at their ends take half as long
    # again.  A training has long ones, and must not spin on cores that the engine could use.
    sleeping = {"OMP_WAIT_POLICY": "PASSIVE"} | env
    roles = [] if settings.redis_url else [Role("valkey", valkey_command(settings), env)]
    return roles + [
        Role(name, [sys.executable, "-m", MODULES[name]], sleeping if name == "worker" else env) for name in names
    ]


def write_roles(settings: Settings, table: dict[str, dict[str, Any]]) -> None:
    """Replace the role table that `draftsmith status` reads."""
    path = settings.run_dir / ROLES_FILE
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(table, indent=1))
    os.replace(temporary, path)


def read_roles(settings: Settings) -> dict[str, dict[str, Any]]:
    """Read the role table; a role whose process is gone is said to be stopped."""
    try:
        table: dict[str, dict[str, Any]] = json.loads((settings.run_dir / ROLES_FILE).read_text())
    except (OSError, ValueError):
        return {}
    for role in table.values():
        if role["pid"] is not None and not _runs(role["pid"]):
            role.update(pid=None, state="stopped")
    return table


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet collected by its parent does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
