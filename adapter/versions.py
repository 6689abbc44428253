"""What the registry hands out: a draft version, where the aliases point, one audit entry."""

from __future__ import annotations

from typing import Any

import msgspec


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """One draft version. `artifact_sha256` is None for version 0, the base draft itself."""

    version: int
    parent: int | None
    state: str
    artifact_sha256: str | None
    artifact_bytes: int | None
    target_fingerprint: str
    base_fingerprint: str
    trained_on: dict[str, Any]
    gate: dict[str, Any]
    reason: str
    job_id: str | None
    created_at_s: float
    created_by: str


class Aliases(msgspec.Struct, frozen=True, kw_only=True):
    """Where the aliases point. `generation` rises with every move."""

    generation: int
    live: int
    previous: int | None


class Live(Aliases, frozen=True, kw_only=True):
    """Which versions the aliases point at.

    `alternates` may draft beside the live version, for requests they fit better; ascending, live never among them.
    """

    artifacts: dict[int, str | None]  # version -> artifact hash, for all that are named
    alternates: tuple[int, ...] = ()


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One state change: who, what, from where to where, and why."""

    id: int
    at_s: float
    actor: str
    automatic: bool
    verb: str
    from_version: int | None
    to_version: int | None
    generation: int
    reason: str
    evidence: dict[str, Any]
