"""The engine's counters as other processes see them."""

from __future__ import annotations

import msgspec


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine's counters as the API process sees them, a couple of times a second."""

    engine_id: str
    version: int
    previous: int | None
    generation: int
    running: int
    waiting: int
    kv_usage: float
    preempted: int
    steps: int
    step_s: float
    draft_s: float
    median_step_ms: float
    median_batch: float | None
    rounds: int
    drafted: int
    examined: int
    accepted: int
    accepted_by_position: list[int]
    prompt_tokens: int
    generated_tokens: int
    finished_by_reason: dict[str, int]
    log_offered: int
    log_written: int
    log_dropped: int
    log_connected: bool
    swaps: int
    last_swap_version: int | None
    last_swap_pause_ms: float | None
