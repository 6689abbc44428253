"""The registry of draft vocabularies: immutable rows, two aliases that move, one audit row a change.

Number 0 is the full vocabulary: it has no row and no file, is live until something is promoted, and
is where a roll back ends when nothing else is left.  Aliases and generation are separate from those
of draft versions: a vocabulary and a version can be changed and undone without each other.  In the
audit log the verbs begin with `vocab_`, and versions and generation are the vocabulary's.
"""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import Connection, insert, select

from adapter import tables
from adapter.aliases import AliasRegistry, Cause
from adapter.contracts import RegistryError
from adapter.draft_vocab import FULL, VocabManifest
from adapter.versions import Aliases


class VocabRow(msgspec.Struct, frozen=True, kw_only=True):
    """One vocabulary."""

    number: int
    state: str
    sha256: str
    size: int
    target_fingerprint: str
    coverage: float | None
    counted: dict[str, Any]
    reason: str
    created_at_s: float
    created_by: str


class LiveVocab(Aliases, frozen=True, kw_only=True):
    """Which vocabularies the aliases point at.  `sha256` is the live one's, None for the full vocabulary."""

    sha256: str | None


class Vocabularies(AliasRegistry[LiveVocab]):
    """Vocabularies, their aliases and their history in SQL."""

    noun = "vocabulary"
    _scope = "vocabulary"
    _rows = tables.vocabularies
    _aliases = tables.vocabulary_aliases
    _number = "number"
    _verbs = "vocab_"
    _counter = "the vocabulary's generation"
    _destination = "to"
    _at_the_floor = "the full vocabulary is live and there is no earlier one to roll back to"
    _floor_stays = "vocabulary 0 is the full one and cannot be quarantined"

    def rows(self) -> list[VocabRow]:
        """Return every vocabulary but the full one, newest first."""
        with self._read.begin() as connection:
            found = connection.execute(select(tables.vocabularies).order_by(tables.vocabularies.c.number.desc()))
            return [VocabRow(**row) for row in found.mappings()]

    def publish(self, manifest: VocabManifest, *, actor: str, reason: str, automatic: bool = False) -> VocabRow:
        """Store a new vocabulary under the next number; it is not live before it is promoted.

        Raises:
            RegistryError: the live vocabulary is the same.
        """
        with self._engine.begin() as connection:
            live = self._live(connection)
            if live.sha256 == manifest.sha256:
                raise RegistryError(f"vocabulary {live.live} is live and holds exactly these tokens")
            newest = connection.execute(
                select(tables.vocabularies.c.number).order_by(tables.vocabularies.c.number.desc()).limit(1)
            ).scalar()
            row = VocabRow(
                number=(newest or FULL) + 1, state="ready", sha256=manifest.sha256, size=manifest.size,
                target_fingerprint=manifest.target_fingerprint, coverage=manifest.coverage, counted=manifest.counted,
                reason=reason, created_at_s=self._clock(), created_by=actor,
            )  # fmt: skip
            connection.execute(insert(tables.vocabularies).values(**msgspec.structs.asdict(row)))
            evidence = {"size": row.size, "coverage": row.coverage}
            cause = Cause(actor=actor, reason=reason, automatic=automatic, evidence=evidence)
            self._note(connection, "publish", None, row.number, live.generation, cause)
            return row

    def _live(self, connection: Connection) -> LiveVocab:
        rows = connection.execute(
            select(tables.vocabulary_aliases.c.name, tables.vocabulary_aliases.c.number, tables.vocabularies.c.sha256)
            .join(
                tables.vocabularies, tables.vocabularies.c.number == tables.vocabulary_aliases.c.number, isouter=True
            )
        ).all()  # fmt: skip
        generation = connection.execute(
            select(tables.generation.c.value).where(tables.generation.c.scope == self._scope)
        ).scalar()
        named = {row.name: row for row in rows}
        previous = named["previous"].number if "previous" in named else None
        if "live" not in named:
            return LiveVocab(generation=1, live=FULL, previous=None, sha256=None)
        live = named["live"]
        return LiveVocab(generation=generation or 1, live=live.number, previous=previous, sha256=live.sha256)

    def _state(self, connection: Connection, number: int) -> str:
        if number == FULL:
            return "ready"
        found: str | None = connection.execute(
            select(tables.vocabularies.c.state).where(tables.vocabularies.c.number == number)
        ).scalar()
        if found is None:
            numbers = connection.execute(select(tables.vocabularies.c.number).order_by(tables.vocabularies.c.number))
            known = ", ".join(str(item) for item in [FULL, *numbers.scalars()])
            raise RegistryError(f"there is no vocabulary {number}; known numbers: {known}")
        return found
