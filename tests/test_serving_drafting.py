"""The draft model's proposer: how much it reads in a round, and what a draft that breaks leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_rig import MIXED, Rig, build_rig, plain_each, prompts, reference_models, request, requests_for

from serving.engine.control.fixed import FixedGamma

N = 24
BUDGET = 32


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = build_rig(folder, tmp_path_factory.mktemp("data"), exact=True, prefix_cache=False)
    yield rig
    rig.built.publisher.close()


@pytest.fixture
def rig(data: Rig) -> Rig:
    """An engine whose draft reads at most `BUDGET` missing tokens a round."""
    data.engine.controller = FixedGamma(3)
    proposer = data.engine.proposers.draft
    proposer._catch_up_tokens = BUDGET
    proposer.num_not_finite = 0
    proposer._broken_versions.clear()
    return data


def _finite(rig: Rig) -> bool:
    pool = rig.engine.proposers.draft.runner.pool
    return all(bool(tensor.isfinite().all()) for tensor in (*pool.keys, *pool.values))


def test_backlogs_of_a_batch_share_one_budget(rig):
    """Eight long prompts at once never make the draft read more than the budget, and all are drafted for in time."""
    ids = prompts(100, (40,) * 8)
    items = [request(str(i), prompt, N, arrived_s=float(-i)) for i, prompt in enumerate(ids)]  # the last came first
    forwards, drafted = [], []

    def note(step: int) -> None:
        forwards.extend(rig.engine.proposers.draft.forwards)
        drafted.extend(item.request_id for item in items if item.by_version and item.request_id not in drafted)

    rig.run(items, note)
    assert max(forwards) > BUDGET // 2
    assert max(forwards) <= BUDGET + 2 * len(items)
    assert drafted == [str(i) for i in reversed(range(8))]


def test_a_broken_live_draft_is_cleaned_up_at_the_next_round(rig, capsys):
    """NaN in the draft's cache is gone a round later without any swap, is counted, and changes no text."""
    ids = prompts(100)
    said = plain_each(reference_models(rig.pair)[0], ids, MIXED, N)
    items = requests_for(ids, MIXED, N)
    for item in items:
        rig.engine.submit(item)
    while not all(item.num_draft_kv for item in items):
        rig.engine.step()
    rig.engine.proposers.draft.runner.pool.values[0][items[2].block_table[0]] = float("nan")
    rig.engine.step()
    assert rig.engine.proposers.draft.num_not_finite > 0
    rig.engine._follow_registry()
    assert _finite(rig)
    rig.run([])
    assert [item.tokens[item.prompt_tokens :] for item in items] == said
    assert capsys.readouterr().out.count("draft_not_finite") == 1


@pytest.mark.parametrize("pinned", [False, True])
def test_a_broken_version_that_only_read_is_cleaned_up(rig, pinned):
    """A NaN version, live or pinned, that read a part of a backlog and drafted nothing is noticed, too."""
    broken = rig.model(lambda weight: weight.fill_(float("nan")))
    proposer = rig.engine.proposers.draft
    if pinned:
        resident, proposer._resident = proposer._resident, lambda version: broken
    else:
        rig.swap(1, broken)
    item = request("r", prompts(100, (60,))[0], 4)
    item.version = 1 if pinned else None
    rig.engine.submit(item)
    while not item.num_draft_kv:
        rig.engine.step()
    assert item.num_draft_kv == BUDGET
    assert not item.by_version
    assert proposer.num_not_finite == 1
    rig.engine._follow_registry()
    assert _finite(rig)
    if pinned:
        proposer._resident = resident
        item.version = None
    else:
        rig.swap(0, rig.built.hotswap._slots.get(0))
    rig.run([])
    assert item.num_generated == 4
