"""Decides what each logged request is for: training, early stopping, the gate, or the anchor set.

Whole requests are split by hash, so that tokens of one request never sit on both sides.  Blocks that came
after the last version that passed its gate are fresh; older ones are replay, drawn evenly over segments so
that rare traffic is not forgotten, and within a segment the younger the likelier.  No tenant supplies more
than its share of what is learned.  The anchor set is chosen once and never learned from.  No torch.  Called
by `distill.evidence` and `distill.tuning`.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol, TypeVar

import msgspec

from adapter.sections import DistillSettings
from distill.replay import ReplayStore
from distill.retention import BlockRef

Part = Literal["train", "validation", "gate", "anchor"]
VALIDATION_RECORDS = 4096
GATE_RECORDS = 16384
_ANCHOR_SHARE = 0.1  # of all requests that may become anchors while there are too few
_ANCHOR_BYTES = 0.25  # of what the replay store may hold, that anchors may take beside it


class _Segmented(Protocol):
    @property
    def segment(self) -> str: ...


_T = TypeVar("_T", bound=_Segmented)


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Sequence numbers of the blocks one training uses, and the newest block it knew of.

    `capped` counts blocks that were left out because their tenant had supplied its share.
    """

    fresh: tuple[int, ...]
    replay: tuple[int, ...]
    validation: tuple[int, ...]
    gate: tuple[int, ...]
    anchor: tuple[int, ...] = ()
    newest: int
    capped: int = 0


def part_of(request_id: str, *, holdout_share: float, seed: int) -> Part:
    """Say what a whole request is for, by its hash, unless the anchor set has it.

    The gate gets `holdout_share`, early stopping half as much where that leaves enough to train on;
    so what chose the weights never judges them.
    """
    place = _place(request_id, f"{seed}")
    if place < holdout_share:
        return "gate"
    return "validation" if place < min(1.5 * holdout_share, 0.5 + 0.5 * holdout_share) else "train"


def select(store: ReplayStore, settings: DistillSettings) -> Selection:
    """Choose the blocks of one training.

    When fewer than `min_requests` fresh requests are there, the newest older ones count as fresh, so
    that a training somebody asked for learns from something.  Of older ones no more are chosen than the
    passes of the training can hold: among all of them, age would say nothing.
    """
    anchors = _fill_anchors(store, settings)
    split = _split_fresh(store, settings.min_requests)
    parts: dict[tuple[str, bool], list[BlockRef]] = defaultdict(list)
    for ref in store.refs:
        part = part_of(ref.request_id, holdout_share=settings.holdout_share, seed=settings.seed)
        parts["anchor" if ref.request_id in anchors else part, ref.sequence >= split].append(ref)
    now_s = min(store.clock(), max((ref.logged_at_s for ref in store.refs), default=0.0))

    def held_out(part: Part, records: int) -> tuple[int, ...]:
        old_records = int(records * settings.replay_share)
        new = _up_to(draw_by_segment(parts[part, True], len(store.refs), seed=settings.seed), records - old_records)
        share = settings.replay_share / (1 - settings.replay_share)
        old_records = min(old_records, int(share * sum(ref.records for ref in new)) if new else records)
        old = _up_to(draw_by_segment(parts[part, False], len(store.refs), seed=settings.seed), old_records)
        return tuple(sorted(ref.sequence for ref in (*new, *old)))

    def age(ref: BlockRef) -> float:
        return math.exp2(-max(0.0, now_s - ref.logged_at_s) / settings.replay_half_life_s)

    least = settings.min_requests * _records_of_a_request(parts["train", True])
    fresh = cap_tenants(parts["train", True][::-1], settings.tenant_share, least=least)  # the newest first: they stay
    wanted = _replay_blocks(len(fresh), settings) if fresh else len(store.refs)
    old = draw_by_segment(parts["train", False], wanted, seed=settings.seed, weight=age)
    replay = cap_tenants(old, settings.tenant_share)
    return Selection(
        fresh=tuple(sorted(ref.sequence for ref in fresh)),
        replay=tuple(sorted(ref.sequence for ref in replay)),
        validation=held_out("validation", VALIDATION_RECORDS),
        gate=held_out("gate", GATE_RECORDS),
        anchor=tuple(ref.sequence for part in (False, True) for ref in parts["anchor", part]),
        newest=store.refs[-1].sequence if store.refs else 0,
        capped=len(parts["train", True]) - len(fresh) + len(old) - len(replay),
    )


def draw_by_segment(
    items: Iterable[_T], count: int, *, seed: int, weight: Callable[[_T], float] = lambda item: 1.0
) -> list[_T]:
    """Draw up to `count` items without putting back, one segment after the other.

    Within a segment an item is drawn the earlier the larger its weight: keys log(u) / weight, the largest first
    (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006).
    """
    pick = random.Random(seed)
    by_segment: dict[str, list[tuple[float, int, _T]]] = defaultdict(list)
    for place, item in enumerate(items):
        key = math.log(1.0 - pick.random()) / max(weight(item), 1e-12)
        by_segment[item.segment].append((key, place, item))
    for group in by_segment.values():
        group.sort(key=lambda entry: entry[:2])
    drawn: list[_T] = []
    while len(drawn) < count and any(by_segment.values()):
        for segment in sorted(by_segment):
            if by_segment[segment] and len(drawn) < count:
                drawn.append(by_segment[segment].pop()[2])
    return drawn


def cap_tenants(refs: Sequence[BlockRef], share: float, *, least: float = 0.0) -> list[BlockRef]:
    """Leave out the last blocks of a tenant that supplies more than `share` of the records that stay.

    With a single tenant nothing is left out.  Of two, one half or less makes each supply as much as the other:
    a share below one over the number of tenants cannot be kept by all of them and counts as that.  `least`
    records are everybody's, so that a newcomer with one request does not leave a training with next to nothing.
    All whom nobody told apart are one tenant.
    """
    held: dict[str, int] = defaultdict(int)
    for ref in refs:
        held[ref.tenant] += ref.records
    if len(held) < 2:
        return list(refs)
    allowed = dict.fromkeys(held, max(least, _most(list(held.values()), share)))
    kept: list[BlockRef] = []
    for ref in refs:
        if ref.records <= allowed[ref.tenant]:
            allowed[ref.tenant] -= ref.records
            kept.append(ref)
    return kept


def _records_of_a_request(refs: Sequence[BlockRef]) -> float:
    return sum(ref.records for ref in refs) / max(1, len({ref.request_id for ref in refs}))


def _most(held: Sequence[int], share: float) -> float:
    """Return the most records m a tenant may supply, so that m is `share` of what all supply together.

    The j largest are cut to m, the others supply their own: m = share (j m + others).
    """
    descending = sorted(held, reverse=True)
    for j, largest in enumerate(descending):
        if 1 - share * j < 1e-9:
            break
        most = share * sum(descending[j:]) / (1 - share * j)
        if largest <= most + 1e-9:
            return most + 1e-9
    return float(descending[-1])


def _replay_blocks(fresh: int, settings: DistillSettings) -> int:
    """Return how many older blocks the passes of a training hold beside `fresh` new ones."""
    return math.ceil(math.ceil(settings.epochs) * fresh * settings.replay_share / (1 - settings.replay_share))


def _fill_anchors(store: ReplayStore, settings: DistillSettings) -> set[str]:
    """Return the requests of the anchor set; where a segment has too few, its next ones by hash join for good.

    Only fresh requests join: others may have been trained on.  All segments together get a part of the store's
    bytes, since a client can name as many segments as it likes.
    """
    anchors = {segment: list(names) for segment, names in store.anchors.items()}
    known = {name for names in anchors.values() for name in names}
    before = len(known)
    size: dict[str, int] = defaultdict(int)
    for ref in store.refs:
        size[ref.request_id] += ref.size
    room = store.max_bytes * _ANCHOR_BYTES - sum(size[name] for name in known)
    for ref in store.refs:
        names = anchors.setdefault(ref.segment, [])
        free = ref.sequence > store.marker and ref.request_id not in known and len(names) < settings.anchor_requests
        chosen = free and _place(ref.request_id, f"anchor {settings.seed}") < _ANCHOR_SHARE
        if chosen and size[ref.request_id] <= room:
            room -= size[ref.request_id]
            names.append(ref.request_id)
            known.add(ref.request_id)
    if len(known) > before:
        store.anchor({segment: names for segment, names in anchors.items() if names})
    return known


def _place(request_id: str, salt: str) -> float:
    """Return where a request falls in [0, 1)."""
    digest = hashlib.sha256(f"{salt}:{request_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


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
