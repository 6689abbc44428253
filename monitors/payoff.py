"""Does training pay: what each version cost and what it saved, and when to stop.

A version costs the seconds of every training since the live version before it, failed and refused ones included.  It
saves, with each token it delivers while it is live, what `monitors.savings` found when the guard had compared it with
the version it replaced.  What that version goes on to save under its successors is not in its account, as nobody
measured it on their traffic; but trainings are stopped only where even that would not pay them back.  A second of
training counts as a second of serving: how much a training slows serving down is not measured.

Reads audit, jobs and windows; writes the document `adapter.facts.PAYOFF`, {version: account}.  The watcher calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, func, select

from adapter.contracts import FLOOR_VERSION
from adapter.facts import ENGINE, PAYOFF, Facts
from adapter.jobs import Job, Jobs
from adapter.settings import Settings
from adapter.tables import audit, windows
from monitors.cadence import DAY_S, seconds_of
from monitors.guard import Guard
from monitors.savings import Saving, saving_of

_KEPT_S = 30 * DAY_S  # as long as windows are kept
_EVERY_S = 60.0
_MIN_VERSIONS = 3
_MOVES = ("install", "promote", "roll_back")


class Stay(msgspec.Struct, kw_only=True):
    """One time a version was live: since when, until when (None: it still is), in whose place, at what price.

    `tokens` were delivered by it, `tokens_since` by all versions from then until somebody rolled back.
    """

    version: int
    replaced: int | None
    generation: int
    at_s: float
    until_s: float | None = None
    trainings: int = 0
    training_s: float = 0.0
    joules: float | None = None
    tokens: int = 0
    tokens_since: int = 0
    saving: Saving = Saving(why="it was not compared with the version before it yet")

    @property
    def saved_s(self) -> float | None:
        """Seconds of the engine it saved so far."""
        return None if self.saving.seconds is None else self.saving.seconds * self.tokens

    @property
    def most_s(self) -> float | None:
        """The most it can have saved, under its successors too."""
        if self.saving.interval is None:
            return None
        best = self.saving.interval[1]
        return best * (self.tokens_since if best > 0 else self.tokens)


class Payoff:
    """The accounts of one deployment. `clock` is epoch seconds."""

    def __init__(self, engine: Engine, settings: Settings, clock: Callable[[], float]) -> None:
        self._read = engine.execution_options(readonly=True)
        self._facts, self._jobs = Facts(engine, clock=clock), Jobs(engine, clock=clock)
        self._settings = settings
        self._clock = clock
        self._looked_at_s = float("-inf")
        self.stays: list[Stay] = []
        self._tokens: dict[int, tuple[float, dict[int, int]]] = {}  # by generation: read up to, by version
        self._savings: dict[int, Saving] = {}  # by generation; the one thing that cannot be read again
        for account in (self._facts.get(PAYOFF) or {}).values():
            for stay in account.get("stays", ()):
                self._savings[int(stay["generation"])] = msgspec.convert(stay["saving"], Saving)
        self.refresh()

    def judged(self, guard: Guard, generation: int) -> None:
        """Take down what the guard found about a version that went live with `generation`."""
        need, gamma_max = self._settings.monitors.guard_min_requests, self._settings.engine.gamma_max
        self._savings[generation] = saving_of(guard, self._facts.get(ENGINE), need=need, gamma_max=gamma_max)
        self.refresh()

    def follow(self) -> None:
        """Refresh the accounts where the last time was a minute ago."""
        if abs(self._clock() - self._looked_at_s) >= _EVERY_S:
            self.refresh()

    def refresh(self) -> None:
        """Read everything again and store the document."""
        self._looked_at_s = now = self._clock()
        jobs = self._jobs.since(now - _KEPT_S)
        self.stays = self._stays_since(now - _KEPT_S)
        before_s = float("-inf")
        for stay in self.stays:
            _charge(stay, [job for job in jobs if before_s < (job.finished_at_s or now) <= stay.at_s], now)
            before_s = stay.at_s
            stay.saving = self._savings.get(stay.generation, stay.saving)
        document: dict[str, Any] = {}
        for stay in self.stays:
            document.setdefault(str(stay.version), []).append(stay)
        if document:
            self._facts.put(PAYOFF, {version: account_of(stays) for version, stays in document.items()})

    def loss(self, since_s: float) -> str | None:
        """Say in a sentence that trainings cost more than they save, where that is certain; else None.

        Looks back `payoff_days`, and never before `since_s` (epoch seconds); it needs accounts over all that time,
        three versions that went live in it, and what each of them saved.
        """
        now, days = self._clock(), self._settings.monitors.payoff_days
        from_s = now - days * DAY_S
        if since_s > from_s or not self.stays or self.stays[0].at_s > from_s:
            return None
        stays = [stay for stay in self.stays if stay.at_s > from_s]
        jobs = [job for job in self._jobs.since(from_s) if (job.finished_at_s or now) > from_s]
        cost_s = sum(seconds_of(job, now) for job in jobs)
        saved_s, most_s = [stay.saved_s for stay in stays], [stay.most_s for stay in stays]
        if len(stays) < _MIN_VERSIONS or None in most_s:
            return None
        at_most = sum(item for item in most_s if item is not None)
        if at_most >= cost_s:
            return None
        saved = sum(item for item in saved_s if item is not None)
        return (
            f"training does not pay: {len(stays)} versions went live in {days:g} days and saved {saved:,.0f} s of "
            f"serving, at most {at_most:,.0f} s, for {cost_s:,.0f} s of training, each counted as a second of serving. "
            "The live version stays; `draftsmith drafts train` starts the next training and resumes adaptation"
        )

    def _stays_since(self, at_s: float) -> list[Stay]:
        columns = [audit.c[name] for name in ("at_s", "verb", "from_version", "to_version", "generation")]
        query = select(*columns).where(audit.c.verb.in_(_MOVES), audit.c.at_s > at_s).order_by(audit.c.id)
        with self._read.begin() as connection:
            moves = list(connection.execute(query))
            ends = [*(move.at_s for move in moves[1:]), None]
            served = [self._served(connection, *pair) for pair in zip(moves, ends, strict=False)]
        found: list[Stay] = []
        since_roll_back = 0
        for move, end_s, tokens in reversed(list(zip(moves, ends, served, strict=False))):
            since_roll_back += sum(tokens.values())
            if move.verb == "roll_back":
                since_roll_back = 0
            elif move.verb == "promote" and move.to_version != FLOOR_VERSION:
                found.append(Stay(
                    version=move.to_version, replaced=move.from_version, generation=move.generation, at_s=move.at_s,
                    until_s=end_s, tokens=tokens.get(move.to_version, 0), tokens_since=since_roll_back,
                ))  # fmt: skip
        return found[::-1]

    def _served(self, connection: Connection, move: Any, end_s: float | None) -> dict[int, int]:
        """Return the tokens that versions delivered between a move and the next; reads only what is new."""
        upto_s = self._clock() if end_s is None else end_s
        tokens: dict[int, int]
        read_s, tokens = self._tokens.get(move.generation, (move.at_s, {}))
        if read_s < upto_s:
            query = select(windows.c.version, func.sum(windows.c.delivered)).group_by(windows.c.version)
            new = (windows.c.at_s > read_s, windows.c.at_s <= upto_s, windows.c.version.is_not(None))
            for version, number in connection.execute(query.where(*new)):
                tokens[int(version)] = tokens.get(int(version), 0) + int(number)
            self._tokens[move.generation] = (upto_s, tokens)
        return tokens


def account_of(stays: Sequence[Stay]) -> dict[str, Any]:
    """Return what is shown of a version: its sums over all times it was live, and those themselves."""
    saved = [stay.saved_s for stay in stays]
    joules = [stay.joules for stay in stays if stay.joules is not None]
    unknown = next((stay.saving.why for stay in stays if stay.saving.why), "")
    return {
        "trainings": sum(stay.trainings for stay in stays),
        "training_s": round(sum(stay.training_s for stay in stays), 3),
        "joules": round(sum(joules), 3) if joules else None,
        "tokens": sum(stay.tokens for stay in stays),
        "saved_s": None if None in saved else round(sum(item for item in saved if item is not None), 3),
        "why": unknown,
        "stays": [msgspec.to_builtins(stay) for stay in stays],
    }


def _charge(stay: Stay, jobs: Sequence[Job], now_s: float) -> None:
    """Charge a version with trainings; joules stay None where no trainer could read them."""
    stay.trainings = sum(job.started_at_s is not None for job in jobs)
    stay.training_s = sum(seconds_of(job, now_s) for job in jobs)
    said = [job.result.get("joules") for job in jobs]
    read = [float(item) for item in said if isinstance(item, int | float) and not isinstance(item, bool)]
    stay.joules = sum(read) if read else None
