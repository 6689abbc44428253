"""The registry of draft versions: immutable rows, two aliases that move, one audit row a move.

Every method is one transaction.  A mover may say which generation it looked at; when somebody
moved first it gets a `ConflictError` that names who.  Reads never take the write lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, insert, select, update

from adapter import tables
from adapter.contracts import FLOOR_VERSION, ConflictError, RegistryError
from adapter.versions import AuditEntry, Draft, Live

_SCOPE = "global"


class Registry:
    """Versions, aliases and their history in SQL.

    Args:
        engine: an open, migrated database.
        clock: epoch seconds.
        announce: called with the new generation after a move commits; a hint, may do nothing.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Callable[[], float] = time.time,
        announce: Callable[[int], None] = lambda generation: None,
    ) -> None:
        self._engine = engine
        self._read = engine.execution_options(readonly=True)
        self._clock = clock
        self._announce = announce

    # -- reading -----------------------------------------------------------------------------

    def live(self) -> Live:
        """Return where the aliases point now.

        Raises:
            RegistryError: no base draft was ever installed here.
        """
        with self._read.begin() as connection:
            return self._live(connection)

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
                connection.execute(insert(tables.generation).values(scope=_SCOPE, value=1))
                connection.execute(insert(tables.aliases).values(name="live", version=FLOOR_VERSION))
                self._note(connection, actor, True, "install", None, FLOOR_VERSION, 1, "base draft", {})
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
            self._note(connection, actor, True, "publish", parent, draft.version, generation, reason, gate)
            return draft

    def promote(
        self,
        version: int,
        *,
        actor: str,
        reason: str,
        automatic: bool = False,
        expected_generation: int | None = None,
        evidence: dict[str, Any] | None = None,
    ) -> Live:
        """Make `version` live; what was live becomes previous.

        Raises:
            RegistryError: unknown, quarantined, rejected or already live.
            ConflictError: the generation is not `expected_generation`.
        """
        with self._engine.begin() as connection:
            before = self._expect(connection, expected_generation)
            draft = self._draft(connection, version)
            if version == before.live:
                raise RegistryError(f"version {version} is live already")
            if draft.state != "ready":
                raise RegistryError(f"version {version} is {draft.state} and cannot be promoted; only 'ready' ones can")
            after = self._move(connection, before, version, "promote", actor, automatic, reason, evidence)
        self._announce(after.generation)
        return after

    def roll_back(
        self,
        *,
        actor: str,
        reason: str,
        automatic: bool = False,
        expected_generation: int | None = None,
        evidence: dict[str, Any] | None = None,
    ) -> Live:
        """Make the previous version live again; to the base draft when there is no previous one.

        Raises:
            RegistryError: the base draft is live and nothing lies below it.
            ConflictError: the generation is not `expected_generation`.
        """
        with self._engine.begin() as connection:
            before = self._expect(connection, expected_generation)
            to = before.previous
            if to is None or self._draft(connection, to).state != "ready":
                to = FLOOR_VERSION
            if to == before.live:
                raise RegistryError("the base draft is live and there is no earlier version to roll back to")
            after = self._move(connection, before, to, "roll_back", actor, automatic, reason, evidence)
        self._announce(after.generation)
        return after

    def quarantine(
        self, version: int, *, actor: str, reason: str, automatic: bool = False, evidence: dict[str, Any] | None = None
    ) -> Live:
        """Forbid a version for good.  A live one is left first: to previous, or to the base draft.

        Quarantining twice changes nothing and writes no second audit row.

        Raises:
            RegistryError: unknown, or the base draft.
        """
        if version == FLOOR_VERSION:
            raise RegistryError("version 0 is the base draft and cannot be quarantined; switch speculation off instead")
        with self._engine.begin() as connection:
            before = self._live(connection, lock=True)
            if self._draft(connection, version).state == "quarantined":
                return before
            connection.execute(
                update(tables.drafts).where(tables.drafts.c.version == version).values(state="quarantined")
            )
            self._note(
                connection, actor, automatic, "quarantine", version, None, before.generation, reason, evidence or {}
            )
            after = before
            if version == before.live:
                to = before.previous if before.previous not in (None, version) else FLOOR_VERSION
                if self._draft(connection, to).state != "ready":
                    to = FLOOR_VERSION
                why = f"version {version} was quarantined: {reason}"
                after = self._move(connection, before, to, "roll_back", actor, automatic, why, evidence)
        if after.generation != before.generation:
            self._announce(after.generation)
        return after

    # -- inside one transaction --------------------------------------------------------------

    def _live(self, connection: Connection, lock: bool = False) -> Live:
        if lock:  # a row lock where the database has them; SQLite holds its write lock already
            connection.execute(select(tables.generation.c.value).with_for_update()).all()
        rows = connection.execute(
            select(tables.aliases.c.name, tables.drafts.c.version, tables.drafts.c.artifact_sha256).join(
                tables.drafts, tables.drafts.c.version == tables.aliases.c.version
            )
        ).all()
        value = connection.execute(
            select(tables.generation.c.value).where(tables.generation.c.scope == _SCOPE)
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

    def _expect(self, connection: Connection, expected: int | None) -> Live:
        live = self._live(connection, lock=True)
        if expected is not None and expected != live.generation:
            last = (
                connection.execute(
                    select(tables.audit)
                    .where(tables.audit.c.generation == live.generation, ~tables.audit.c.verb.startswith("vocab_"))
                    .order_by(tables.audit.c.id)
                    .limit(1)
                )
                .mappings()
                .first()
            )
            what = (
                f"{last['actor']} did '{last['verb']}' to version {last['to_version']}" if last else "somebody moved it"
            )
            raise ConflictError(
                f"generation is {live.generation}, you looked at {expected}: {what} meanwhile. Look again and repeat"
            )
        return live

    def _move(
        self,
        connection: Connection,
        before: Live,
        to: int,
        verb: str,
        actor: str,
        automatic: bool,
        reason: str,
        evidence: dict[str, Any] | None,
    ) -> Live:
        generation = before.generation + 1
        connection.execute(
            update(tables.generation).where(tables.generation.c.scope == _SCOPE).values(value=generation)
        )
        connection.execute(update(tables.aliases).where(tables.aliases.c.name == "live").values(version=to))
        moved = connection.execute(
            update(tables.aliases).where(tables.aliases.c.name == "previous").values(version=before.live)
        )
        if not moved.rowcount:
            connection.execute(insert(tables.aliases).values(name="previous", version=before.live))
        self._note(connection, actor, automatic, verb, before.live, to, generation, reason, evidence or {})
        return self._live(connection)

    def _insert(self, connection: Connection, draft: Draft) -> None:
        connection.execute(insert(tables.drafts).values(**msgspec.structs.asdict(draft)))

    def _note(
        self,
        connection: Connection,
        actor: str,
        automatic: bool,
        verb: str,
        from_version: int | None,
        to_version: int | None,
        generation: int,
        reason: str,
        evidence: dict[str, Any],
    ) -> None:
        connection.execute(
            insert(tables.audit).values(
                at_s=self._clock(),
                actor=actor,
                automatic=int(automatic),
                verb=verb,
                from_version=from_version,
                to_version=to_version,
                generation=generation,
                reason=reason,
                evidence=evidence,
            )
        )
