"""Small documents in SQL, each owned by one writer: what pair is served, where drift stands."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, delete, insert, select

from adapter.tables import facts

STARTING = "starting"  # there while an engine loads: the pair in PAIR may be an earlier start's
PAIR = "pair"  # written by the engine: target path, dtype, fingerprints, draft layers
SERVING = "serving"  # written by the API process: its URL and pid
DRIFT = "drift"  # written by the watcher: detector state per segment
WATCHER = "watcher"  # written by the watcher: loop state, cool-down, counters
ENGINE = "engine"  # written by the engine: its load and its measured speed-up
CHAMPIONS = "champions"  # written by the watcher: the best version of each segment
PAYOFF = "payoff"  # written by the watcher: what each version cost and saved
ADVICE = "advice"  # written by the watcher: whether this traffic should be speculated on
SWAPS = "swaps"  # written by the engine: the last swaps with their pause in milliseconds


class Facts:
    """Read and replace documents by name."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._read = engine.execution_options(readonly=True)
        self._clock = clock

    def put(self, name: str, value: dict[str, Any]) -> None:
        """Replace the document `name`."""
        with self._engine.begin() as connection:
            connection.execute(delete(facts).where(facts.c.name == name))
            connection.execute(insert(facts).values(name=name, value=value, at_s=self._clock()))

    def drop(self, name: str) -> None:
        """Remove the document `name`, if it is there."""
        with self._engine.begin() as connection:
            connection.execute(delete(facts).where(facts.c.name == name))

    def get(self, name: str) -> dict[str, Any] | None:
        """Return the document `name`, or None when nobody wrote it yet."""
        with self._read.begin() as connection:
            return connection.execute(select(facts.c.value).where(facts.c.name == name)).scalar_one_or_none()
