"""What the replay store gives up and what it never does: fair shares, numbers, other targets' blocks, half a write."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from test_distill_replay import TARGET, _block

from adapter import keys
from adapter.contracts import Sampling, VerifiedBlock
from adapter.sections import DistillSettings
from adapter.streams import StreamReader
from adapter.wire import to_wire
from distill.frames import TornFileError, frames_of, pack
from distill.intake import defect_of, drain
from distill.replay import ReplayError, ReplayStore
from distill.retention import BlockRef, within_bounds
from distill.selection import select


def _put(store: ReplayStore, blocks: list[VerifiedBlock]) -> None:
    store.append([(block, to_wire(block)) for block in blocks])


def _bytes(store_folder: Path) -> int:
    return sum(path.stat().st_size for path in store_folder.glob("blocks-*"))


def _ref(sequence: int, segment: str, size: int = 10) -> BlockRef:
    return BlockRef(sequence, f"r{sequence}", segment, 0, 1, 1, Path("x"), 0, size)


@pytest.mark.parametrize(("max_blocks", "max_bytes"), [(12, 10**6), (10**6, 120), (7, 10**6), (10**6, 0), (0, 9)])
def test_no_segment_loses_anything_while_another_holds_more(max_blocks, max_bytes):
    """After any bound, whoever lost something holds as much as the richest but for one block, and only its newest."""
    refs = [_ref(i, "big" if i % 5 else "mid" if i % 3 else "rare") for i in range(60)]
    kept = within_bounds(refs, max_blocks=max_blocks, max_bytes=max_bytes)
    assert len(kept) <= max_blocks
    assert sum(ref.size for ref in kept) <= max_bytes
    assert len(kept) == min(60, max_blocks, max_bytes // 10)
    held = {name: sorted(ref.sequence for ref in kept if ref.segment == name) for name in ("big", "mid", "rare")}
    for name, numbers in held.items():
        own = [ref.sequence for ref in refs if ref.segment == name]
        assert numbers == own[len(own) - len(numbers) :]
        if len(numbers) < len(own):
            assert len(numbers) >= max(map(len, held.values())) - 1


def test_of_segments_that_hold_the_same_the_oldest_block_goes():
    """With one block each, age decides, not the alphabet."""
    refs = [_ref(i, name) for i, name in enumerate("abcwxyz")]
    assert {ref.segment for ref in within_bounds(refs, max_blocks=3, max_bytes=10**6)} == set("xyz")


def test_numbers_do_not_come_back_when_the_last_ones_were_dropped(tmp_path):
    """The blocks with the highest numbers are the oldest in time and go first; their numbers stay taken."""
    now = [100.0]

    def opened() -> ReplayStore:
        return ReplayStore(tmp_path, max_blocks=1000, max_age_s=50.0, clock=lambda: now[0])

    _put(opened(), [_block(i, at_s=95.0) for i in range(5)] + [_block(10 + i, at_s=60.0) for i in range(20)])
    now[0] = 120.0
    _put(opened(), [])
    store = opened()
    assert [ref.sequence for ref in store.refs] == [1, 2, 3, 4, 5]
    _put(store, [_block(77, at_s=119.0)])
    assert [ref.sequence for ref in opened().refs] == [1, 2, 3, 4, 5, 26]
    assert [opened().load(ref).request_id for ref in opened().refs] == ["r0", "r1", "r2", "r3", "r4", "r77"]
    now[0] = 1000.0
    for _ in range(2):
        _put(opened(), [])
    assert not opened().refs
    assert _bytes(tmp_path) <= 26 * 8  # places only
    _put(opened(), [_block(78, at_s=999.0)])
    assert [ref.sequence for ref in opened().refs] == [27]


def test_what_is_too_old_leaves_the_disk_although_nothing_arrives(tmp_path, valkey_client):
    """A drain of an empty stream trims, so that a promise about age does not hang on traffic."""
    now = [100.0]
    store = ReplayStore(tmp_path, max_blocks=1000, max_age_s=50.0, clock=lambda: now[0])
    _put(store, [_block(i, at_s=90.0) for i in range(50)])
    before, now[0] = _bytes(tmp_path), 500.0
    drain(store, StreamReader(valkey_client, keys.BLOCKS, keys.TRAINER_GROUP, "a"), lambda block: None)
    assert not store.refs
    assert _bytes(tmp_path) < before / 10


def test_files_hold_at_most_as_many_dead_bytes_as_live_ones(tmp_path):
    """Through a long flood beside rare blocks in every file, the disk holds no more than twice what is kept."""
    size = len(to_wire(_block(1)))
    store = ReplayStore(tmp_path, max_blocks=64, max_bytes=64 * size)
    for i in range(0, 250, 5):
        _put(store, [_block(i, segment="rare")] if i % 40 == 0 else [])
        _put(store, [_block(i + j) for j in range(1, 5)])
        kept = sum(ref.size + 8 for ref in store.refs)
        assert _bytes(tmp_path) <= 2 * kept + 8 * (size + 8)  # and the file that is being filled
    again = ReplayStore(tmp_path, max_blocks=64, max_bytes=64 * size)
    assert again.refs == store.refs
    assert [again.load(ref).request_id for ref in again.refs] == [ref.request_id for ref in store.refs]
    assert sum(ref.segment == "rare" for ref in again.refs) == 7
    assert again.torn == 0


def test_what_says_the_same_as_something_stored_is_a_repeat(tmp_path):
    """Also in a later batch and after a restart: the same tokens from another request are not stored again."""
    store = ReplayStore(tmp_path, max_blocks=100)
    _put(store, [_block(i) for i in range(4)])
    same = [dataclasses.replace(_block(i), request_id=f"again{i}") for i in range(4)]
    assert store.append([(block, to_wire(block)) for block in [*same, _block(9)]]) == 1
    assert ReplayStore(tmp_path, max_blocks=100).append([(block, to_wire(block)) for block in same]) == 0
    assert [ref.request_id for ref in ReplayStore(tmp_path, max_blocks=100).refs] == ["r0", "r1", "r2", "r3", "r9"]


def test_half_a_rewrite_changes_nothing(tmp_path):
    """What a kill leaves beside a file that was being written anew is never read."""
    store = ReplayStore(tmp_path, max_blocks=100)
    _put(store, [_block(i) for i in range(10)])
    path = store.refs[0].file
    path.with_name(path.name + ".tmp").write_bytes(path.read_bytes()[:100])
    again = ReplayStore(tmp_path, max_blocks=100)
    assert (again.refs, again.torn) == (store.refs, 0)


def test_a_block_that_moved_is_never_taken_for_another(tmp_path):
    """A reader whose list is older than the files is told so, even where whole blocks lie at the old places."""
    store = ReplayStore(tmp_path, max_blocks=100)
    _put(store, [_block(i) for i in range(10)])
    first, second = store.refs[:2]
    with pytest.raises(ReplayError, match="has moved; open the store again"):
        store.load(dataclasses.replace(first, offset=second.offset, size=second.size))


def test_blocks_of_another_target_are_neither_listed_nor_anchored(tmp_path):
    """After a change of target the store is empty, the old anchors hold no place, and the disk lets go of them."""
    old = ReplayStore(tmp_path, max_blocks=1000, target_fingerprint="x" * 64)
    _put(old, [_block(i, target="x" * 64) for i in range(100)])
    settings = DistillSettings(min_requests=1, anchor_requests=3)
    assert len(select(old, settings).anchor) == 3
    new = ReplayStore(tmp_path, max_blocks=1000, target_fingerprint=TARGET)
    assert not new.refs
    _put(new, [dataclasses.replace(_block(i), request_id=f"n{i}") for i in range(100)])
    chosen = select(new, settings)
    assert len(chosen.anchor) == 3
    assert min((*chosen.fresh, *chosen.anchor)) > 100
    reopened = ReplayStore(tmp_path, max_blocks=1000)
    assert {ref.target_fingerprint for ref in reopened.refs} == {TARGET}


def test_frames_are_read_as_they_were_packed():
    """Payloads come back, empty ones too; a wrong checksum costs one, a cut is told."""
    data = b"".join(pack(payload) for payload in (b"one", b"", b"three"))
    assert [payload for _, payload in frames_of(data)] == [b"one", b"", b"three"]
    assert [data[at : at + 3] for at, _ in frames_of(data)][::2] == [b"one", b"thr"]
    broken = bytearray(data)
    broken[9] ^= 1
    assert [payload for _, payload in frames_of(bytes(broken))] == [None, b"", b"three"]
    for cut in (1, 5, 9, 12):
        with pytest.raises(TornFileError):
            list(frames_of(data[:-cut]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tail_mass": b"\x00\x00\xc0\x7f" * 2}, "tail mass"),
        ({"tail_mass": b"\x00\x00\x00\x40" * 2}, "tail mass"),
        ({"topk_logprobs": b"\x00\x7e" * 4}, "NaN or above zero"),
        ({"logged_at_s": float("nan")}, "must be finite"),
        ({"logged_at_s": float("inf")}, "must be finite"),
        ({"sampling": Sampling(temperature=float("nan"))}, "must be finite"),
    ],
    ids=str,
)
def test_numbers_that_would_poison_a_training_go_to_the_dead_letters(tmp_path, valkey_client, change, reason):
    """One entry with such a number is buried with its reason; its neighbours are stored."""
    blocks = [_block(1), dataclasses.replace(_block(2), **change), _block(3)]
    for block in blocks:
        valkey_client.xadd(keys.BLOCKS, {keys.PAYLOAD_FIELD: to_wire(block)})
    store = ReplayStore(tmp_path, max_blocks=100)
    reader = StreamReader(valkey_client, keys.BLOCKS, keys.TRAINER_GROUP, "a")
    report = drain(store, reader, lambda block: defect_of(block, target_fingerprint=TARGET, vocab_size=16))
    assert (report.stored, report.buried, report.error) == (2, 1, None)
    assert [ref.request_id for ref in store.refs] == ["r1", "r3"]
    ((_, buried),) = valkey_client.xrange(keys.BLOCKS_DEAD)
    assert reason.encode() in b" ".join(buried.values())
