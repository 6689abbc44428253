"""The registry of draft vocabularies: immutable rows, two aliases that move, one audit row a change.

Number 0 is the full vocabulary: it has no row and no file, is live until something is promoted, and
is where a roll back ends when nothing else is left.  Aliases and generation are separate from those
of draft versions: a vocabulary and a version can be changed and undone without each other.  In the
audit log the verbs begin with `vocab_`, and versions and generation are the vocabulary's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, delete, insert, select, update

from adapter import tables
from adapter.contracts import ConflictError, RegistryError
from adapter.draft_vocab import FULL, VocabManifest

_SCOPE = "vocabulary"


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


class LiveVocab(msgspec.Struct, frozen=True, kw_only=True):
    """Where the aliases point.  `sha256` is the live one's, None for the full vocabulary."""

    generation: int
    live: int
    previous: int | None
    sha256: str | None


class Vocabularies:
    """Vocabularies, their aliases and their history in SQL; every method is one transaction.

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

    def live(self) -> LiveVocab:
        """Return where the aliases point now."""
        with self._read.begin() as connection:
            return _live(connection)

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
            live = _live(connection)
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
            self._note(
                connection, "vocab_publish", None, row.number, live.generation, actor, reason, automatic, evidence
            )
            return row

    def promote(
        self, number: int, *, actor: str, reason: str, automatic: bool = False, expected_generation: int | None = None
    ) -> LiveVocab:
        """Make a vocabulary live, 0 the full one; what was live becomes previous.

        Raises:
            RegistryError: unknown, quarantined or already live.
            ConflictError: the generation is not `expected_generation`.
        """
        with self._engine.begin() as connection:
            before = _expect(connection, expected_generation)
            if number == before.live:
                raise RegistryError(f"vocabulary {number} is live already")
            state = _state(connection, number)
            if state != "ready":
                raise RegistryError(f"vocabulary {number} is {state} and cannot be promoted")
            after = self._move(connection, before, number, "vocab_promote", actor, reason, automatic)
        self._announce(after.generation)
        return after

    def roll_back(
        self, *, actor: str, reason: str, automatic: bool = False, expected_generation: int | None = None
    ) -> LiveVocab:
        """Make the previous vocabulary live again; the full one when there is no previous one.

        Raises:
            RegistryError: the full vocabulary is live and there is no previous one.
            ConflictError: the generation is not `expected_generation`.
        """
        with self._engine.begin() as connection:
            before = _expect(connection, expected_generation)
            to = _below(connection, before, before.live)
            if to == before.live:
                raise RegistryError("the full vocabulary is live and there is no earlier one to roll back to")
            after = self._move(connection, before, to, "vocab_roll_back", actor, reason, automatic)
        self._announce(after.generation)
        return after

    def quarantine(self, number: int, *, actor: str, reason: str, automatic: bool = False) -> LiveVocab:
        """Forbid a vocabulary for good.  A live one is left first.  A second time changes nothing.

        Raises:
            RegistryError: unknown, or the full vocabulary.
        """
        if number == FULL:
            raise RegistryError("vocabulary 0 is the full one and cannot be quarantined")
        with self._engine.begin() as connection:
            before = after = _live(connection)
            if _state(connection, number) == "quarantined":
                return before
            connection.execute(
                update(tables.vocabularies).where(tables.vocabularies.c.number == number).values(state="quarantined")
            )
            generation = before.generation
            self._note(connection, "vocab_quarantine", number, None, generation, actor, reason, automatic, {})
            if number == before.live:
                why = f"vocabulary {number} was quarantined: {reason}"
                to = _below(connection, before, number)
                after = self._move(connection, before, to, "vocab_roll_back", actor, why, automatic)
        if after.generation != before.generation:
            self._announce(after.generation)
        return after

    def _move(
        self, connection: Connection, before: LiveVocab, to: int, verb: str, actor: str, reason: str, automatic: bool
    ) -> LiveVocab:
        generation = before.generation + 1
        connection.execute(delete(tables.generation).where(tables.generation.c.scope == _SCOPE))
        connection.execute(insert(tables.generation).values(scope=_SCOPE, value=generation))
        connection.execute(delete(tables.vocabulary_aliases))
        for name, number in (("live", to), ("previous", before.live)):
            connection.execute(insert(tables.vocabulary_aliases).values(name=name, number=number))
        self._note(connection, verb, before.live, to, generation, actor, reason, automatic, {})
        return _live(connection)

    def _note(
        self, connection: Connection, verb: str, from_number: int | None, to_number: int | None, generation: int,
        actor: str, reason: str, automatic: bool, evidence: dict[str, Any],
    ) -> None:  # fmt: skip
        connection.execute(
            insert(tables.audit).values(
                at_s=self._clock(), actor=actor, automatic=int(automatic), verb=verb, from_version=from_number,
                to_version=to_number, generation=generation, reason=reason, evidence=evidence,
            )
        )  # fmt: skip


def _live(connection: Connection) -> LiveVocab:
    rows = connection.execute(
        select(tables.vocabulary_aliases.c.name, tables.vocabulary_aliases.c.number, tables.vocabularies.c.sha256)
        .join(
            tables.vocabularies, tables.vocabularies.c.number == tables.vocabulary_aliases.c.number, isouter=True
        )
    ).all()  # fmt: skip
    generation = connection.execute(
        select(tables.generation.c.value).where(tables.generation.c.scope == _SCOPE)
    ).scalar()
    named = {row.name: row for row in rows}
    previous = named["previous"].number if "previous" in named else None
    if "live" not in named:
        return LiveVocab(generation=1, live=FULL, previous=None, sha256=None)
    live = named["live"]
    return LiveVocab(generation=generation or 1, live=live.number, previous=previous, sha256=live.sha256)


def _expect(connection: Connection, expected: int | None) -> LiveVocab:
    live = _live(connection)
    if expected is not None and expected != live.generation:
        last = connection.execute(
            select(tables.audit.c.actor, tables.audit.c.verb, tables.audit.c.to_version)
            .where(tables.audit.c.generation == live.generation)
            .where(tables.audit.c.verb.in_(("vocab_promote", "vocab_roll_back")))
        ).first()
        what = f"{last.actor} did '{last.verb}' to {last.to_version}" if last else "nobody moved it yet"
        raise ConflictError(
            f"the vocabulary's generation is {live.generation}, you looked at {expected}: {what}. Look again and repeat"
        )
    return live


def _state(connection: Connection, number: int) -> str:
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


def _below(connection: Connection, live: LiveVocab, leaving: int) -> int:
    """Where one goes from `leaving`: to previous where that may be served, else to the full vocabulary."""
    previous = live.previous
    return previous if previous not in (None, leaving) and _state(connection, previous) == "ready" else FULL
