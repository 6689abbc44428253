"""The engine's counters as other processes see them."""

from __future__ import annotations

from typing import Any

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
    prefix_queries: int
    prefix_hits: int
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
    not_finite: int = 0  # requests ended because the target's logits were NaN or infinite
    draft_not_finite: int = 0  # forwards of the draft that gave such logits
    undelivered: int = 0  # requests ended because their API process took no more messages
    alternates: list[int] = []  # versions that may draft beside the live one
    routed: int = 0  # requests that one of them was chosen for
    draft_vocab_number: int = 0  # 0 is the full vocabulary
    draft_vocab_size: int = 0  # 0 where nothing is trimmed for good
    draft_vocab_counted: int = 0  # committed tokens looked at, and how many of them the draft scores
    draft_vocab_inside: int = 0
    controller: dict[str, Any] = {}  # what it knows and why it chose last; see `Controller.explain`
