"""What one request contributes to a forward."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Work:
    """What one request contributes to a forward: new tokens from `start`, logits of the last `num_logits`."""

    block_table: list[int]
    start: int
    token_ids: list[int]
    num_logits: int
