"""Write small documents to SQL from a thread of its own, so that a slow database never delays a step.

Only the newest value of each document is kept; a database that is away is tried again with the next.
"""

from __future__ import annotations

import threading
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from adapter.facts import Facts

log = structlog.get_logger(__name__)


class FactsWriter:
    """Takes documents from the decoding loop and puts them into SQL."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._newest: dict[str, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="facts-writer", daemon=True)
        self._thread.start()

    def offer(self, name: str, value: dict[str, Any]) -> None:
        """Replace the document `name` soon.  Neither blocks nor raises."""
        with self._changed:
            self._newest[name] = value
            self._changed.notify()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Write what is left and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._newest and not self._stopping:
                    self._changed.wait()
                documents, self._newest = self._newest, {}
                if not documents and self._stopping:
                    return
            for name, value in documents.items():
                self._put(name, value)

    def _put(self, name: str, value: dict[str, Any]) -> None:
        try:
            self._facts.put(name, value)
            self._failing = False
        except (SQLAlchemyError, OSError) as error:
            if not self._failing:
                log.warning("fact_not_written", name=name, error=str(error))
            self._failing = True
