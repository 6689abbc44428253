"""Which kept version is gone back to: one that certainly knows the newest requests, and was not just taken back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from distill_tiny import make_blocks, make_pair

from adapter.contracts import ArtifactError
from adapter.versions import AuditEntry, Draft
from distill.energy import Energy
from distill.kept import MOST_KEPT, best_fit, kept_versions, newest_blocks


def draft(version: int, state: str = "ready") -> Draft:
    return Draft(
        version=version, parent=0, state=state, artifact_sha256=None if version == 0 else f"{version:064d}",
        artifact_bytes=1, target_fingerprint="t", base_fingerprint="b", trained_on={}, gate={}, reason="", job_id=None,
        created_at_s=0.0, created_by="test",
    )  # fmt: skip


def moved(from_version: int, *, verb: str = "roll_back", automatic: bool = True, at_s: float = 0.0) -> AuditEntry:
    return AuditEntry(
        id=1, at_s=at_s, actor="watcher", automatic=automatic, verb=verb, from_version=from_version, to_version=0,
        generation=2, reason="", evidence={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    pair = make_pair(tmp_path_factory.mktemp("pair"))
    made = make_blocks(pair, 40, seed=5, answer=12)
    return [dataclasses.replace(block, logged_at_s=float(i)) for i, block in enumerate(made)]


class Known:
    """Scores that are what a test says: a mean acceptance by artifact, with noise of its own for each request."""

    def __init__(self, means: dict[str | None, float], noise: float = 0.02) -> None:
        self._means, self._noise = means, noise

    def scores(self, sha256, blocks):
        if sha256 not in self._means:
            raise ArtifactError("its file is gone")
        random = np.random.default_rng(sum(map(ord, sha256 or "")))
        means = self._means[sha256] + self._noise * random.standard_normal(len(blocks))
        return [np.full(block.num_records, mean) for block, mean in zip(blocks, means, strict=True)]


def fit(known: Known, versions, blocks, min_gain: float = 0.02):
    return best_fit(known, versions, None, blocks, min_gain=min_gain, confidence=0.95, seed=0)


def test_the_version_that_wins_most_is_found(blocks):
    """Of three kept ones the best is taken, with its figures in a sentence; one whose file is gone is left out."""
    one, two, three = draft(1), draft(2), draft(3)
    known = Known({None: 0.30, one.artifact_sha256: 0.36, two.artifact_sha256: 0.45})
    found = fit(known, [three, two, one], blocks)
    assert found is not None
    assert found.draft.version == 2
    assert found.interval[0] > 0.1
    assert "v2 knows this traffic: acceptance 0." in found.sentence


def test_a_gain_that_is_small_or_uncertain_is_none(blocks):
    """Just better than live, or better by luck, forgoes no training; nor do no versions or no blocks."""
    one = draft(1)
    assert fit(Known({None: 0.30, one.artifact_sha256: 0.315}), [one], blocks) is None
    assert fit(Known({None: 0.30, one.artifact_sha256: 0.33}, noise=0.3), [one], blocks) is None
    assert fit(Known({None: 0.30}), [], blocks) is None
    assert fit(Known({None: 0.30, one.artifact_sha256: 0.5}), [one], []) is None


def test_what_is_kept():
    """Ready versions but the live one and the floor, newest first and not too many."""
    drafts = [draft(9, "rejected"), draft(8), draft(7, "quarantined"), *(draft(i) for i in range(6, -1, -1))]
    assert [item.version for item in kept_versions(drafts, live=8)] == [6, 5, 4, 3, 2, 1]
    many = [draft(i) for i in range(30, 0, -1)]
    assert len(kept_versions(many, live=1)) == MOST_KEPT


def test_a_version_just_taken_back_gets_no_second_chance_for_a_day():
    """An automatic roll back rests for a day; a person's, and an older one, does not count."""
    drafts, day = [draft(3), draft(2), draft(1)], 86400.0
    audit = [moved(3, at_s=10.0), moved(2, automatic=False, at_s=10.0), moved(1, verb="promote", at_s=10.0)]
    assert [item.version for item in kept_versions(drafts, 9, audit, now_s=day)] == [2, 1]
    assert [item.version for item in kept_versions(drafts, 9, audit, now_s=day + 11)] == [3, 2, 1]


def test_the_newest_blocks_of_the_segments_that_drift(blocks):
    """Newest first, of the named segments alone where some are named."""
    mixed = [dataclasses.replace(block, segment="ab"[i % 2]) for i, block in enumerate(blocks)]
    assert [block.logged_at_s for block in newest_blocks(mixed)[:3]] == [39.0, 38.0, 37.0]
    assert {block.segment for block in newest_blocks(mixed, ("b",))} == {"b"}
    assert newest_blocks(mixed, ("elsewhere",)) == []


def test_joules_are_what_the_counters_moved(tmp_path):
    """Two packages, one of which wrapped around; where a counter is missing nothing is said."""

    def write(package: int, energy: int, most: int = 1_000_000) -> None:
        folder = tmp_path / f"intel-rapl:{package}"
        folder.mkdir(exist_ok=True)
        (folder / "energy_uj").write_text(f"{energy}\n")
        (folder / "max_energy_range_uj").write_text(f"{most - 1}\n")

    assert Energy(tmp_path).joules() is None
    write(0, 100_000)
    write(1, 900_000)
    energy = Energy(tmp_path)
    write(0, 600_000)
    write(1, 100_000)
    assert energy.joules() == pytest.approx(0.5 + 0.2)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert energy.joules() is None
