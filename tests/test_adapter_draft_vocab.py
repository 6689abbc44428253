"""Draft vocabularies without a model: files, registry, counts and the rule that chooses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine
from tiny_pair import END, SPECIAL, pair_settings

from adapter.contracts import ArtifactError, ConflictError, RegistryError, SettingsError
from adapter.draft_vocab import TOKENS, VocabManifest, load_vocab, store_vocab
from adapter.models import prepare_pair
from adapter.registry import Registry
from adapter.token_counts import COUNTS, OTHER, CountSnapshot, TokenCounts, read_counts, write_counts
from adapter.vocab_registry import Vocabularies
from adapter.vocab_selection import build_vocab, choose, coverage, default_ranking, special_tokens, target_vocab_size

TARGET = "a" * 64
WIDTH = 100


def store(root: Path, ids: list[int], **claims: object) -> VocabManifest:
    given_claims = {"vocab_size": WIDTH, "target_fingerprint": TARGET, "coverage": 0.9, "counted": {}} | claims
    return store_vocab(root, np.array(ids), created_at_s=5.0, **given_claims)  # type: ignore[arg-type]


def load(root: Path, sha256: str, **claims: object) -> list[int]:
    wanted = {"target_fingerprint": TARGET, "vocab_size": WIDTH} | claims
    return load_vocab(root, sha256, **wanted).tolist()  # type: ignore[arg-type]


def counted(**segments: dict[int, int]) -> CountSnapshot:
    arrays = {name: np.zeros(WIDTH, np.uint32) for name in segments}
    for name, counts in segments.items():
        for token, count in counts.items():
            arrays[name][token] = count
    return CountSnapshot(WIDTH, TARGET, arrays)


def pick(snapshot: CountSnapshot, size: int, always: tuple[int, ...] = (0, 1, 2)) -> set[int]:
    ids = choose(snapshot, size, np.array(always, np.uint32), np.arange(WIDTH, dtype=np.uint32))
    assert len(ids) == size
    assert np.all(np.diff(ids.astype(int)) > 0)
    return set(ids.tolist())


@pytest.fixture
def registry(database: Engine) -> Vocabularies:
    return Vocabularies(database, clock=lambda: 1000.0)


# -- files -----------------------------------------------------------------------------------


def test_a_vocabulary_is_named_by_its_tokens(tmp_path):
    """The same tokens in any order are one file; it reads back ascending."""
    first, again = store(tmp_path, [7, 3, 99]), store(tmp_path, [99, 7, 3])
    assert first == again
    assert load(tmp_path, first.sha256) == [3, 7, 99]
    assert (tmp_path / first.sha256 / TOKENS).read_bytes() == np.array([3, 7, 99], "<u4").tobytes()


@pytest.mark.parametrize(
    ("ids", "words"), [([], "no tokens"), ([3, 3], "twice"), ([3, WIDTH], f"token {WIDTH}; the target has {WIDTH}")]
)
def test_impossible_tokens_are_not_stored(tmp_path, ids, words):
    """None at all, one twice, and one the target does not have are refused by name."""
    with pytest.raises(ArtifactError, match=words):
        store(tmp_path, ids)


def _damage(folder: Path, how: str) -> None:
    path = folder / TOKENS
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-4])
    elif how == "altered":
        path.write_bytes(data[:-4] + np.array([50], "<u4").tobytes())
    elif how == "cannot be read":
        path.unlink()
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize("how", ["truncated", "altered", "cannot be read", "no manifest", "manifest of vocabulary"])
def test_a_damaged_vocabulary_is_refused(tmp_path, how):
    """Each kind of damage is an ArtifactError that names it; storing the tokens again repairs the file."""
    manifest = store(tmp_path, [1, 2, 3])
    _damage(tmp_path / manifest.sha256, how)
    with pytest.raises(ArtifactError, match=how):
        load(tmp_path, manifest.sha256)
    if how in ("truncated", "altered", "cannot be read", "no manifest"):
        store(tmp_path, [1, 2, 3])
        assert load(tmp_path, manifest.sha256) == [1, 2, 3]


def test_a_vocabulary_of_another_target_is_refused(tmp_path):
    """Another fingerprint or another width is refused."""
    manifest = store(tmp_path, [1, 2, 3])
    for other in ({"target_fingerprint": "b" * 64}, {"vocab_size": WIDTH + 1}):
        with pytest.raises(ArtifactError, match="was made for target"):
            load(tmp_path, manifest.sha256, **other)


def test_a_name_that_is_a_path_is_refused(tmp_path):
    """What is not a sha256 never becomes a path."""
    with pytest.raises(ArtifactError, match="not a sha256"):
        load(tmp_path, "../secret")


# -- registry --------------------------------------------------------------------------------


def _published(registry: Vocabularies, root: Path, count: int) -> list[int]:
    return [
        registry.publish(store(root, [0, 1, 10 + i]), actor="ana", reason=f"number {i}").number for i in range(count)
    ]


def test_the_full_vocabulary_is_live_before_anything_was_published(registry, database):
    """An empty registry serves number 0 in generation 1, and nothing lies below it."""
    live = registry.live()
    assert (live.generation, live.live, live.previous, live.sha256) == (1, 0, None, None)
    with pytest.raises(RegistryError, match="no earlier one"):
        registry.roll_back(actor="ana", reason="r")
    assert Registry(database).audit() == []


def test_promote_then_roll_back_restores_what_was_live(registry, database, tmp_path):
    """Roll back goes to previous; every change has one audit row with who, why, from and to."""
    announced: list[int] = []
    registry = Vocabularies(database, clock=lambda: 1000.0, announce=announced.append)
    first, second = _published(registry, tmp_path, 2)
    registry.promote(first, actor="ana", reason="a")
    registry.promote(second, actor="engine", reason="b", automatic=True)
    live = registry.roll_back(actor="ana", reason="coverage fell")
    assert (live.generation, live.live, live.previous) == (4, first, second)
    assert announced == [2, 3, 4]
    rows = [
        (row.verb, row.actor, row.from_version, row.to_version, row.generation) for row in Registry(database).audit()
    ]
    assert rows == [
        ("vocab_roll_back", "ana", 2, 1, 4), ("vocab_promote", "engine", 1, 2, 3), ("vocab_promote", "ana", 0, 1, 2),
        ("vocab_publish", "ana", None, 2, 1), ("vocab_publish", "ana", None, 1, 1),
    ]  # fmt: skip


def test_rolling_back_the_first_leads_to_the_full_vocabulary(registry, tmp_path):
    """From the first vocabulary one goes back to number 0, and forward again from there."""
    [first] = _published(registry, tmp_path, 1)
    registry.promote(first, actor="ana", reason="r")
    assert registry.roll_back(actor="ana", reason="r").live == 0
    assert registry.live().sha256 is None
    assert registry.roll_back(actor="ana", reason="r").live == first


def test_a_move_on_an_old_view_is_a_conflict_that_names_who(registry, tmp_path):
    """With an expected generation the second mover is refused and told who was first."""
    first, second = _published(registry, tmp_path, 2)
    registry.promote(first, actor="ana", reason="r", expected_generation=1)
    with pytest.raises(ConflictError, match="ana did 'vocab_promote' to 1"):
        registry.promote(second, actor="bob", reason="r", expected_generation=1)
    with pytest.raises(ConflictError):
        registry.roll_back(actor="bob", reason="r", expected_generation=1)


@pytest.mark.parametrize(("number", "words"), [(9, "no vocabulary 9; known numbers: 0, 1"), (0, "0 is live already")])
def test_what_cannot_be_promoted_is_said(registry, tmp_path, number, words):
    """Unknown and live already are refused by name."""
    _published(registry, tmp_path, 1)
    with pytest.raises(RegistryError, match=words):
        registry.promote(number, actor="ana", reason="r")


def test_publishing_what_is_live_is_refused(registry, tmp_path):
    """The same tokens as the live vocabulary make no new number."""
    [first] = _published(registry, tmp_path, 1)
    registry.promote(first, actor="ana", reason="r")
    with pytest.raises(RegistryError, match="exactly these tokens"):
        registry.publish(store(tmp_path, [0, 1, 10]), actor="ana", reason="again")


def test_quarantine_leaves_the_live_one_once(registry, database, tmp_path):
    """A quarantined live vocabulary is left for previous, never promoted again, and noted once."""
    first, second = _published(registry, tmp_path, 2)
    registry.promote(first, actor="ana", reason="r")
    registry.promote(second, actor="ana", reason="r")
    assert registry.quarantine(second, actor="engine", reason="altered", automatic=True).live == first
    registry.quarantine(second, actor="engine", reason="altered", automatic=True)
    assert [row.verb for row in Registry(database).audit(3)] == ["vocab_roll_back", "vocab_quarantine", "vocab_promote"]
    with pytest.raises(RegistryError, match="is quarantined"):
        registry.promote(second, actor="ana", reason="r")
    assert registry.roll_back(actor="ana", reason="r").live == 0  # previous is forbidden, so the full one
    with pytest.raises(RegistryError, match="cannot be quarantined"):
        registry.quarantine(0, actor="ana", reason="r")


def test_moves_of_versions_and_vocabularies_do_not_mix(database, tmp_path):
    """A conflict between draft versions never names the mover of a vocabulary of the same generation."""
    drafts = Registry(database)
    drafts.install_base(target_fingerprint=TARGET, base_fingerprint="b" * 64, actor="engine")
    [first] = _published(Vocabularies(database), tmp_path, 1)
    Vocabularies(database).promote(first, actor="zoe", reason="r")
    assert drafts.live().generation == 1
    for version in (1, 2):
        drafts.publish(
            parent=0, state="ready", artifact_sha256="c" * 64, artifact_bytes=1, trained_on={}, gate={}, reason="r",
            job_id=None, actor="trainer",
        )  # fmt: skip
        if version == 1:
            drafts.promote(1, actor="ana", reason="r")
    with pytest.raises(ConflictError, match="ana did 'promote' to version 1"):
        drafts.promote(2, actor="bob", reason="r", expected_generation=1)


# -- counting --------------------------------------------------------------------------------


def test_counting_only_queues_until_it_is_folded():
    """Noting tokens touches no array; folding returns them and counts each, per segment."""
    counts = TokenCounts(WIDTH, TARGET)
    counts.add("chat", [5, 5, 7])
    counts.add("code", [9])
    assert counts.snapshot().segments == {}
    assert sorted(counts.fold().tolist()) == [5, 5, 7, 9]
    segments = counts.snapshot().segments
    assert (segments["chat"][5], segments["chat"][7], segments["code"][9]) == (2, 1, 1)
    assert counts.snapshot().total.sum() == 4


def test_counts_decay_and_stay_bounded():
    """Ten times the limit of tokens leaves less than the limit, and a segment without traffic is forgotten (I5)."""
    counts = TokenCounts(WIDTH, TARGET, halve_at=1000)
    counts.add("gone", [1])
    for _ in range(100):
        counts.add("chat", [3] * 90 + [4] * 10)
        counts.fold()
    segments = counts.snapshot().segments
    assert set(segments) == {"chat"}
    assert 0 < segments["chat"].sum() < 1000
    assert segments["chat"][3] > 5 * segments["chat"][4] > 0


def test_many_segments_share_one_array():
    """A thousand segment names take no more than the given number of arrays (I5)."""
    counts = TokenCounts(WIDTH, TARGET, max_segments=4)
    for i in range(1000):
        counts.add(f"tenant-{i}", [i % WIDTH])
    counts.fold()
    segments = counts.snapshot().segments
    assert len(segments) == 4
    assert segments[OTHER].sum() == 997


def test_counts_survive_a_restart(tmp_path):
    """What is written reads back equal; before the first write there is nothing."""
    assert read_counts(tmp_path) is None
    snapshot = counted(chat={5: 3, 99: 1}, empty={}, code={7: 2**31})
    write_counts(tmp_path, snapshot)
    again = read_counts(tmp_path)
    assert again is not None
    assert (again.vocab_size, again.target_fingerprint) == (WIDTH, TARGET)
    assert {k: v.tolist() for k, v in again.segments.items()} == {k: v.tolist() for k, v in snapshot.segments.items()}
    counts = TokenCounts(WIDTH, TARGET)
    counts.restore(again)
    assert counts.snapshot().total.tolist() == snapshot.total.tolist()
    other = TokenCounts(WIDTH, "b" * 64)
    other.restore(again)
    assert other.snapshot().segments == {}


@pytest.mark.parametrize("junk", [b"", b"PK\x03\x04 not a zip", b"x" * 1000, None])
def test_unreadable_counts_are_an_error_with_a_way_out(tmp_path, junk):
    """A broken file of counts is named, with what to do; nothing in it is unpickled."""
    write_counts(tmp_path, counted(chat={5: 3}))
    path = tmp_path / COUNTS
    path.write_bytes(path.read_bytes()[:200] if junk is None else junk)
    with pytest.raises(ArtifactError, match="delete the file"):
        read_counts(tmp_path)


# -- choosing --------------------------------------------------------------------------------


def test_special_tokens_are_always_in():
    """With all places wanted by traffic, special tokens nobody ever counted are in."""
    busy = counted(chat=dict.fromkeys(range(10, 90), 1000))
    assert {0, 1, 2} <= pick(busy, 4)
    assert {97, 98, 99} <= pick(busy, 40, always=(97, 98, 99))


def test_the_most_committed_tokens_come_first():
    """With one segment the vocabulary is the special tokens and the most frequent ones."""
    snapshot = counted(chat={50: 9, 60: 8, 70: 7, 80: 6})
    assert pick(snapshot, 6) == {0, 1, 2, 50, 60, 70}


def test_a_small_segment_keeps_its_rare_tokens():
    """A segment with a thousandth of the traffic gets its share of the last quarter; once-seen words do not."""
    big = {token: 1000 + token for token in range(10, 90)}
    small = {90: 5, 91: 4, 92: 3, 93: 1}
    assert not {90, 91, 92} & pick(counted(big=big | small), 43)
    chosen = pick(counted(big=big, small=small), 43)
    assert {90, 91, 92} <= chosen
    assert 93 not in chosen
    assert len(chosen & set(big)) == 37


def test_every_segment_gets_the_same_share():
    """Five small segments beside a big one each keep their own tokens, one place in four dealt evenly."""
    big = dict.fromkeys(range(3, 60), 1000)
    small = {f"s{i}": {60 + 5 * i + j: 9 - j for j in range(5)} for i in range(5)}
    chosen = pick(counted(big=big, **small), 3 + 48)  # 12 places to deal to 6 segments: 2 each
    for i in range(5):
        assert {60 + 5 * i, 61 + 5 * i} <= chosen


def test_what_was_not_counted_is_filled_by_the_ranking():
    """With little traffic the rest comes from the ranking, in its order."""
    ranking = np.arange(WIDTH, dtype=np.uint32)[::-1].copy()
    ids = choose(counted(chat={50: 3}), 7, np.array([0, 1, 2], np.uint32), ranking)
    assert set(ids.tolist()) == {0, 1, 2, 50, 99, 98, 97}


def test_a_size_without_room_is_refused():
    """A vocabulary that holds no more than the special tokens says how many there are."""
    with pytest.raises(SettingsError, match="3 special and end tokens are always in"):
        pick(counted(chat={5: 1}), 3)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "d"]),
        st.dictionaries(st.integers(0, WIDTH - 1), st.integers(0, 1000), max_size=60),
    ),
    st.integers(4, WIDTH),
)
def test_any_counts_give_the_wanted_size(segments, size):
    """Whatever was counted: exactly `size` distinct known tokens, specials among them, and a larger one covers more."""
    snapshot = counted(**segments)
    chosen = pick(snapshot, size)
    assert {0, 1, 2} <= chosen
    assert max(chosen) < WIDTH
    covered = coverage(snapshot, np.array(sorted(chosen), np.uint32))
    assert (covered is None) == (snapshot.total.sum() == 0)
    if size == WIDTH and covered is not None:
        assert covered == 1.0


# -- a pair ----------------------------------------------------------------------------------


def test_a_pair_knows_its_special_tokens(folder, tmp_path):
    """Special tokens of the tokenizer and end tokens of the configuration, several of them too."""
    target = folder / "tiny-target"
    pair = prepare_pair(pair_settings(folder, tmp_path))
    width = target_vocab_size(pair)
    assert special_tokens(target, width).tolist() == list(range(len(SPECIAL)))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text((target / "config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert special_tokens(copy, width).tolist() == [END, 7, 9]
    assert default_ranking(pair, width).tolist() == list(range(width))


def test_building_says_what_is_missing(folder, tmp_path):
    """No counts and no shipped ranking, not smaller than the full one, another target's counts: refused by name."""
    pair = prepare_pair(pair_settings(folder, tmp_path))
    width = target_vocab_size(pair)
    mine = CountSnapshot(width, pair.target_fingerprint, {"chat": np.ones(width, np.uint32)})
    for snapshot, size, words in (
        (None, 20, "nothing was counted yet"), (mine, width, "not smaller than the full one"), (mine, 2, "too small"),
        (CountSnapshot(width, TARGET, mine.segments), 20, "with another target"),
    ):  # fmt: skip
        with pytest.raises(SettingsError, match=words):
            build_vocab(tmp_path, pair, snapshot, size)
    manifest = build_vocab(tmp_path, pair, mine, 20, now_s=5.0)
    assert (manifest.size, manifest.coverage) == (20, pytest.approx(20 / width))
    assert manifest.counted["segments"] == {"chat": width}
