"""Move the aliases `live` and `previous` over numbered rows: the rules that every registry here shares.

Every move is one transaction, raises the generation by one and writes one audit row.  Number 0 is the
floor: it is always ready, cannot be forbidden, and is where a roll back ends when nothing else is left.
A mover may say which generation it looked at; when somebody moved first it gets a `ConflictError` that
names who.  Writers stand in one line (`adapter.database`), so nobody moves between a check and its move.
Knows nothing of what a row holds.  Base of the registries of versions and of vocabularies.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from sqlalchemy import ColumnElement, Connection, Engine, Table, insert, select, update

from adapter import tables
from adapter.contracts import FLOOR_VERSION, ConflictError, RegistryError
from adapter.versions import Aliases

AliasesT = TypeVar("AliasesT", bound=Aliases)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Who changes something and why, for the audit log."""

    actor: str
    reason: str
    automatic: bool = False
    evidence: dict[str, Any] | None = None


class AliasRegistry(ABC, Generic[AliasesT]):
    """Rows, two aliases over them and the history of both; every method is one transaction.

    Args:
        engine: an open, migrated database.
        clock: epoch seconds.
        announce: called with the new generation after a move commits; a hint, may do nothing.
    """

    noun: ClassVar[str]  # what sentences and log lines call a row
    _scope: ClassVar[str]  # the row of the table of generations
    _rows: ClassVar[Table]
    _aliases: ClassVar[Table]
    _number: ClassVar[str]  # the column of both that holds the number
    _verbs: ClassVar[str]  # what the audit log's verbs begin with
    _moves: ClassVar[tuple[str, ...]] = ("install", "promote", "roll_back")  # verbs that raise the generation
    _counter: ClassVar[str]  # what a conflict calls the generation
    _destination: ClassVar[str]  # how a conflict says where somebody moved to, before the number
    _at_the_floor: ClassVar[str]  # why nothing can be rolled back
    _floor_stays: ClassVar[str]  # why the floor cannot be quarantined

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

    def live(self) -> AliasesT:
        """Return where the aliases point now.

        Raises:
            RegistryError: nothing was ever made live here.
        """
        with self._read.begin() as connection:
            return self._live(connection)

    def expect(self, generation: int | None) -> None:
        """Refuse work on a view that is old already; None is never old.

        Raises:
            ConflictError: this is not the generation.
        """
        with self._read.begin() as connection:
            self._expect(connection, generation)

    def promote(
        self,
        number: int,
        *,
        actor: str,
        reason: str,
        automatic: bool = False,
        expected_generation: int | None = None,
        evidence: dict[str, Any] | None = None,
    ) -> AliasesT:
        """Make a row live; what was live becomes previous.

        Raises:
            RegistryError: unknown, quarantined, rejected or already live.
            ConflictError: the generation is not `expected_generation`.
        """
        cause = Cause(actor=actor, reason=reason, automatic=automatic, evidence=evidence)
        with self._engine.begin() as connection:
            before = self._expect(connection, expected_generation)
            state = self._state(connection, number)
            if number == before.live:
                raise RegistryError(f"{self.noun} {number} is live already")
            if state != "ready":
                raise RegistryError(f"{self.noun} {number} is {state} and cannot be promoted; only 'ready' ones can")
            after = self._move(connection, before, number, "promote", cause)
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
    ) -> AliasesT:
        """Make the previous row live again; the floor when there is no previous one.

        Raises:
            RegistryError: the floor is live and nothing lies below it.
            ConflictError: the generation is not `expected_generation`.
        """
        cause = Cause(actor=actor, reason=reason, automatic=automatic, evidence=evidence)
        with self._engine.begin() as connection:
            before = self._expect(connection, expected_generation)
            to = self._below(connection, before)
            if to == before.live:
                raise RegistryError(self._at_the_floor)
            after = self._move(connection, before, to, "roll_back", cause)
        self._announce(after.generation)
        return after

    def quarantine(
        self, number: int, *, actor: str, reason: str, automatic: bool = False, evidence: dict[str, Any] | None = None
    ) -> AliasesT:
        """Forbid a row for good.  A live one is left first: to previous, or to the floor.

        Quarantining twice changes nothing and writes no second audit row.

        Raises:
            RegistryError: unknown, or the floor.
        """
        if number == FLOOR_VERSION:
            raise RegistryError(self._floor_stays)
        cause = Cause(actor=actor, reason=reason, automatic=automatic, evidence=evidence)
        with self._engine.begin() as connection:
            before = after = self._expect(connection, None)
            if self._state(connection, number) == "quarantined":
                return before
            connection.execute(
                update(self._rows).where(self._rows.c[self._number] == number).values(state="quarantined")
            )
            self._note(connection, "quarantine", number, None, before.generation, cause)
            if number == before.live:
                why = f"{self.noun} {number} was quarantined: {reason}"
                left = Cause(actor=actor, reason=why, automatic=automatic, evidence=evidence)
                after = self._move(connection, before, self._below(connection, before), "roll_back", left)
            else:
                after = self._forbidden(connection, before, number, cause)
        if after.generation != before.generation:
            self._announce(after.generation)
        return after

    # -- inside one transaction --------------------------------------------------------------

    @abstractmethod
    def _live(self, connection: Connection) -> AliasesT:
        """Return where the aliases point."""

    @abstractmethod
    def _state(self, connection: Connection, number: int) -> str:
        """Return a row's state; raise a RegistryError that lists what exists where there is none."""

    def _forbidden(self, connection: Connection, before: AliasesT, number: int, cause: Cause) -> AliasesT:
        """Hear that a row that is not live was quarantined; return where the aliases point now."""
        return before

    def _below(self, connection: Connection, live: AliasesT) -> int:
        """Where one goes from the live row: to previous where that may be served, else to the floor."""
        to = live.previous
        ready = to is not None and to != live.live and self._state(connection, to) == "ready"
        return to if to is not None and ready else FLOOR_VERSION

    def _expect(self, connection: Connection, expected: int | None) -> AliasesT:
        """Return where the aliases point if that is what the caller looked at."""
        live = self._live(connection)
        if expected is None or expected == live.generation:
            return live
        verbs = [self._verbs + verb for verb in self._moves]
        last = connection.execute(
            select(tables.audit.c.actor, tables.audit.c.verb, tables.audit.c.from_version, tables.audit.c.to_version)
            .where(tables.audit.c.generation == live.generation, tables.audit.c.verb.in_(verbs))
            .order_by(tables.audit.c.id)
        ).first()
        what = "nobody moved it yet"
        if last:
            to = f"of {self.noun} {last.from_version}"
            if last.to_version is not None:
                to = f"{self._destination} {last.to_version}"
            what = f"{last.actor} did '{last.verb}' {to} meanwhile"
        raise ConflictError(
            f"{self._counter} is {live.generation}, you looked at {expected}: {what}. Look again and repeat"
        )

    def _move(self, connection: Connection, before: AliasesT, to: int, verb: str, cause: Cause) -> AliasesT:
        generation = before.generation + 1
        self._point(connection, generation, live=to, previous=before.live)
        self._note(connection, verb, before.live, to, generation, cause)
        return self._live(connection)

    def _point(self, connection: Connection, generation: int, **aliases: int) -> None:
        scoped = tables.generation.c.scope == self._scope
        _put(connection, tables.generation, scoped, {"scope": self._scope, "value": generation})
        for name, number in aliases.items():
            named = self._aliases.c.name == name
            _put(connection, self._aliases, named, {"name": name, self._number: number})

    def _note(
        self,
        connection: Connection,
        verb: str,
        from_number: int | None,
        to_number: int | None,
        generation: int,
        cause: Cause,
    ) -> None:
        connection.execute(
            insert(tables.audit).values(
                at_s=self._clock(), actor=cause.actor, automatic=int(cause.automatic), verb=self._verbs + verb,
                from_version=from_number, to_version=to_number, generation=generation, reason=cause.reason,
                evidence=cause.evidence or {},
            )
        )  # fmt: skip


def _put(connection: Connection, table: Table, condition: ColumnElement[bool], values: dict[str, Any]) -> None:
    if not connection.execute(update(table).where(condition).values(**values)).rowcount:
        connection.execute(insert(table).values(**values))
