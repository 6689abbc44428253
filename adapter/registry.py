"""The registry of draft versions: immutable rows, two aliases that move, one audit row a move.

Version 0 is the base draft.  How the aliases move is in `adapter.aliases`.  Reads never take the write lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import Connection, insert, select

from adapter import tables
from adapter.aliases import AliasRegistry, Cause
from adapter.contracts import FLOOR_VERSION, RegistryError
from adapter.versions import AuditEntry, Draft, Live


class Registry(AliasRegistry[Live]):
    """Versions, aliases and their history in SQL.  `live` and a move need `install_base` first."""

    noun = "version"
    _scope = "global"
    _rows = tables.drafts
    _aliases = tables.aliases
    _number = "version"
    _verbs = ""
    _counter = "generation"
    _destination = "to version"
    _at_the_floor = "the base draft is live and there is no earlier version to roll back to"
    _floor_stays = "version 0 is the base draft and cannot be quarantined; switch speculation off instead"

    # -- reading -----------------------------------------------------------------------------

    def draft(self, version: int) -> Draft:
        """Return one version.

        Raises:
            RegistryError: there is no such version; the message lists what exists.
        """
        with self._read.begin() as connection:
            return self._draft(connection, version)

    def drafts(self) -> list[Draft]:
        """Return every version, newest first."""
        with self._read.begin() as connection:
            rows = connection.execute(select(tables.drafts).order_by(tables.drafts.c.version.desc()))
            return [Draft(**row) for row in rows.mappings()]

    def audit(self, limit: int = 100) -> list[AuditEntry]:
        """Return the latest state changes, newest first."""
        with self._read.begin() as connection:
            rows = connection.execute(select(tables.audit).order_by(tables.audit.c.id.desc()).limit(limit))
            return [AuditEntry(**{**row, "automatic": bool(row["automatic"])}) for row in rows.mappings()]

    # -- changing ----------------------------------------------------------------------------

    def install_base(self, *, target_fingerprint: str, base_fingerprint: str, actor: str) -> Live:
        """Register the base draft as version 0 and live, once; check it on every later start.

        Raises:
            RegistryError: this registry belongs to another pair.
        """
        with self._engine.begin() as connection:
            row = (
                connection.execute(select(tables.drafts).where(tables.drafts.c.version == FLOOR_VERSION))
                .mappings()
                .first()
            )
            if row is None:
                self._insert(
                    connection,
                    Draft(
                        version=FLOOR_VERSION,
                        parent=None,
                        state="ready",
                        artifact_sha256=None,
                        artifact_bytes=None,
                        target_fingerprint=target_fingerprint,
                        base_fingerprint=base_fingerprint,
                        trained_on={},
                        gate={},
                        reason="base draft",
                        job_id=None,
                        created_at_s=self._clock(),
                        created_by=actor,
                    ),
                )
                self._point(connection, 1, live=FLOOR_VERSION)
                cause = Cause(actor=actor, reason="base draft", automatic=True)
                self._note(connection, "install", None, FLOOR_VERSION, 1, cause)
            elif (row["target_fingerprint"], row["base_fingerprint"]) != (target_fingerprint, base_fingerprint):
                raise RegistryError(
                    "this data folder belongs to another pair: "
                    f"its target is {row['target_fingerprint'][:12]} and its draft {row['base_fingerprint'][:12]}, "
                    f"you started target {target_fingerprint[:12]} with draft {base_fingerprint[:12]}. "
                    "Use another --data-dir, or start with the pair it was made for"
                )
            return self._live(connection)

    def publish(
        self,
        *,
        parent: int,
        state: str,
        artifact_sha256: str,
        artifact_bytes: int,
        trained_on: dict[str, Any],
        gate: dict[str, Any],
        reason: str,
        job_id: str | None,
        actor: str,
        fence: Callable[[Connection], None] = lambda connection: None,
    ) -> Draft:
        """Store a new immutable version; it is not live before it is promoted.

        `state` is `ready` when it passed its gate and `rejected` when it did not.  `fence` runs
        inside the transaction and raises to refuse.
        """
        if state not in ("ready", "rejected"):
            raise RegistryError(f"a version is published as 'ready' or 'rejected', not {state!r}")
        with self._engine.begin() as connection:
            fence(connection)
            base = self._draft(connection, FLOOR_VERSION)
            newest = connection.execute(
                select(tables.drafts.c.version).order_by(tables.drafts.c.version.desc()).limit(1)
            ).scalar_one()
            draft = Draft(
                version=newest + 1,
                parent=parent,
                state=state,
                artifact_sha256=artifact_sha256,
                artifact_bytes=artifact_bytes,
                target_fingerprint=base.target_fingerprint,
                base_fingerprint=base.base_fingerprint,
                trained_on=trained_on,
                gate=gate,
                reason=reason,
                job_id=job_id,
                created_at_s=self._clock(),
                created_by=actor,
            )
            self._insert(connection, draft)
            generation = self._live(connection).generation
            cause = Cause(actor=actor, reason=reason, automatic=True, evidence=gate)
            self._note(connection, "publish", parent, draft.version, generation, cause)
            return draft

    # -- inside one transaction --------------------------------------------------------------

    def _live(self, connection: Connection) -> Live:
        rows = connection.execute(
            select(tables.aliases.c.name, tables.drafts.c.version, tables.drafts.c.artifact_sha256).join(
                tables.drafts, tables.drafts.c.version == tables.aliases.c.version
            )
        ).all()
        value = connection.execute(
            select(tables.generation.c.value).where(tables.generation.c.scope == self._scope)
        ).scalar_one_or_none()
        named = {row.name: row.version for row in rows}
        if value is None or "live" not in named:
            raise RegistryError("no base draft is installed here yet; `draftsmith serve` or `up` installs it")
        return Live(
            generation=value,
            live=named["live"],
            previous=named.get("previous"),
            artifacts={row.version: row.artifact_sha256 for row in rows},
        )

    def _draft(self, connection: Connection, version: int) -> Draft:
        row = connection.execute(select(tables.drafts).where(tables.drafts.c.version == version)).mappings().first()
        if row is None:
            known = (
                connection.execute(select(tables.drafts.c.version).order_by(tables.drafts.c.version)).scalars().all()
            )
            listed = ", ".join(str(item) for item in known) or "none"
            raise RegistryError(f"there is no draft version {version}; known versions: {listed}")
        return Draft(**row)

    def _state(self, connection: Connection, number: int) -> str:
        return self._draft(connection, number).state

    def _insert(self, connection: Connection, draft: Draft) -> None:
        connection.execute(insert(tables.drafts).values(**msgspec.structs.asdict(draft)))
