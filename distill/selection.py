"""Decides what each logged request is for: training, early stopping, or the gate.

Whole requests are split by hash, so that tokens of one request never sit on both sides.  Blocks that
came after the last version that passed its gate are fresh; older ones are replay, drawn evenly over
segments so that rare traffic is not forgotten.  No torch.  Called by `distill.trainer` and
`distill.tuning`.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, TypeVar

import msgspec

from adapter.settings import DistillSettings
from distill.replay import BlockRef, ReplayStore

Part = Literal["train", "validation", "gate"]
VALIDATION_RECORDS = 4096
GATE_RECORDS = 16384


class _Segmented(Protocol):
    @property
    def segment(self) -> str: ...


_T = TypeVar("_T", bound=_Segmented)


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Sequence numbers of the blocks one training uses, and the newest block it knew of."""

    fresh: tuple[int, ...]
    replay: tuple[int, ...]
    validation: tuple[int, ...]
    gate: tuple[int, ...]
    newest: int


def part_of(request_id: str, *, holdout_share: float, seed: int) -> Part:
    """Say what a whole request is for, by its hash.

    The gate gets `holdout_share`, early stopping half as much where that leaves enough to train on;
    so what chose the weights never judges them.
    """
    digest = hashlib.sha256(f"{seed}:{request_id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < holdout_share:
        return "gate"
    return "validation" if place < min(1.5 * holdout_share, 0.5 + 0.5 * holdout_share) else "train"


def select(store: ReplayStore, settings: DistillSettings) -> Selection:
    """Choose the blocks of one training.

    When fewer than `min_requests` fresh requests are there, the newest older ones count as fresh, so
    that a training somebody asked for learns from something.
    """
    split = _split_fresh(store, settings.min_requests)
    parts: dict[tuple[str, bool], list[BlockRef]] = defaultdict(list)
    for ref in store.refs:
        part = part_of(ref.request_id, holdout_share=settings.holdout_share, seed=settings.seed)
        parts[part, ref.sequence >= split].append(ref)

    def held_out(part: Part, records: int) -> tuple[int, ...]:
        old_records = int(records * settings.replay_share)
        new = _up_to(draw_by_segment(parts[part, True], len(store.refs), seed=settings.seed), records - old_records)
        share = settings.replay_share / (1 - settings.replay_share)
        old_records = min(old_records, int(share * sum(ref.records for ref in new)) if new else records)
        old = _up_to(draw_by_segment(parts[part, False], len(store.refs), seed=settings.seed), old_records)
        return tuple(sorted(ref.sequence for ref in (*new, *old)))

    return Selection(
        fresh=tuple(ref.sequence for ref in parts["train", True]),
        replay=tuple(ref.sequence for ref in parts["train", False]),
        validation=held_out("validation", VALIDATION_RECORDS),
        gate=held_out("gate", GATE_RECORDS),
        newest=store.refs[-1].sequence if store.refs else 0,
    )


def draw_by_segment(items: Iterable[_T], count: int, *, seed: int) -> list[_T]:
    """Draw up to `count` items without putting back, one segment after the other."""
    pick = random.Random(seed)
    by_segment: dict[str, list[_T]] = defaultdict(list)
    for item in items:
        by_segment[item.segment].append(item)
    for group in by_segment.values():
        pick.shuffle(group)
    drawn: list[_T] = []
    while len(drawn) < count and any(by_segment.values()):
        for segment in sorted(by_segment):
            if by_segment[segment] and len(drawn) < count:
                drawn.append(by_segment[segment].pop())
    return drawn


def _split_fresh(store: ReplayStore, min_requests: int) -> int:
    """Return the sequence number from which blocks count as fresh."""
    marker = store.marker
    first, seen = marker + 1, set[str]()
    for ref in reversed(store.refs):
        if ref.sequence <= marker and len(seen) >= min_requests:
            break
        seen.add(ref.request_id)
        first = min(first, ref.sequence)
    return first


def _up_to(refs: Sequence[BlockRef], records: int) -> list[BlockRef]:
    kept, total = [], 0
    for ref in refs:
        if total + ref.records > records and total:
            break
        if records <= 0:
            break
        kept.append(ref)
        total += ref.records
    return kept
