"""Where the learning loop stands: one small document that survives a restart."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import structlog

from monitors.cadence import Evidence
from monitors.guard import Guard

log = structlog.get_logger(__name__)

Phase = Literal["watching", "collecting", "training", "observing", "cooling", "held"]


class LoopState(msgspec.Struct, kw_only=True):
    """Where the loop stands. `sentence` is what it is doing, in words for the screen.

    `failures` in a row make pauses longer; `in_vain` counts trainings on drift in a row that brought nothing, and
    `refused` all versions in a row that the gate refused.  `until_s` ends cooling, and held where that has an end.
    `resumed_at_s` is when what was spent and saved began to count afresh.
    """

    phase: Phase = "watching"
    since_s: float = 0.0
    sentence: str = "waiting for the first requests"
    job_id: str | None = None
    generation: int = 0
    live: int | None = None
    until_s: float = 0.0
    failures: int = 0
    in_vain: int = 0
    refused: int = 0
    collected: int = 0
    resumed_at_s: float = 0.0
    evidence: Evidence = msgspec.field(default_factory=Evidence)
    guard: Guard | None = None


def loop_state(document: dict[str, Any] | None) -> LoopState | None:
    """Read the loop's state back; a document of another layout starts it afresh."""
    if not document or not document.get("loop"):
        return None
    try:
        return msgspec.convert(document["loop"], LoopState)
    except msgspec.ValidationError as error:
        log.warning("loop_state_unreadable", error=str(error))
        return None
