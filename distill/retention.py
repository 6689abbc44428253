"""Which blocks a bounded store keeps: every segment its fair share, and of each the newest.

No torch; knows nothing about files.  Called by `distill.replay`; `distill.selection` reads its `BlockRef`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BlockRef:
    """Where one block lies, and what is needed to choose it without opening it."""

    sequence: int
    request_id: str
    segment: str
    first_record: int
    records: int
    tokens: int
    file: Path
    offset: int
    size: int
    tenant: str = ""
    logged_at_s: float = 0.0
    target_fingerprint: str = ""
    content: bytes = b""  # a hash of what it says


def within_bounds(refs: Iterable[BlockRef], *, max_blocks: int, max_bytes: int) -> list[BlockRef]:
    """Drop blocks until both bounds hold: always the oldest of the segment that holds most bytes.

    So no segment loses anything while another holds more, and a rare one is never pushed out by a flood.  Of
    segments that hold the same, the one with the oldest block gives it up.  `refs` come oldest first.
    """
    by_segment: dict[str, list[BlockRef]] = defaultdict(list)
    for ref in refs:
        by_segment[ref.segment].append(ref)
    for group in by_segment.values():
        group.reverse()  # the oldest last, to be popped
    held = {name: sum(ref.size for ref in group) for name, group in by_segment.items()}
    number, total = sum(map(len, by_segment.values())), sum(held.values())
    while number > max_blocks or total > max_bytes:
        richest = max(held, key=lambda name: (held[name], -by_segment[name][-1].sequence))
        dropped = by_segment[richest].pop()
        held[richest] -= dropped.size
        number, total = number - 1, total - dropped.size
        if not by_segment[richest]:
            del held[richest]
    return [ref for group in by_segment.values() for ref in group]
