"""Rounds as programs for a device: the same text as rounds on the host, begun ahead, and never waiting."""

from __future__ import annotations

import copy
import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from control_simulator import controller, gpu_table
from engine_rig import (
    MIXED,
    Changing,
    Rig,
    build_rig,
    counts_of,
    plain_each,
    prompts,
    reference_models,
    request,
    requests_for,
)
from engine_rig import shared_rigs as shared

from adapter.contracts import FLOOR_VERSION, Sampling
from kernels import dispatch
from serving.engine.attention import KVPool
from serving.engine.control.base import StepReport
from serving.engine.control.fixed import FixedGamma
from serving.engine.control.switchback import WINDOW_STEPS
from serving.engine.device.llama import DeviceLlama
from serving.engine.device.program import Head, Known, Model, RoundProgram
from serving.engine.device.programs import buckets
from serving.engine.device.rounds import DeviceRounds
from serving.engine.device.wire import (
    BEFORE_LAST,
    CAPACITY,
    FRESH,
    GAMMA,
    LAST,
    LENGTH,
    LIMIT,
    TABLE,
    TOP_K,
    Sent,
    receive,
    sampling_columns,
)
from serving.engine.llama import LeanLlama
from serving.engine.sequence import Sequence
from serving.engine.trimmed_head import TrimmedHead
from serving.engine.work import Work

KERNELS = {
    "activation": ("silu_mul",), "attention": ("paged_attention",), "cuts": ("cut_borders",), "norm": ("add_rms_norm",),
    "rope_cache": ("rope_and_write",), "sampler": ("draw", "verify"),
}  # fmt: skip
HERE: dict[str, Any] = {"exact": True, "compiled": False, "programs": True}


@pytest.fixture(scope="module")
def rig_for(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Rig]]:
    with shared(folder, tmp_path_factory) as found:
        yield found


@pytest.fixture(scope="module")
def ids(rig_for: Callable[..., Rig]) -> list[list[int]]:
    return prompts(rig_for(**HERE).engine.target.model.config.vocab_size)


@pytest.fixture(scope="module")
def said(rig_for: Callable[..., Rig], ids: list[list[int]]) -> list[list[int]]:
    """What plain sampling says to each prompt, by the definition."""
    return plain_each(reference_models(rig_for(**HERE).pair)[0], ids, MIXED, 40)


@pytest.mark.parametrize("gamma", [0, 1, 3, 8])
def test_device_rounds_say_what_plain_sampling_says(rig_for, ids, said, gamma):
    """Greedy and seeded requests, 1 to 8 drafted tokens: every token equals the definition's (I1)."""
    rig = rig_for(**HERE)
    rig.engine.controller = FixedGamma(gamma)
    assert isinstance(rig.engine.rounds, DeviceRounds)
    items = requests_for(ids, MIXED, 40, prefix=f"g{gamma}-")
    assert rig.run(items) == said
    counts = counts_of(items)
    assert (counts.num_drafted > 0) == (gamma > 0)
    assert counts.num_accepted <= counts.num_examined <= counts.num_drafted


@pytest.mark.parametrize("seed", range(4))
def test_device_rounds_and_rounds_of_the_host_mix(rig_for, ids, said, seed):
    """Draft lengths and proposers change in every round, so rounds change place: the text does not."""
    rig = rig_for(**HERE)
    rig.engine.controller = Changing(seed)
    assert rig.run(requests_for(ids, MIXED, 40, prefix=f"c{seed}-")) == said


def test_a_next_round_begins_before_the_last_one_landed(rig_for, ids, said):
    """In steady state the loop is one round ahead of what it has heard, and catches up when a request ends."""
    rig = rig_for(**HERE)
    rig.engine.controller = FixedGamma(3)
    launch, aheads = rig.engine.rounds.launch, []
    rig.engine.rounds.launch = lambda ask, ahead: (aheads.append(len(ahead)), launch(ask, ahead))[1]  # type: ignore[method-assign]
    try:
        assert rig.run(requests_for(ids, MIXED, 40, prefix="ahead-")) == said
    finally:
        del rig.engine.rounds.launch
    assert sum(count > 0 for count in aheads) > len(aheads) / 3
    assert aheads[0] == 0


def test_a_request_that_ends_while_its_next_round_is_under_way_gains_nothing(rig_for, ids, said):
    """An end token is found a round late: what was begun meanwhile is dropped, blocks and counts are right (I8)."""
    rig = rig_for(**HERE)
    rig.engine.controller = FixedGamma(3)
    free = rig.engine.scheduler.free_blocks
    item = request("ends", ids[0], 40, ends=[said[0][12]])
    end = said[0].index(said[0][12]) + 1
    assert rig.run([item]) == [said[0][:end]]
    assert item.finish_reason == "stop"
    rig.engine.step()  # what was under way lands now
    assert rig.engine.scheduler.free_blocks == free


def test_a_cancelled_request_leaves_its_neighbours_alone(rig_for, ids, said):
    """A client leaves while its round is under way; the others say what they would have said."""
    rig = rig_for(**HERE)
    rig.engine.controller = FixedGamma(3)
    items = requests_for(ids, MIXED, 40, prefix="left-")

    def leave(step: int) -> None:
        if step == 6:
            rig.engine.end(items[2].request_id, "cancelled")

    for item in items:
        rig.engine.submit(item)
    for step in range(500):
        if not rig.engine.busy:
            break
        leave(step)
        rig.engine.step()
    for i, item in enumerate(items):
        generated = item.tokens[item.prompt_tokens :]
        assert generated == said[i][: len(generated)]
        assert len(generated) == 40 or i == 2


def test_a_swap_copies_the_new_weights_bit_for_bit_and_changes_no_text(rig_for, ids, said):
    """Every fifth step another draft, random ones and NaN included: same text, and its own bits at the old address."""
    rig = rig_for(**HERE)
    rig.engine.controller = FixedGamma(3)
    rounds: Any = rig.engine.rounds
    models = [
        rig.model(lambda weight: weight.normal_(0, 0.3)), rig.model(lambda weight: weight.fill_(torch.nan)),
        rig.model(lambda weight: weight.mul_(1.0)),
    ]  # fmt: skip
    base = rig.engine.proposers.draft.runner.model
    broken = rig.engine.proposers.draft_not_finite
    addresses = _addresses(rounds)
    versions = []

    def swap(step: int) -> None:
        if step % 5 == 4:
            versions.append(100 + step)
            rig.swap(versions[-1], models[len(versions) % len(models)])

    try:
        assert rig.run(requests_for(ids, MIXED, 40, prefix="swap-"), swap) == said
        assert len(versions) >= 3
        rounds.models.follow()
        forwards = rig.engine.proposers.draft.runner.forwards
        source = forwards.of(rig.engine.proposers.draft.runner.model)
        for mine, theirs in zip(rounds.models._live.layers, source.layers, strict=True):
            assert torch.equal(mine.qkv.weight.view(torch.int32), theirs.qkv.weight.view(torch.int32))
        assert _addresses(rounds) == addresses
        assert rig.engine.proposers.draft_not_finite > broken  # the NaN draft was noticed, and cleaned up after
        rig.swap(FLOOR_VERSION, base)
        rig.run([request("clean", ids[0], 8)])
        rig.engine.step()
        pool = rig.engine.proposers.draft.runner.pool
        assert all(bool(torch.isfinite(keys).all()) for keys in [*pool.keys, *pool.values])
    finally:
        rig.swap(FLOOR_VERSION, base)
        rig.run([request("back", ids[0], 2)])


def _addresses(rounds: Any) -> list[int]:
    layers = rounds.models._live.layers
    return [getattr(layer, name).weight.data_ptr() for layer in layers for name in ("qkv", "output", "gate_up", "down")]


def test_too_few_blocks_change_no_text(rig_for, ids, said):
    """Preemption while rounds are begun ahead: requests start over and say the same."""
    rig = rig_for(**HERE, kv_tokens=208)
    rig.engine.controller = FixedGamma(3)
    assert rig.run(requests_for(ids, MIXED, 40, prefix="few-")) == said
    assert rig.engine.scheduler.num_preempted > 0


def test_records_of_device_rounds_are_those_of_the_host(rig_for, ids):
    """Blocks of the log are equal in ids, verdicts and positions, and log-probs to rounding.

    Only at a request's end, where a round begun ahead drafts beyond it, may the last draft be longer.
    """
    host, here = rig_for(exact=True, compiled=False), rig_for(**HERE)
    found = []
    for rig in (host, here):
        rig.engine.controller = FixedGamma(2)
        rig.collect(rig.engine.recorder._settings)
        rig.run(requests_for(ids, MIXED, 24, prefix="log-"))
        found.append({block.request_id: block for block in rig.log.blocks})
    assert found[0].keys() == found[1].keys()
    for name, block in found[0].items():
        other = found[1][name]
        assert (block.token_ids, block.positions) == (other.token_ids, other.positions), name
        settled = block.num_records - 3
        for field in ("verdicts", "draft_ids", "topk_ids"):
            assert (block.array(field)[:settled] == other.array(field)[:settled]).all(), (name, field)
        for field in ("draft_logprobs", "topk_logprobs", "tail_mass"):
            difference = abs(block.array(field)[:settled].astype(float) - other.array(field)[:settled].astype(float))
            assert difference.max() < 5e-3, (name, field)


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 8])
def test_short_answers_count_the_same_as_on_the_host(rig_for, ids, max_tokens):
    """What is drafted, examined and accepted near max_tokens is what rounds of the host count, request by request."""
    counted = []
    for settings in ({"exact": True, "compiled": False}, HERE):
        rig = rig_for(**settings, prefill_tokens=512)  # all of it at once: the two share out a backlog's budget unlike
        items = []
        for gamma in (3, 8):
            rig.engine.controller = FixedGamma(gamma)
            items += requests_for(ids, MIXED, max_tokens, prefix=f"short{gamma}-")
            rig.run(items[-len(ids) :])
        counted.append([(item.by_version, item.accepted_by_position, item.plain_rounds) for item in items])
        assert all(counts_of([item]).num_accepted <= item.num_generated for item in items)
    assert counted[0] == counted[1]


def test_a_draft_ends_with_the_positions_its_model_knows(rig_for, ids, said):
    """A round begun ahead is cut to what the draft model can read, by the length that only the device knows."""
    counted = []
    for settings in ({"exact": True, "compiled": False}, HERE):
        rig = rig_for(**settings)
        rig.engine.controller = FixedGamma(3)
        draft, rounds = rig.engine.proposers.draft, rig.engine.rounds
        known, draft._positions = draft._positions, len(ids[0]) + 20
        limit, rounds._draft_limit = getattr(rounds, "_draft_limit", 0), draft._positions + 1
        item = request("near", ids[0], 40)
        try:
            assert rig.run([item]) == [said[0]]
        finally:
            draft._positions, rounds._draft_limit = known, limit
        counted.append((item.by_version, item.plain_rounds))
        assert item.plain_rounds > 10
    assert counted[0] == counted[1]


@pytest.mark.parametrize("gamma", [0, 3])
def test_nobody_is_broken_by_what_lies_in_blocks_of_others(rig_for, gamma):
    """Positions past a request's blocks read block 0, whose numbers here are so large that they end as none: neither
    half holds that against it; a NaN in its own block still tells."""
    rig = rig_for(**HERE)
    model, block = rig.engine.target.model, 8
    for spoiled in (0, 1):
        pool = KVPool(model.config, 4, block, torch.float32, torch.device("cpu"))
        for part in pool.values:
            part[0] = 3e38
            part[spoiled] = torch.nan if spoiled else 3e38
        side = Model(DeviceLlama(LeanLlama(copy.deepcopy(model)), pool, 64), Head(model.lm_head.weight))
        made = RoundProgram(
            side, side, Known.empty(1, torch.device("cpu")), batch=1, gamma=6, width=4, block_tokens=block,
            vocab=model.config.vocab_size, top_k=0, maximal=False,
        )  # fmt: skip
        made.input[0, [FRESH, LENGTH, BEFORE_LAST, LAST, CAPACITY, LIMIT, GAMMA]] = torch.tensor(
            [1, block, 5, 6, block, 1000, gamma], dtype=torch.int32
        )
        made.input[0, TABLE] = 1
        made.draft()
        made.verify()
        landing = made.sent.unpack(made.output.numpy())
        assert (landing.finite, landing.sound) == ([int(spoiled == 0)], [int(spoiled == 0)])
        assert landing.drafted == [gamma]


class Counting(FixedGamma):
    """Rests in every fourth step, which forces the next one to land first; counts steps with somebody in them."""

    chosen = heard = 0

    def choose(self, requests: list[Sequence], offers: Any, shape: Any) -> Any:
        self.chosen += bool(requests)
        self.gamma = 3 if self.chosen % 4 else 0
        return [replace(choice, tag=self.chosen) for choice in super().choose(requests, offers, shape)]

    def observe(self, report: StepReport) -> None:
        self.heard += report.shape.context_tokens > 0
        assert {item.tag for item in report.rounds} <= {self.heard}, "a round was reported with another step's choice"


def test_a_step_is_chosen_once_and_heard_of_once(rig_for, ids, said):
    """However often a landing is forced, choices and observed steps are equally many, in order."""
    rig = rig_for(**HERE)
    rig.engine.step()  # what an earlier test left under way lands now
    rig.engine.controller = chooser = Counting(3)
    fit, forced = rig.engine._fit, []
    rig.engine._fit = lambda ask: (forced.append(1), fit(ask))[1]
    try:
        assert rig.run(requests_for(ids, MIXED, 40, prefix="once-")) == said
        rig.engine.step()
    finally:
        del rig.engine._fit
    assert len(forced) > 5
    assert chooser.chosen == chooser.heard > 20


def test_a_request_the_host_runs_is_in_every_step(rig_for, ids, said):
    """Beside others on the device, one with log-probs is left out of no step: it ends as soon as it would alone."""
    rig = rig_for(**HERE)
    rig.engine.controller = FixedGamma(0)
    items = requests_for(ids[:3], MIXED[:3], 40, prefix="every-")
    items[1].logprobs = 1
    for item in items:
        rig.engine.submit(item)
    steps = 0
    while rig.engine.busy:
        rig.engine.step()
        steps += 1
    assert [item.tokens[item.prompt_tokens :] for item in items] == said[:3]
    assert steps <= 42


def test_steps_of_a_window_are_plain_and_the_others_are_not(folder, tmp_path, ids):
    """Begun ahead, each step is counted as what it was chosen to be: every step of a window ran without a draft, every
    one beside it with one.  The draft is the target, so that it always pays; n > 4 windows."""
    rig = build_rig(folder, tmp_path, draft=str(folder / "tiny-target"), **HERE, controller="adaptive")
    rig.engine.controller = chooser = controller(gpu_table(), switchback_share=0.5, explore_share=0.0)
    chooser.costs.observe = lambda report: None  # a draft as slow as the target would soon be off
    switchback = chooser.switchback
    switchback._gap = lambda: 1
    observe, seen = switchback.observe, []

    def heard(step: Any, mark: Any) -> None:
        seen.append((mark.phase, step.drafted))
        observe(step, mark)
        sorted_.append(not any(item.drafted for item in switchback._off))

    switchback.observe, sorted_ = heard, []
    launch, aheads = rig.engine.rounds.launch, []
    rig.engine.rounds.launch = lambda ask, ahead: (aheads.append(len(ahead)), launch(ask, ahead))[1]
    for turn in range(16):
        rig.run([request(f"w{turn}-{i}", ids[i], 120, gamma=None) for i in range(2)])
    assert sum(count > 0 for count in aheads) > len(aheads) / 3
    assert switchback.num_windows > 4
    windows = [drafted for phase, drafted in seen if phase == "window"]
    assert len(windows) > 4 * WINDOW_STEPS
    assert not any(windows)
    assert all(sorted_)
    settling = [drafted for phase, drafted in seen if phase == "settling"]
    assert len(settling) > 4
    assert sum(settling) > len(settling) / 2  # the others ended with their requests' last tokens
    beside = [drafted for phase, drafted in seen if phase in ("after", "between")]
    assert sum(beside) > 0.7 * len(beside)
    rig.built.publisher.close()


def test_a_first_vocabulary_makes_no_program_under_traffic(rig_for, ids, said):
    """Warmed while all tokens are scored, the programs are there for a trimmed head too, and say the same (I1)."""
    rig = rig_for(**HERE, draft_vocab_size=128, max_batch=4)
    rounds, runner = rig.engine.rounds, rig.engine.proposers.draft.runner
    assert runner.head is None or not isinstance(runner.head, TrimmedHead)
    with structlog.testing.capture_logs() as logged:
        rounds.warm(rig.engine.recorder.top_k)
    [line] = [line for line in logged if line["event"] == "graphs_captured"]
    assert line["programs"] == len(rounds.programs) > 0
    assert line["seconds"] >= 0
    before = {key: (made.verify, dict(made.drafts)) for key, made in rounds.programs._made.items()}
    assert all(set(drafts) == {0, 1} for key, (_, drafts) in before.items() if key[1])
    rig.engine.controller = FixedGamma(3)
    try:
        for number in (100, 90):
            kept = np.arange(number, dtype=np.uint32)
            runner.head = TrimmedHead(runner.model.lm_head, kept)
            items = requests_for(ids[:4], MIXED[:4], 40, prefix=f"vocab{number}-")
            assert rig.run(items) == said[:4]
            assert rounds.models.head_place == 1
            assert counts_of(items).num_drafted > 0
    finally:
        runner.head = None
    assert {key: (made.verify, dict(made.drafts)) for key, made in rounds.programs._made.items()} == before


def test_a_larger_vocabulary_moves_to_a_place_of_its_own(rig_for, ids, said):
    """More tokens than engine.draft_vocab_size: programs for the place that is gone go with it, and text stays."""
    rig = rig_for(**HERE, draft_vocab_size=64, max_batch=2)
    rounds, runner = rig.engine.rounds, rig.engine.proposers.draft.runner
    rounds.warm(rig.engine.recorder.top_k)
    rig.engine.controller = FixedGamma(2)
    try:
        runner.head = TrimmedHead(runner.model.lm_head, np.arange(120, dtype=np.uint32))
        assert rig.run(requests_for(ids[:2], MIXED[:2], 40, prefix="larger-")) == said[:2]
        assert rounds.models.head_place == 2
        used = [made for made in rounds.programs._made.values() if 2 in made.drafts]
        assert used
        assert all(1 not in made.drafts for made in used)
    finally:
        runner.head = None


def test_reading_a_prompt_scores_nothing(rig_for, ids, said):
    """Chunks of a prompt need keys and values alone: the target's head runs in the round's program only."""
    rig = rig_for(**HERE, prefill_tokens=16, max_batch=2)
    rig.engine.controller = FixedGamma(0)
    scored: list[int] = []
    hook = rig.engine.target.model.lm_head.register_forward_hook(lambda *_: scored.append(1))
    try:
        assert rig.run([request("long", ids[4], 40)]) == [
            plain_each(reference_models(rig.pair)[0], [ids[4]], [{"temperature": 0.0}], 40)[0]
        ]
    finally:
        hook.remove()
    assert scored == []


def test_a_broken_part_of_a_prompt_is_shared_with_nobody(rig_for, ids):
    """A prompt whose first part gave no numbers ends in an error, and its blocks are found by nobody."""
    rig = rig_for(**HERE, prefill_tokens=16, max_batch=2)
    target = rig.engine.target.model
    weight = target.model.layers[0].input_layernorm.weight
    kept = weight.detach().clone()
    item = request("part", [7, *ids[4]], 8)
    rig.engine.submit(item)
    weight.data.fill_(torch.nan)
    rig.engine.step()
    weight.data.copy_(kept)
    again = request("again", [7, *ids[4]], 8, arrived_s=1.0)
    rig.engine.submit(again)  # while the first is still being read
    while rig.engine.busy:
        rig.engine.step()
    assert item.finish_reason == "error"
    assert (again.num_cached_tokens, again.finish_reason) == (0, "length")


def test_a_model_has_one_forward_on_the_device_and_takes_it_along(rig_for):
    """Rounds and prompts share the target's; a draft that nobody holds any more is not held by what ran it."""
    rig = rig_for(**HERE)
    assert rig.engine.rounds.models.target.layers is rig.engine.target.on_device()
    runner = rig.engine.proposers.draft.runner
    model = rig.model(lambda weight: weight.mul_(1.0))
    runner.forward([Work([1], 0, [5, 6, 7], 1)], model)
    held = weakref.ref(runner.on_device(model))
    assert held() is runner.on_device(model)
    del model
    gc.collect()
    assert held() is None


def test_the_maximal_coupling_keeps_the_laws_it_drew_from(rig_for, ids):
    """With a draft equal to its target nothing is ever rejected, in rounds of a device too."""
    rig = rig_for(**HERE, coupling="maximal", draft_vocab_size=0)
    rig.engine.controller = FixedGamma(3)
    rounds: Any = rig.engine.rounds
    items = requests_for(ids, MIXED, 24, prefix="max-")
    rig.run(items)
    assert counts_of(items).num_accepted < counts_of(items).num_drafted
    assert any(captured.program._laws is not None for captured in rounds.programs._made.values())


def test_what_needs_the_host_runs_there_in_the_same_step(rig_for, ids, said):
    """A request with log-probs beside others: its answer has them, and nobody's text changes."""
    rig = rig_for(**HERE)
    rig.engine.controller = FixedGamma(3)
    items = requests_for(ids, MIXED, 40, prefix="host-")
    items[1].logprobs = 3
    heard: dict[str, list[Any]] = {item.request_id: [] for item in items}
    for item in items:
        rig.engine.submit(item)
    while rig.engine.busy:
        for delivery in rig.engine.step():
            heard[delivery.request_id] += delivery.logprobs or []
    assert [item.tokens[item.prompt_tokens :] for item in items] == said
    assert [len(heard[item.request_id]) for item in items] == [0, 40, *[0] * (len(items) - 2)]


def test_a_model_that_says_no_numbers_ends_its_requests_alone(rig_for, ids):
    """NaN logits end a request with an error, and the engine goes on."""
    rig = rig_for(**HERE, max_batch=4)
    norm = rig.engine.target.model.model.norm
    before = norm.weight.detach().clone()
    items = requests_for(ids[:2], MIXED[:2], 40, prefix="nan-")

    def spoil(step: int) -> None:
        if step == 5:
            norm.weight.data.fill_(torch.nan)

    for item in items:
        rig.engine.submit(item)
    for step in range(100):
        if not rig.engine.busy:
            break
        spoil(step)
        rig.engine.step()
    norm.weight.data.copy_(before)
    assert [item.finish_reason for item in items] == ["error", "error"]
    assert rig.engine.stats.not_finite == 2
    good = request("after", ids[0], 8)
    rig.run([good])
    assert good.finish_reason == "length"


def test_a_row_that_pads_a_batch_belongs_to_nobody(rig_for, ids, said):
    """Three requests in a program for four: the padding row writes no cache and knows no slot."""
    rig = rig_for(**HERE)
    rig.engine.controller = FixedGamma(2)
    pool = rig.engine.target.pool
    before = [keys[0].clone() for keys in pool.keys]
    assert rig.run(requests_for(ids[:3], MIXED[:3], 40, prefix="pad-")) == said[:3]
    assert all(torch.equal(keys[0], kept) for keys, kept in zip(pool.keys, before, strict=True))


def test_a_draft_length_without_a_program_runs_the_next_longer_one(rig_for, ids, said):
    """Programs exist for few lengths; a request is judged no further than its own, so the text stays the same."""
    rig = rig_for(**HERE)
    rig.engine.controller = FixedGamma(5)
    items = requests_for(ids, MIXED, 40, prefix="five-")
    assert rig.run(items) == said
    assert max(len(item.accepted_by_position) for item in items) <= 5
    assert {captured.program.sent.gamma for captured in rig.engine.rounds.programs._made.values()} <= {
        0,
        1,
        2,
        3,
        4,
        6,
        8,
    }


def test_batch_sizes_are_few():
    """Programs exist for few sizes, the largest among them, and each batch fits one."""
    assert buckets(1) == [1]
    assert buckets(8) == [1, 2, 4, 8]
    assert buckets(20) == [1, 2, 4, 8, 16, 20]
    assert all(min(size for size in buckets(64) if size >= batch) < batch + 8 for batch in range(1, 65))


def test_what_crosses_to_the_device_arrives_unchanged():
    """Sampling parameters survive the packed row bit for bit, 64-bit seeds included."""
    samplings = [
        Sampling(temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, seed=2**64 - 5),
        Sampling(temperature=0.0, seed=2**63),
    ]
    packed = torch.zeros(2, 20, dtype=torch.int32)
    for row, sampling in zip(packed, samplings, strict=True):
        row[TOP_K:TABLE] = torch.from_numpy(sampling_columns(sampling))
    got = receive(packed)
    assert got.top_k.tolist() == [40, 0]
    assert got.temperature.tolist() == pytest.approx([0.7, 0.0])
    assert got.top_p.tolist() == pytest.approx([0.9, 1.0])
    assert got.min_p.tolist() == pytest.approx([0.05, 0.0])
    assert [value % 2**64 for value in got.seeds.tolist()] == [2**64 - 5, 2**63]


@pytest.mark.parametrize(("gamma", "top_k"), [(0, 0), (0, 5), (3, 32), (8, 1)])
def test_what_comes_back_is_what_was_packed(gamma, top_k):
    """Every column of a step's output survives the way, for odd sizes too."""
    batch, rows = 3, gamma + 1
    generator = torch.Generator().manual_seed(gamma)
    drafts = torch.randint(0, 150_000, (batch, gamma), generator=generator)
    logprobs = torch.rand(batch, gamma, generator=generator)
    ids = torch.randint(0, 150_000, (batch * rows, top_k), generator=generator)
    values = torch.rand(batch * rows, top_k, generator=generator).half()
    accepted, tokens = torch.tensor([0, gamma, 1]), torch.tensor([7, 8, 149_999])
    finite = torch.tensor([True, False, True])
    sent = Sent(gamma, top_k)
    packed = sent.pack(accepted, tokens, finite, ~finite, accepted + 1, drafts, logprobs, ids, values)
    assert packed.shape == (batch, sent.width)
    landing = sent.unpack(packed.numpy())
    assert (landing.accepted, landing.tokens, landing.finite) == ([0, gamma, 1], [7, 8, 149_999], [1, 0, 1])
    assert landing.sound == [0, 1, 0]
    assert landing.drafted == [1, gamma + 1, 2]
    assert landing.drafts == drafts.tolist()
    assert landing.draft_logprobs == logprobs.tolist()
    assert landing.topk_ids.reshape(-1).tolist() == ids.reshape(-1).tolist()
    assert landing.topk_logprobs.reshape(-1).tolist() == values.reshape(-1).tolist()


@pytest.mark.parametrize("maximal", [False, True])
@pytest.mark.parametrize("trimmed", [False, True])
def test_a_round_never_asks_the_device_anything(rig_for, maximal, trimmed):
    """On tensors without contents, where reading a value or mixing devices is an error, both halves run through."""
    rig = rig_for(**HERE)
    target = copy.deepcopy(rig.engine.target.model).to("meta")
    vocab, device = target.config.vocab_size, torch.device("meta")
    pool = KVPool(target.config, 16, 8, torch.float32, device)
    layers = DeviceLlama(LeanLlama(target), pool, 256)
    head = Head(target.lm_head.weight)
    small = Head(
        torch.empty(64, target.config.hidden_size, device=device), torch.empty(64, device=device),
        torch.empty(64, dtype=torch.long, device=device),
    )  # fmt: skip
    made = RoundProgram(
        Model(layers, head), Model(layers, small if trimmed else head), Known.empty(8, device), batch=4, gamma=3,
        width=12, block_tokens=8, vocab=vocab, top_k=5, maximal=maximal,
        laws=torch.empty(32, vocab, device=device) if maximal else None,
    )  # fmt: skip
    made.draft()
    made.verify()
    assert made.output.device == device
    with pytest.raises((RuntimeError, NotImplementedError)):  # so that the above means something
        made.output.sum().item()


def test_a_pinned_request_runs_beside_the_others(rig_for, ids, said):
    """Pinned to the floor it drafts with the floor, wherever that is: same text."""
    rig = rig_for(**HERE)
    rig.engine.controller = FixedGamma(3)
    items: list[Sequence] = requests_for(ids, MIXED, 40, prefix="pin-")
    items[3].version = FLOOR_VERSION
    assert rig.run(items) == said


@pytest.mark.slow
def test_device_rounds_on_the_kernels_themselves_say_what_plain_sampling_says(rig_for, ids, said, monkeypatch):
    """Every operation of a round is its Triton kernel, in the interpreter: greedy, sampled and cut requests (I1)."""
    for module, names in KERNELS.items():
        kernel = importlib.import_module(f"kernels.gpu.{module}")
        for name in names:
            monkeypatch.setattr(dispatch, name, getattr(kernel, name))
    rig = rig_for(**HERE, max_batch=4)
    rig.engine.controller = FixedGamma(2)
    picked = (0, 2, 5)
    items = requests_for([ids[i][:12] for i in picked], [MIXED[i] for i in picked], 6, prefix="kernels-")
    expected = plain_each(reference_models(rig.pair)[0], [ids[i][:12] for i in picked], [MIXED[i] for i in picked], 6)
    assert rig.run(items) == expected
    assert counts_of(items).num_drafted > 0
