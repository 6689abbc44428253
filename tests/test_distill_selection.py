"""What each logged request is for: shares that hold, ages that count, anchors that stay."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from test_distill_replay import _block

from adapter.contracts import VerifiedBlock
from adapter.sections import DistillSettings
from adapter.wire import to_wire
from distill.replay import ReplayStore
from distill.selection import Selection, cap_tenants, select

DAY_S = 86400.0


def _store(folder: Path, blocks: list[VerifiedBlock], **bounds: int) -> ReplayStore:
    store = ReplayStore(folder / "replay", **({"max_blocks": 5000} | bounds))
    store.append([(block, to_wire(block)) for block in blocks])
    return store


def _supplied(store: ReplayStore, sequences: tuple[int, ...]) -> Counter[str]:
    records: Counter[str] = Counter()
    for ref in store.refs:
        if ref.sequence in sequences:
            records[ref.tenant] += ref.records
    return records


@pytest.mark.parametrize("share", [0.34, 0.4, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("counts", [(100, 80, 20), (80, 80, 80), (120, 1, 1), (90, 60, 30)])
def test_no_tenant_goes_over_its_share(tmp_path, counts, share):
    """Of what is kept nobody has more than the share, and whoever is below it loses nothing."""
    blocks, number = [], 0
    for tenant, count in zip("abc", counts, strict=True):
        blocks += [_block(number + i, tenant=tenant, records=1) for i in range(count)]
        number += count
    kept = cap_tenants(_store(tmp_path, blocks).refs, share)
    records = Counter(ref.tenant for ref in kept)
    assert max(records.values()) <= share * len(kept) + 1  # whole blocks
    most = max(records.values())
    for tenant, count in zip("abc", counts, strict=True):
        assert records[tenant] == count or records[tenant] >= most - 1


def test_a_share_that_not_all_can_keep_makes_tenants_equal(tmp_path):
    """Three tenants cannot each have a tenth: all supply as much as the smallest."""
    blocks = [_block(i, tenant="abc"[i % 3] if i < 60 else "a", records=1) for i in range(100)]
    kept = cap_tenants(_store(tmp_path, blocks).refs, 0.1)
    assert Counter(ref.tenant for ref in kept) == {"a": 20, "b": 20, "c": 20}


def test_a_capped_tenants_newest_blocks_stay(tmp_path):
    """What is left out of the fresh blocks is the oldest: the traffic that drifted is the newest."""
    blocks = [_block(i, tenant="loud") for i in range(80)] + [_block(80 + i, tenant="quiet") for i in range(20)]
    store = _store(tmp_path, blocks)
    free = select(store, DistillSettings(min_requests=1, anchor_requests=0, tenant_share=1.0)).fresh
    capped = select(store, DistillSettings(min_requests=1, anchor_requests=0, tenant_share=0.5))
    loud = {ref.sequence for ref in store.refs if ref.tenant == "loud"}
    stayed = loud & set(capped.fresh)
    assert sorted(stayed) == sorted(loud & set(free))[-len(stayed) :]
    assert 0 < len(stayed) < len(loud & set(free))
    assert capped.capped == len(free) - len(capped.fresh)
    assert list(capped.fresh) == sorted(capped.fresh)


def test_replay_is_capped_as_well(tmp_path):
    """Old traffic of one tenant is no way around the cap."""
    blocks = [_block(i, tenant="loud" if i % 10 else "quiet") for i in range(200)]
    store = _store(tmp_path, blocks)
    store.mark(150)
    chosen = select(store, DistillSettings(anchor_requests=0, min_requests=1, replay_share=0.6))
    records = _supplied(store, chosen.replay)
    assert records["loud"] <= records["quiet"]
    assert records["quiet"]


def test_replay_holds_what_the_passes_need_and_mostly_young_blocks(tmp_path):
    """Of 400 old days with a half-life of 7, nearly all of a small replay is from the last weeks; rare segments stay.

    The chance that any one block older than 200 days is drawn before 14 younger ones is below 2^-20.
    """
    blocks = [_block(i % 250, at_s=i * DAY_S, segment=f"s{i // 250}") for i in range(500)]
    blocks = [dataclasses.replace(block, request_id=f"q{i}") for i, block in enumerate(blocks)]
    store = _store(tmp_path, blocks)
    store.mark(490)
    settings = DistillSettings(min_requests=1, anchor_requests=0, replay_share=0.25, epochs=3.0)
    chosen = select(store, settings)
    age = {ref.sequence: (500 - ref.logged_at_s / DAY_S, ref.segment) for ref in store.refs}
    assert len(chosen.replay) == len(chosen.fresh)  # three passes, a third as much beside each
    old_segment = [age[s][0] for s in chosen.replay if age[s][1] == "s0"]
    young_segment = [age[s][0] for s in chosen.replay if age[s][1] == "s1"]
    assert abs(len(old_segment) - len(young_segment)) <= 1
    assert max(young_segment) < 200
    assert max(old_segment) < 250 + 200


def test_a_clock_that_runs_ahead_does_not_make_all_others_old(tmp_path):
    """One block from the far future leaves the order of ages among the others as it was."""
    blocks = [_block(i, at_s=i * DAY_S) for i in range(200)]
    ahead = _block(201, at_s=1e12)

    def ages(folder: Path, extra: list[VerifiedBlock]) -> list[float]:
        store = ReplayStore(folder, max_blocks=5000, clock=lambda: 200 * DAY_S)
        store.append([(block, to_wire(block)) for block in [*blocks[:190], *extra, *blocks[190:]]])
        store.mark(190)
        chosen = select(store, DistillSettings(min_requests=1, anchor_requests=0, epochs=2.0))
        return [ref.logged_at_s for ref in store.refs if ref.sequence in chosen.replay and ref.logged_at_s < 1e11]

    assert min(ages(tmp_path / "b", [ahead])) > 100 * DAY_S
    assert min(ages(tmp_path / "a", [])) > 100 * DAY_S


def test_many_segments_cannot_fill_the_disk_with_anchors(tmp_path):
    """Anchors are outside the bounds, so all of them together get a quarter as many bytes, whoever names segments."""
    size = len(to_wire(_block(1)))
    store = _store(tmp_path, [], max_bytes=100 * size)
    settings = DistillSettings(min_requests=1, anchor_requests=24)
    for turn in range(30):
        blocks = [dataclasses.replace(_block(i), request_id=f"q{turn}-{i}", segment=f"{turn}-{i}") for i in range(60)]
        store.append([(block, to_wire(block)) for block in blocks])
        select(store, settings)
    anchored = {name for names in store.anchors.values() for name in names}
    held = sum(ref.size for ref in store.refs if ref.request_id in anchored)
    assert 0 < held <= 25 * size * 1.1
    assert sum(ref.size for ref in store.refs) <= 125 * size * 1.1


def test_a_segment_gets_its_anchors_once_and_late_ones_only_fill_up(tmp_path):
    """A segment that had too few gets more later; none of the first is replaced, and none goes over the number."""
    settings = DistillSettings(min_requests=1, anchor_requests=5)
    store = _store(tmp_path, [_block(i) for i in range(20)])
    few = select(store, settings)
    first = {name for names in store.anchors.values() for name in names}
    assert len(first) < 5
    more = [_block(i) for i in range(20, 250)] + [dataclasses.replace(_block(i), segment="code") for i in range(250)]
    more = [dataclasses.replace(block, request_id=f"{block.segment}{block.request_id}") for block in more]
    store.append([(block, to_wire(block)) for block in more])
    chosen = select(store, settings)
    assert {segment: len(names) for segment, names in store.anchors.items()} == {"chat": 5, "code": 5}
    assert first <= set(store.anchors["chat"])
    assert set(few.anchor) <= set(chosen.anchor)
    again = select(ReplayStore(tmp_path / "replay", max_blocks=5000), settings)
    assert again.anchor == chosen.anchor


def test_a_late_block_of_an_anchor_is_an_anchor(tmp_path):
    """A long request's later blocks follow its first one, so that none of its tokens is ever learned."""
    settings = DistillSettings(min_requests=1, anchor_requests=5)
    store = _store(tmp_path, [_block(i) for i in range(100)])
    select(store, settings)
    name = store.anchors["chat"][0]
    late = dataclasses.replace(_block(300, records=5), request_id=name, first_position=50)
    late = dataclasses.replace(late, positions=b"".join((52 + i).to_bytes(4, "little") for i in range(5)))
    store.append([(late, to_wire(late))])
    chosen = select(store, settings)
    assert store.refs[-1].sequence in chosen.anchor
    for part in (chosen.fresh, chosen.replay, chosen.validation, chosen.gate):
        assert store.refs[-1].sequence not in part


def test_an_empty_store_chooses_nothing(tmp_path):
    """Nothing logged yet is no error here."""
    chosen = select(_store(tmp_path, []), DistillSettings())
    assert chosen == Selection(fresh=(), replay=(), validation=(), gate=(), newest=0)
