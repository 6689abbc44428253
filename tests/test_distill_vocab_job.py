"""A draft vocabulary goes live by itself only where the live draft is certainly right more often with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distill_tiny import VOCAB, make_blocks, make_pair

from adapter.contracts import RegistryError
from adapter.sections import DistillSettings, EngineSettings
from adapter.settings import Settings
from adapter.token_counts import CountSnapshot, write_counts
from adapter.vocab_registry import Vocabularies
from adapter.vocab_selection import build_vocab
from distill.evidence import Evidence
from distill.gate import StoredDrafts
from distill.replay import ReplayStore
from distill.verdict import GateRules
from distill.vocab_job import allowed_tokens, renew_vocabulary

SIZE = 24
RULES = GateRules(
    coupling="gumbel", min_gain=0.0, confidence=0.95, min_requests=10, segment_margin=0.02, max_norm_ratio=1.0, seed=0
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.set_num_threads(1)
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def blocks(pair):
    return make_blocks(pair, 60, seed=11)


@pytest.fixture
def settings(tmp_path, database):
    return Settings(
        data_dir=tmp_path / "data", redis_url=f"unix://{tmp_path / 'nobody.sock'}",
        engine=EngineSettings(draft_vocab_size=SIZE), distill=DistillSettings(),
    )  # fmt: skip


def counts_of(blocks) -> np.ndarray:
    """How often each token was answered."""
    counts = np.zeros(VOCAB, np.uint32)
    for block in blocks:
        np.add.at(counts, block.array("token_ids")[block.prompt_tokens :], 1)
    return counts


def count(settings, pair, counts) -> None:
    write_counts(settings.vocabularies_dir, CountSnapshot(VOCAB, pair.target_fingerprint, {"chat": counts}))


def begin_with(settings, database, pair, counts) -> Vocabularies:
    """Make the vocabulary of these counts live."""
    count(settings, pair, counts)
    snapshot = CountSnapshot(VOCAB, pair.target_fingerprint, {"chat": counts})
    registry = Vocabularies(database)
    row = registry.publish(build_vocab(settings.vocabularies_dir, pair, snapshot, SIZE), actor="test", reason="test")
    registry.promote(row.number, actor="test", reason="test")
    return registry


def evidence(tmp_path, blocks) -> Evidence:
    store = ReplayStore(tmp_path / "replay", max_blocks=100)
    return Evidence(fresh=[], replay=[], validation=[], gate=blocks[:40], anchor=blocks[40:], newest=0, store=store)


def renew(settings, database, pair, given, fence=lambda connection: None):
    live = Vocabularies(database).live()
    in_force = StoredDrafts(pair, settings.artifacts_dir, RULES, allowed_tokens(settings, pair, live.sha256))
    return renew_vocabulary(settings, database, given, None, live, in_force, fence)


def test_a_vocabulary_of_what_is_said_replaces_one_of_what_is_not(settings, database, pair, blocks, tmp_path):
    """Chosen from real answers it is promoted with the gate's evidence; asked again there is nothing to judge."""
    common = counts_of(blocks)
    registry = begin_with(settings, database, pair, common.max() - common)
    count(settings, pair, common)
    given = evidence(tmp_path, blocks)
    gate = renew(settings, database, pair, given)
    live = registry.live()
    assert gate["passed"]
    assert gate["difference"] > 0.05
    assert gate["anchor"]["difference"] > 0
    assert live.live == gate["number"] == 2
    chosen = allowed_tokens(settings, pair, live.sha256)
    assert common[chosen.numpy()].sum() > 0.5 * common.sum()
    assert renew(settings, database, pair, given) is None


def test_counts_of_something_else_do_not_take_a_good_vocabulary_away(settings, database, pair, blocks, tmp_path):
    """Counts that name what nobody says, from a flood for example, are refused by what was really answered."""
    common = counts_of(blocks)
    registry = begin_with(settings, database, pair, common)
    count(settings, pair, common.max() - common)
    gate = renew(settings, database, pair, evidence(tmp_path, blocks))
    assert not gate["passed"]
    assert registry.live().live == 1
    assert len(registry.rows()) == 1


def test_a_trainer_that_lost_its_job_moves_no_vocabulary(settings, database, pair, blocks, tmp_path):
    """The job's fence is asked before anything is published."""
    common = counts_of(blocks)
    registry = begin_with(settings, database, pair, common.max() - common)
    count(settings, pair, common)

    def fence(connection):
        raise RegistryError("taken over")

    assert renew(settings, database, pair, evidence(tmp_path, blocks), fence) is None
    assert registry.live().live == 1


@pytest.mark.parametrize("why", ["no counts", "full vocabulary", "no automatic promotion"])
def test_where_nothing_can_be_chosen_nothing_happens(settings, database, pair, blocks, tmp_path, why):
    """Without counts, with all tokens scored, or without automatic promotion, it is left to a person."""
    common = counts_of(blocks)
    if why != "full vocabulary":
        begin_with(settings, database, pair, common.max() - common)
    if why == "no counts":
        (settings.vocabularies_dir / "counts.npz").unlink()
    elif why == "no automatic promotion":
        count(settings, pair, common)
        monitors = settings.monitors.model_copy(update={"auto_promote": False})
        settings = settings.model_copy(update={"monitors": monitors})
    assert renew(settings, database, pair, evidence(tmp_path, blocks)) is None
    assert len(Vocabularies(database).rows()) == (0 if why == "full vocabulary" else 1)
