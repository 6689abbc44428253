"""The best version of each segment, so that a candidate is compared with it and a workload that returns finds it.

A version becomes champion of a segment when the guard keeps it and it beat there what was live before, or when it
serves `REQUESTS` requests in a row with a higher mean acceptance than the champion's recorded one.  The second says
nothing certain, because traffic changes too; the gate that reads this compares on the same blocks.  Kept in the
document `adapter.facts.CHAMPIONS`; the watcher writes it, the trainer reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from adapter.contracts import RegistryError
from adapter.facts import CHAMPIONS, Facts
from adapter.registry import Registry
from monitors.guard import Guard
from monitors.segments import MAX_SEGMENTS

REQUESTS = 200
_PAIRS = 10  # comparable requests below which the guard's mean says nothing about a segment


class Champion(msgspec.Struct, frozen=True, kw_only=True):
    """The best version of one segment: its mean acceptance over `requests`, and when that was found."""

    version: int
    acceptance: float
    requests: int
    at_s: float


class Champions:
    """One champion a segment, `MAX_SEGMENTS` at the most; the one that was found longest ago makes room."""

    def __init__(self, facts: Facts, registry: Registry, clock: Callable[[], float]) -> None:
        self._facts = facts
        self._registry = registry
        self._clock = clock
        try:
            self._of = msgspec.convert(facts.get(CHAMPIONS) or {}, dict[str, Champion])
        except msgspec.ValidationError:  # another layout: start afresh
            self._of = {}
        self._stored = dict(self._of)

    def keep(self, guard: Guard) -> None:
        """Crown a version that the guard kept, where it beat what was live before."""
        for segment, seen in guard.seen.items():
            if seen.pairs >= _PAIRS and seen.gain > 0:
                self._crown(segment, guard.version, seen.paired / seen.pairs, seen.pairs)
        self.store()

    def follow(self, version: int, recent: Mapping[str, Sequence[float]]) -> None:
        """Look at the latest acceptances of the live version, by segment, newest last."""
        for segment, values in recent.items():
            if len(values) < REQUESTS:
                continue
            mean = sum(values[-REQUESTS:]) / REQUESTS
            best = self._of.get(segment)
            if best is None or mean > best.acceptance:
                self._crown(segment, version, mean, REQUESTS)

    def store(self) -> None:
        """Drop versions that may not be served any more, and write the document if it changed."""
        known = {version: self._ready(version) for version in {item.version for item in self._of.values()}}
        self._of = {segment: item for segment, item in self._of.items() if known[item.version]}
        if self._of != self._stored:
            document: dict[str, Any] = msgspec.to_builtins(self._of)
            self._facts.put(CHAMPIONS, document)
            self._stored = dict(self._of)

    def _crown(self, segment: str, version: int, acceptance: float, requests: int) -> None:
        self._of[segment] = Champion(
            version=version, acceptance=round(acceptance, 4), requests=requests, at_s=self._clock()
        )
        while len(self._of) > MAX_SEGMENTS:
            del self._of[min(self._of, key=lambda name: self._of[name].at_s)]

    def _ready(self, version: int) -> bool:
        try:
            return self._registry.draft(version).state == "ready"
        except RegistryError:
            return False
