"""The registry of draft versions: immutable rows, two aliases that move, alternates, one audit row a move.

Version 0 is the base draft.  How `live` and `previous` move is in `adapter.aliases`.  An alternate may draft beside
the live version; a move that makes it live, or forbids it, ends that.  Reads never take the write lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import Connection, delete, insert, select

from adapter import tables
from adapter.aliases import AliasRegistry, Cause
from adapter.contracts import FLOOR_VERSION, RegistryError
from adapter.versions import AuditEntry, Draft, Live

_ALTERNATE = "alternate:"  # and the version: the name of an alternate's alias


class Registry(AliasRegistry[Live]):
    """Versions, aliases and their history in SQL.  `live` and a move need `install_base` first."""

    noun = "version"
    _scope = "global"
    _rows = tables.drafts
    _aliases = tables.aliases
    _number = "version"
    _verbs = ""
    _moves = ("install", "promote", "roll_back", "admit", "dismiss")
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

    def admit(
        self,
        version: int,
        *,
        most: int,
        actor: str,
        reason: str,
        automatic: bool = False,
        expected_generation: int | None = None,
        evidence: dict[str, Any] | None = None,
    ) -> Live:
        """Let a version draft beside the live one, as an alternate.

        Args:
            most: how many there may be; beyond that those with the lowest numbers leave.

        Raises:
            RegistryError: unknown, not ready, live or an alternate already, or there may be none.
            ConflictError: the generation is not `expected_generation`.
        """
        if most < 1:
            raise RegistryError(
                f"version {version} cannot become an alternate: engine.alternates = {most}; set it to 1 or more"
            )
        with self._engine.begin() as connection:
            before = self._expect(connection, expected_generation)
            state = self._state(connection, version)
            if version == before.live or version in before.alternates:
                what = "live" if version == before.live else "an alternate"
                raise RegistryError(f"version {version} is {what} already")
            if state != "ready":
                raise RegistryError(f"version {version} is {state} and no alternate; only 'ready' ones can become one")
            leaving = before.alternates[: max(0, len(before.alternates) + 1 - most)]
            self._leave(connection, *leaving)
            connection.execute(insert(tables.aliases).values(name=f"{_ALTERNATE}{version}", version=version))
            kept = {**(evidence or {}), **({"dismissed": list(leaving)} if leaving else {})}
            cause = Cause(actor=actor, reason=reason, automatic=automatic, evidence=kept)
            after = self._raised(connection, before, "admit", None, version, cause)
        self._announce(after.generation)
        return after

    def dismiss(
        self, version: int, *, actor: str, reason: str, automatic: bool = False, expected_generation: int | None = None
    ) -> Live:
        """Let an alternate draft no longer; it stays ready.

        Raises:
            RegistryError: it is no alternate.
            ConflictError: the generation is not `expected_generation`.
        """
        cause = Cause(actor=actor, reason=reason, automatic=automatic)
        with self._engine.begin() as connection:
            before = self._expect(connection, expected_generation)
            if version not in before.alternates:
                named = ", ".join(str(item) for item in before.alternates) or "none"
                raise RegistryError(f"version {version} is no alternate; alternates: {named}")
            self._leave(connection, version)
            after = self._raised(connection, before, "dismiss", version, None, cause)
        self._announce(after.generation)
        return after

    # -- inside one transaction --------------------------------------------------------------

    def _move(self, connection: Connection, before: Live, to: int, verb: str, cause: Cause) -> Live:
        self._leave(connection, to)
        return super()._move(connection, before, to, verb, cause)

    def _forbidden(self, connection: Connection, before: Live, number: int, cause: Cause) -> Live:
        if number not in before.alternates:
            return before
        self._leave(connection, number)
        why = Cause(
            actor=cause.actor, reason=f"version {number} was quarantined: {cause.reason}", automatic=cause.automatic
        )
        return self._raised(connection, before, "dismiss", number, None, why)

    def _leave(self, connection: Connection, *versions: int) -> None:
        names = [f"{_ALTERNATE}{version}" for version in versions]
        connection.execute(delete(tables.aliases).where(tables.aliases.c.name.in_(names)))

    def _raised(
        self, connection: Connection, before: Live, verb: str, from_version: int | None, to_version: int | None,
        cause: Cause,
    ) -> Live:  # fmt: skip
        """Raise the generation for a change that left live and previous alone."""
        self._point(connection, before.generation + 1)
        self._note(connection, verb, from_version, to_version, before.generation + 1, cause)
        return self._live(connection)

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
            alternates=tuple(sorted(row.version for row in rows if row.name.startswith(_ALTERNATE))),
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
