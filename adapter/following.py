"""Hold what is in force and what was prepared to replace it, between a thread and the decoding loop.

The thread that follows a registry prepares the next thing and leaves it ready; the loop takes it between
two rounds, which only moves references.  Knows nothing of drafts or vocabularies.  Base of `HotSwap` and
of `DraftVocab`.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Generic, TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError

from adapter.aliases import AliasRegistry
from adapter.contracts import RegistryError

log = structlog.get_logger(__name__)

ACTOR = "engine"

ItemT = TypeVar("ItemT")


class Follower(Generic[ItemT]):
    """A numbered thing in force, of some generation, and the next one once it is ready.

    Hold the lock to see what is in force and what is ready as one.
    """

    def __init__(self, number: int, item: ItemT, generation: int) -> None:
        self._in_force = (generation, number, item)
        self._ready: tuple[int, int, ItemT] | None = None
        self._lock = threading.Lock()

    @property
    def generation(self) -> int:
        """The registry's generation that is in force."""
        return self._in_force[0]

    @property
    def waits(self) -> bool:
        """Whether something is ready that is not in force yet."""
        return self._ready is not None

    def _flip(self) -> tuple[int, float] | None:
        """Put what is ready in force; return the number replaced and the pause in ms, None where nothing is."""
        if self._ready is None:
            return None
        begin = time.perf_counter()
        with self._lock:
            if self._ready is None:
                return None
            replaced = self._in_force[1]
            self._in_force, self._ready = self._ready, None
        return replaced, (time.perf_counter() - begin) * 1e3

    def _prepared(self) -> int | None:
        """Return the generation that is ready.  Ask before `generation`: a flip turns the one into the other."""
        with self._lock:
            return None if self._ready is None else self._ready[0]


def forbid(registry: AliasRegistry[Any], number: int, reason: str, *, quiet: bool = False) -> None:
    """Quarantine what must not be loaded; without the registry, serving goes on as it is, `quiet` about it."""
    try:
        registry.quarantine(number, actor=ACTOR, reason=reason, automatic=True)
    except (SQLAlchemyError, RegistryError) as failure:
        if not quiet:
            log.warning("quarantine_not_written", **{registry.noun: number}, error=str(failure))
