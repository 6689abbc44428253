"""The replay store and its intake: nothing lost, nothing twice, nothing half-written, never stopped."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from adapter import keys
from adapter.contracts import SCHEMA_VERSION, Sampling, VerifiedBlock
from adapter.sections import DistillSettings
from adapter.streams import StreamReader, connect
from adapter.wire import to_wire
from distill.intake import defect_of, drain
from distill.replay import ReplayStore
from distill.selection import draw_by_segment, part_of, select

TARGET = "t" * 64


def _block(
    request: int, *, segment: str = "chat", target: str = TARGET, records: int = 2, tenant: str = "",
    at_s: float | None = None,
) -> VerifiedBlock:  # fmt: skip
    import numpy as np

    tokens = np.arange(2 + records)
    tokens[:2] = request % 16, request // 16 % 16
    return VerifiedBlock(
        schema=SCHEMA_VERSION, request_id=f"r{request}", segment=segment, target_fingerprint=target,
        coupling="gumbel", sampling=Sampling(), prompt_tokens=2, first_position=0, versions=(), top_k=2,
        token_ids=tokens.astype("<u4").tobytes(),
        positions=np.arange(2, 2 + records).astype("<u4").tobytes(), verdicts=b"\1" * records,
        draft_ids=b"\0" * 4 * records, draft_logprobs=b"\0" * 4 * records,
        topk_ids=np.tile([1, 2], records).astype("<u4").tobytes(),
        topk_logprobs=np.full(2 * records, -1.0).astype("<f2").tobytes(),
        tail_mass=b"\0" * 4 * records, logged_at_s=float(request) if at_s is None else at_s, tenant=tenant,
    )  # fmt: skip


def _store(tmp_path, blocks=(), max_blocks=100) -> ReplayStore:
    store = ReplayStore(tmp_path / "replay", max_blocks=max_blocks)
    if blocks:
        store.append([(block, to_wire(block)) for block in blocks])
    return store


def _requests(store: ReplayStore) -> list[str]:
    return [ref.request_id for ref in store.refs]


def _check(block: VerifiedBlock) -> str | None:
    return defect_of(block, target_fingerprint=TARGET, vocab_size=16)


def test_blocks_come_back_as_they_went_in_after_a_restart(tmp_path):
    """A reopened store lists every block in order and loads it unchanged."""
    blocks = [_block(i) for i in range(20)]
    _store(tmp_path, blocks)
    again = _store(tmp_path)
    assert [again.load(ref) for ref in again.refs] == blocks
    assert [ref.sequence for ref in again.refs] == list(range(1, 21))


def test_a_block_is_stored_once(tmp_path):
    """What arrives twice, in one batch or in two, is kept once."""
    store = _store(tmp_path, [_block(1), _block(1), _block(2)])
    assert store.append([(_block(2), to_wire(_block(2))), (_block(3), to_wire(_block(3)))]) == 1
    assert _requests(store) == ["r1", "r2", "r3"]


def test_the_newest_blocks_stay_within_the_bound_on_disk_too(tmp_path):
    """Of many blocks only `max_blocks` remain, and files beyond it are gone."""
    store = _store(tmp_path, max_blocks=16)
    for i in range(100):
        store.append([(_block(i), to_wire(_block(i)))])
    assert _requests(_store(tmp_path, max_blocks=16)) == [f"r{i}" for i in range(84, 100)]
    assert len(list((tmp_path / "replay").glob("blocks-*.bin"))) <= 9


@pytest.mark.parametrize("cut", [1, 5, 8, 60])
def test_a_torn_tail_is_ignored_and_counted_and_never_written_to(tmp_path, cut):
    """After a kill in the middle of a write the whole frames survive and later appends do too."""
    store = _store(tmp_path, [_block(i) for i in range(3)])
    path = store.refs[-1].file
    path.write_bytes(path.read_bytes()[:-cut])
    again = _store(tmp_path, [_block(9)])
    assert (_requests(again), again.torn) == (["r0", "r1", "r9"], 1)
    reopened = _store(tmp_path)
    assert (_requests(reopened), reopened.torn) == (["r0", "r1", "r9"], 1)
    assert len({ref.sequence for ref in reopened.refs}) == 3


def test_a_file_torn_in_its_first_frame_is_left_alone(tmp_path):
    """Even a file without one whole frame does not swallow later blocks."""
    store = _store(tmp_path, [_block(0)])
    store.refs[0].file.write_bytes(b"\1\2\3")
    _store(tmp_path, [_block(5)])
    assert _requests(_store(tmp_path)) == ["r5"]


def test_a_flipped_byte_costs_one_block(tmp_path):
    """A frame whose checksum fails is skipped; the frames behind it are still read."""
    store = _store(tmp_path, [_block(i) for i in range(3)])
    data = bytearray(store.refs[1].file.read_bytes())
    data[store.refs[1].offset + 10] ^= 0xFF
    store.refs[1].file.write_bytes(data)
    again = _store(tmp_path)
    assert (_requests(again), again.torn) == (["r0", "r2"], 1)


def test_a_whole_request_is_on_one_side_of_the_split():
    """The split depends on the request id and the seed alone; n = 4,000 ids, shares within 0.03."""
    parts = [part_of(f"q{i}", holdout_share=0.2, seed=3) for i in range(4000)]
    assert parts == [part_of(f"q{i}", holdout_share=0.2, seed=3) for i in range(4000)]
    assert parts.count("gate") / 4000 == pytest.approx(0.2, abs=0.03)
    assert parts.count("validation") / 4000 == pytest.approx(0.1, abs=0.03)
    assert parts != [part_of(f"q{i}", holdout_share=0.2, seed=4) for i in range(4000)]


def test_selection_keeps_training_and_judging_requests_apart(tmp_path):
    """No request of a training block is in validation or gate, fresh is what came after the marker."""
    store = _store(tmp_path, [_block(i) for i in range(40)])
    store.mark(store.refs[-1].sequence)
    store.append([(_block(i), to_wire(_block(i))) for i in range(40, 90)])
    chosen = select(ReplayStore(tmp_path / "replay", max_blocks=100), DistillSettings(min_requests=20))
    name = {ref.sequence: ref.request_id for ref in store.refs}
    learned = {name[s] for s in (*chosen.fresh, *chosen.replay)}
    judged = {name[s] for s in (*chosen.validation, *chosen.gate)}
    assert not learned & judged
    assert min(chosen.fresh) > 40 >= max(chosen.replay)
    assert chosen.newest == 90


def test_too_little_fresh_traffic_is_topped_up_with_the_newest_old_one(tmp_path):
    """A training asked for right after another still has something to learn from."""
    store = _store(tmp_path, [_block(i) for i in range(50)])
    store.mark(store.refs[-1].sequence)
    chosen = select(store, DistillSettings(min_requests=30))
    assert chosen.fresh
    assert min(chosen.fresh) > 20


def test_drawing_by_segment_does_not_lose_rare_traffic():
    """Of 100 common and 3 rare blocks, a draw of 8 holds all rare ones; it is seeded."""
    blocks = [_block(i) for i in range(100)] + [_block(200 + i, segment="rare") for i in range(3)]
    drawn = draw_by_segment(blocks, 8, seed=1)
    assert sum(block.segment == "rare" for block in drawn) == 3
    assert drawn == draw_by_segment(blocks, 8, seed=1)


def test_what_says_the_same_again_is_stored_once(tmp_path):
    """Another request with the same tokens teaches nothing new; in another segment or temperature it does."""
    first = _block(1)
    same = dataclasses.replace(first, request_id="again")
    elsewhere = dataclasses.replace(first, request_id="elsewhere", segment="code")
    hotter = dataclasses.replace(first, request_id="hotter", sampling=Sampling(temperature=0.5))
    store = _store(tmp_path, [first, same, elsewhere, hotter])
    assert _requests(store) == ["r1", "elsewhere", "hotter"]


def test_a_full_store_takes_from_the_segment_that_holds_most(tmp_path):
    """Bounded by bytes, a flood in one segment pushes out its own oldest blocks and nothing of a rare segment."""
    size = len(to_wire(_block(1)))
    store = ReplayStore(tmp_path / "replay", max_blocks=10**6, max_bytes=20 * size + size // 2)
    blocks = [_block(i, segment="rare") for i in range(5)] + [_block(10 + i) for i in range(90)]
    for block in blocks:
        store.append([(block, to_wire(block))])
    again = ReplayStore(tmp_path / "replay", max_blocks=10**6, max_bytes=20 * size + size // 2)
    for one in (store, again):
        assert [ref.request_id for ref in one.refs if ref.segment == "rare"] == [f"r{i}" for i in range(5)]
        held = [ref.request_id for ref in one.refs if ref.segment == "chat"]
        assert held == [f"r{i}" for i in range(100 - len(held), 100)]
        assert sum(ref.size for ref in one.refs) <= 20 * size + size // 2
    assert [again.load(ref).request_id for ref in again.refs] == _requests(again)


def test_old_blocks_go_and_sequence_numbers_never_come_back(tmp_path):
    """Past their age blocks are dropped, files are cut to what lives, and a new block has a new number."""
    now = [100.0]

    def opened() -> ReplayStore:
        return ReplayStore(tmp_path / "replay", max_blocks=1000, max_age_s=50.0, clock=lambda: now[0])

    store = opened()
    blocks = [_block(i, at_s=60.0 + i) for i in range(40)]
    store.append([(block, to_wire(block)) for block in blocks])
    before = sum(path.stat().st_size for path in (tmp_path / "replay").glob("*.bin"))
    now[0] = 145.0  # those logged before 95 are too old: 35 of 40
    store.append([(_block(99, at_s=140.0), to_wire(_block(99, at_s=140.0)))])
    assert [ref.sequence for ref in store.refs] == [36, 37, 38, 39, 40, 41]
    assert sum(path.stat().st_size for path in (tmp_path / "replay").glob("*.bin")) < before / 2
    again = opened()
    assert [(ref.sequence, again.load(ref).request_id) for ref in again.refs] == [
        (ref.sequence, store.load(ref).request_id) for ref in store.refs
    ]
    now[0] = 1000.0
    store = opened()
    store.append([(_block(100, at_s=990.0), to_wire(_block(100, at_s=990.0)))])
    assert [ref.sequence for ref in opened().refs] == [42]


def test_the_anchor_set_is_fixed_and_nobody_learns_from_it(tmp_path):
    """Once chosen, anchors stay through floods and later choices, and are in no other part."""
    settings = DistillSettings(min_requests=20, anchor_requests=3)
    store = _store(tmp_path, [_block(i) for i in range(100)], max_blocks=120)
    first = select(store, settings)
    name = {ref.sequence: ref.request_id for ref in store.refs}
    anchors = {name[sequence] for sequence in first.anchor}
    assert len(anchors) == 3
    flood = [_block(i) for i in range(100, 240)]
    store.append([(block, to_wire(block)) for block in flood])
    store.mark(store.refs[-1].sequence)
    again = ReplayStore(tmp_path / "replay", max_blocks=120)
    second = select(again, settings)
    name = {ref.sequence: ref.request_id for ref in again.refs}
    assert {name[sequence] for sequence in second.anchor} == anchors
    for part in (second.fresh, second.replay, second.validation, second.gate):
        assert not anchors & {name[sequence] for sequence in part}
    assert min(again.refs, key=lambda ref: ref.sequence).request_id in anchors  # older than all else that is left


def test_what_was_trained_on_never_becomes_an_anchor(tmp_path):
    """With the anchor set empty and everything marked as used, nothing joins it."""
    store = _store(tmp_path, [_block(i) for i in range(100)])
    store.mark(store.refs[-1].sequence)
    assert select(store, DistillSettings(min_requests=20)).anchor == ()


def test_one_tenant_cannot_supply_most_of_a_training(tmp_path):
    """A tenant with nine tenths of the traffic is cut to the other's share, but not below what a training needs.

    Alone it is not cut at all.
    """
    loud = [_block(i, tenant="loud") for i in range(90)]
    quiet = [_block(100 + i, tenant="quiet") for i in range(10)]
    settings = DistillSettings(min_requests=1, anchor_requests=0, tenant_share=0.5)
    store = _store(tmp_path, [*loud, *quiet], max_blocks=1000)
    chosen = select(store, settings)
    tenant = {ref.sequence: ref.tenant for ref in store.refs}
    supplied = [tenant[sequence] for sequence in chosen.fresh]
    assert supplied.count("loud") == supplied.count("quiet") > 0
    assert chosen.capped > 50
    needed = select(store, settings.model_copy(update={"min_requests": 20}))
    assert [tenant[sequence] for sequence in needed.fresh].count("loud") == 20
    alone = select(_store(tmp_path / "alone", loud, max_blocks=1000), settings)
    assert len(alone.fresh) > 50
    assert alone.capped == 0


def test_younger_blocks_are_drawn_earlier():
    """A block one half-life old is the first of two as often as one draw in three says.

    n = 3,000 seeds; the bound is five standard errors of a share of one third.
    """
    blocks = [_block(1), _block(2)]
    weights = {"r1": 0.5, "r2": 1.0}
    first = [
        draw_by_segment(blocks, 1, seed=seed, weight=lambda block: weights[block.request_id])[0].request_id
        for seed in range(3000)
    ]
    assert abs(first.count("r1") / 3000 - 1 / 3) < 5 * (2 / 9 / 3000) ** 0.5


def test_bad_entries_go_to_the_dead_letter_stream_and_good_ones_through(tmp_path, valkey_client):
    """Garbage, an unknown schema, another target, NaN and foreign ids are buried with a reason each."""
    good = [_block(i) for i in range(5)]
    nan = dataclasses.replace(_block(7), topk_logprobs=b"\x00\x7e" * 4)
    bad = [
        b"\xff garbage",
        b"",
        to_wire(dataclasses.replace(_block(6), schema=99)),
        to_wire(_block(8, target="x" * 64)),
        to_wire(nan),
        to_wire(dataclasses.replace(_block(9), topk_ids=b"\xff" * 16)),
        to_wire(dataclasses.replace(_block(10), topk_logprobs=b"")),
        to_wire(dataclasses.replace(_block(11), keep_probability=0.0)),
        to_wire(dataclasses.replace(_block(12), positions=_block(12).positions[:4] * 2)),
    ]
    for payload in [to_wire(good[0]), *bad, *map(to_wire, good[1:])]:
        valkey_client.xadd(keys.BLOCKS, {keys.PAYLOAD_FIELD: payload})
    store = _store(tmp_path)
    report = drain(store, StreamReader(valkey_client, keys.BLOCKS, keys.TRAINER_GROUP, "a"), _check, batch=4)
    assert (report.stored, report.buried, report.error) == (5, len(bad), None)
    reasons = [fields[b"reason"] for _, fields in valkey_client.xrange(keys.BLOCKS_DEAD)]
    assert len(reasons) == len(bad)
    assert all(reasons)
    assert valkey_client.xpending(keys.BLOCKS, keys.TRAINER_GROUP)["pending"] == 0


def test_entries_read_by_a_killed_trainer_are_taken_over(tmp_path, valkey_client):
    """What another consumer read and never acknowledged is stored; what it stored before is not repeated."""
    blocks = [_block(i) for i in range(6)]
    for block in blocks:
        valkey_client.xadd(keys.BLOCKS, {keys.PAYLOAD_FIELD: to_wire(block)})
    StreamReader(valkey_client, keys.BLOCKS, keys.TRAINER_GROUP, "dead").read(4)
    store = _store(tmp_path, blocks[:2])
    report = drain(store, StreamReader(valkey_client, keys.BLOCKS, keys.TRAINER_GROUP, "alive"), _check)
    assert (report.stored, report.repeated) == (4, 2)
    assert sorted(_requests(_store(tmp_path))) == [f"r{i}" for i in range(6)]


def test_a_drain_without_redis_says_so_and_keeps_what_is_on_disk(tmp_path):
    """An unreachable server is a reason in the report, not an exception."""
    store = _store(tmp_path, [_block(1)])
    client = connect(f"unix://{tmp_path / 'nobody.sock'}", 0.2)
    report = drain(store, StreamReader(client, keys.BLOCKS, keys.TRAINER_GROUP, "a"), _check)
    assert report.error
    assert _requests(store) == ["r1"]


def test_the_torch_free_side_never_imports_torch():
    """Worker, replay store, intake and selection leave torch, transformers and peft alone."""
    code = (
        "import sys, distill.app, distill.tasks, distill.__main__, distill.replay, distill.intake, distill.selection;"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
