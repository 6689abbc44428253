"""The engine on a tiny pair: the same tokens as transformers and as plain decoding, whatever happens meanwhile."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_rig import (
    MIXED,
    Changing,
    Rig,
    build_rig,
    counts_of,
    plain,
    plain_each,
    prompts,
    reference_models,
    request,
    requests_for,
    shared_rigs,
)

from adapter.contracts import Sampling, SettingsError
from serving.engine import build
from serving.engine.control.fixed import FixedGamma
from serving.engine.sequence import Sequence

N = 40


@pytest.fixture(scope="module")
def rig_for(folder, tmp_path_factory) -> Iterator[Callable[..., Rig]]:
    with shared_rigs(folder, tmp_path_factory) as rig_for:
        yield rig_for


@pytest.fixture(scope="module")
def same(folder, rig_for) -> Rig:
    """An engine whose draft is the target itself, in the same precision."""
    return rig_for(exact=True, draft=str(folder / "tiny-target"))


@pytest.fixture(scope="module")
def models(rig_for):
    return reference_models(rig_for().pair)


@pytest.fixture(scope="module")
def ids(models) -> list[list[int]]:
    return prompts(models[0].config.vocab_size)


@pytest.fixture(scope="module")
def greedy(models, ids) -> list[list[int]]:
    """What transformers' own generate says."""
    return [
        models[0].generate(
            torch.tensor([prompt]), max_new_tokens=N, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for prompt in ids
    ]  # fmt: skip


@pytest.fixture(scope="module")
def sampled(models, ids) -> list[list[int]]:
    """What sampling by the definition says, each prompt with its own parameters."""
    return plain_each(models[0], ids, MIXED, N)


def _mixed(ids: list[list[int]], gamma: int | None) -> list[Sequence]:
    return requests_for(ids, MIXED, N, gamma=gamma)


# -- the same tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, 1, 3, 5])
@pytest.mark.parametrize("batch", [1, 8])
def test_serving_r2_greedy_equals_transformers(rig_for, ids, greedy, gamma, batch):
    """Greedy tokens are those of transformers' generate, at batch 1 and 8 and every draft length."""
    rig, said = rig_for(), []
    for start in range(0, len(ids), batch):
        part = [request(f"{start + i}", prompt, N, gamma=gamma) for i, prompt in enumerate(ids[start : start + batch])]
        said += rig.run(part)
    assert said == greedy


def test_serving_r1_draft_length_may_change_every_round(rig_for, ids, greedy):
    """Each request gets another draft length, zero included, in every round (adaptive K)."""
    rig = rig_for()
    rig.engine.controller = Changing(1)
    assert rig.run([request(str(i), prompt, N) for i, prompt in enumerate(ids)]) == greedy


@pytest.mark.parametrize("gamma", [0, 1, 3, 5])
def test_seeded_sampling_equals_the_definition(rig_for, ids, sampled, gamma):
    """Eight requests with eight ways to sample get the tokens of one-row sampling without a cache."""
    assert rig_for().run(_mixed(ids, gamma)) == sampled


def test_serving_r1_batch_mates_do_not_matter(rig_for, ids, sampled):
    """Alone, in pairs in another order, and joining late, every request says the same (R1)."""
    rig = rig_for()
    for alone in _mixed(ids, 3)[2:5]:
        assert rig.run([alone])[0] == sampled[int(alone.request_id)]
    late = _mixed(ids, 2)
    joining = late[:0:-1]
    rig.run(late[:1], lambda step: rig.engine.submit(joining.pop(0)) if joining else None)
    assert [item.tokens[item.prompt_tokens :] for item in late] == sampled


@pytest.mark.parametrize("gamma", [0, 3, 8])
def test_serving_a1_preemption_changes_nothing(rig_for, ids, sampled, gamma):
    """With room for about two requests, the others give their blocks back and still say the same (A1)."""
    rig = rig_for(kv_tokens=208)
    before = rig.engine.scheduler.num_preempted
    assert rig.run(_mixed(ids, gamma)) == sampled
    assert rig.engine.scheduler.num_preempted > before


@pytest.mark.parametrize("gamma", [0, 4])
def test_chunked_prefill_changes_nothing(rig_for, ids, sampled, gamma):
    """Prompts read sixteen tokens a step, beside requests that decode, give the same tokens."""
    assert rig_for(prefill_tokens=16).run(_mixed(ids, gamma)) == sampled


def test_batch_limit_queues_the_rest(rig_for, ids, sampled):
    """With two places, eight requests come through in turn and say the same."""
    assert rig_for(max_batch=2).run(_mixed(ids, 3)) == sampled


@pytest.mark.parametrize("exact", [False, True])
def test_serving_w7_swaps_never_change_the_text(rig_for, ids, sampled, exact):
    """Every third step another draft: random weights, zeros, NaN, infinity, the base again (I1, W4-W7)."""
    rig = rig_for(exact=exact)
    generator = torch.Generator().manual_seed(0)
    base = rig.built.hotswap._slots.get(0)
    drafts = [
        rig.model(lambda weight: weight.copy_(torch.randn(weight.shape, generator=generator))),
        rig.model(lambda weight: weight.fill_(float("nan"))),
        base,
        rig.model(lambda weight: weight.fill_(0)),
        rig.model(lambda weight: weight.fill_(float("inf"))),
        base,
    ]

    def disturb(step: int) -> None:
        if step % 3 == 2:
            index = step // 3 % len(drafts)
            rig.swap(0 if drafts[index] is base else index + 1, drafts[index])

    requests = _mixed(ids, 3)
    try:
        assert rig.run(requests, disturb) == sampled
    finally:
        rig.swap(0, base)
        rig.engine.step()
    assert len({version for item in requests for version in item.by_version}) > 3
    generation = rig.built.hotswap.generation
    assert generation >= 5
    assert [receipt.generation for receipt in rig.engine.stats.swaps][-1] == generation


def test_serving_w6_a_broken_draft_leaves_nothing_behind(rig_for, ids):
    """After a NaN draft was served and replaced, acceptance of new requests is what it was before (W6, W7).

    Without cached prefixes, so that what the draft has to read first is the same before and after.
    """
    rig = rig_for(exact=True, prefix_cache=False)
    base = rig.built.hotswap._slots.get(0)
    fresh = [request(f"a{i}", prompt, N) for i, prompt in enumerate(ids)]
    rig.run(fresh)
    rig.swap(1, rig.model(lambda weight: weight.fill_(float("nan"))))
    broken = [request(f"b{i}", prompt, N) for i, prompt in enumerate(ids)]
    rig.run(broken)
    rig.swap(0, base)
    again = [request(f"c{i}", prompt, N) for i, prompt in enumerate(ids)]
    rig.run(again)
    assert counts_of(broken).num_accepted < counts_of(fresh).num_accepted
    assert counts_of(again) == counts_of(fresh)


def test_without_a_draft(folder, tmp_path, ids, greedy):
    """`--draft none` decodes plainly, and says that nothing was drafted."""
    from tiny_pair import pair_settings

    from adapter.database import migrate, open_database
    from adapter.models import prepare_pair

    settings = pair_settings(folder, tmp_path, draft="none")
    database = open_database(settings.database)
    migrate(database)
    built = build.build_engine(settings, prepare_pair(settings), database)
    rig = Rig(built, prepare_pair(settings))
    requests = [request(str(i), prompt, N) for i, prompt in enumerate(ids)]
    assert rig.run(requests) == greedy
    assert counts_of(requests).num_drafted == 0
    built.publisher.close()


# -- maximal coupling ------------------------------------------------------------------------


def test_maximal_coupling_keeps_greedy_exact(rig_for, ids, greedy):
    """Greedy rows take the target's argmax under the other coupling too, beside sampled ones."""
    rig = rig_for(coupling="maximal")
    rig.engine.controller = Changing(3)
    requests = [request(str(i), prompt, N) for i, prompt in enumerate(ids)]
    mates = [request(f"m{i}", prompt, N, temperature=1.0, seed=i) for i, prompt in enumerate(ids[:3])]
    assert rig.run([*requests, *mates])[: len(requests)] == greedy


def test_maximal_coupling_repeats_itself(rig_for, ids):
    """The same seeds at the same draft length give the same tokens; some drafted ones are kept."""
    rig = rig_for(coupling="maximal")
    first, second = _mixed(ids, 3), _mixed(ids, 3)
    assert rig.run(first) == rig.run(second)
    assert 0 < counts_of(first).num_accepted < counts_of(first).num_drafted


# -- ends ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distinct(models) -> tuple[list[int], list[int]]:
    """A prompt whose first ten greedy tokens are all different, and those tokens."""
    for seed in range(200):
        prompt = prompts(models[0].config.vocab_size, (7,), seed)[0]
        said = plain(models[0], prompt, 10, Sampling(temperature=0.0))
        if len(set(said)) == 10:
            return prompt, said
    raise AssertionError("no prompt found")


@pytest.mark.parametrize("gamma", [0, 1, 3, 5])
def test_serving_s1_eos_inside_block(same, distinct, gamma):
    """The end token at every offset of a block that is wholly accepted ends the answer right there (S1)."""
    prompt, said = distinct
    for offset, token in enumerate(said):
        item = request("e", prompt, N, gamma=gamma, ends=[token])
        assert same.run([item]) == [said[: offset + 1]]
        assert item.finish_reason == "stop"


def test_serving_s3_end_token_and_max_tokens_in_one_block(same, distinct):
    """Whichever comes first wins; on a tie the reason is the end token (S3)."""
    prompt, said = distinct
    for limit in range(1, 8):
        for offset in range(7):
            item = request("e", prompt, limit, gamma=5, ends=[said[offset]])
            assert same.run([item]) == [said[: min(limit, offset + 1)]]
            assert item.finish_reason == ("stop" if offset < limit else "length")


def test_serving_s4_a_drafts_end_token_ends_nothing(rig_for, ids, greedy):
    """A draft that proposes an end token everywhere does not end an answer (S4)."""
    rig = rig_for()
    never = next(token for token in range(3, 120) if all(token not in said for said in greedy))
    real = rig.engine.proposers.draft.propose

    def biased(requests, gammas):
        proposals = real(requests, gammas)
        for proposal in proposals:
            proposal.tokens = [never for _ in proposal.tokens]
        return proposals

    rig.engine.proposers.draft.propose = biased
    try:
        assert rig.run([request(str(i), prompt, N, ends=[never]) for i, prompt in enumerate(ids)]) == greedy
    finally:
        rig.engine.proposers.draft.propose = real


def test_max_tokens_is_never_passed(same, ids, greedy):
    """Every limit from 1 on gives exactly that many tokens, and no round drafts past it."""
    for limit in range(1, 12):
        items = [request(str(i), prompt, limit, gamma=8) for i, prompt in enumerate(ids)]
        assert same.run(items) == [said[:limit] for said in greedy]
        assert {item.finish_reason for item in items} == {"length"}
        assert counts_of(items).num_drafted <= limit * len(items)


# -- caches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_serving_k1_full_acceptance_leaves_no_hole(same, ids, greedy, gamma):
    """A full acceptance lacks one more token in the draft's cache; catching up keeps all later rounds true (K1)."""
    items = [request(str(i), prompt, N, gamma=gamma) for i, prompt in enumerate(ids)]
    assert same.run(items) == greedy
    counts = counts_of(items)
    assert counts.num_accepted == counts.num_drafted == counts.num_examined > 0


def test_switching_speculation_on_again_catches_up(same, ids, greedy):
    """After twelve plain rounds the draft reads what it missed, and is right at once (R1, lazy catch-up)."""
    items = [request(str(i), prompt, N) for i, prompt in enumerate(ids)]
    controller = FixedGamma(0)
    same.engine.controller = controller

    def switch(step: int) -> None:
        controller.gamma = 0 if step % 16 < 12 else 4

    try:
        assert same.run(items, switch) == greedy
    finally:
        same.engine.controller = FixedGamma(3)
    counts = counts_of(items)
    assert counts.num_accepted == counts.num_drafted > 0
    assert all(item.plain_rounds for item in items)


@torch.inference_mode()
def _fresh(model: Any, tokens: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    cache = model(input_ids=torch.tensor([tokens]), use_cache=True).past_key_values
    return [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]


@pytest.mark.parametrize("kv_tokens", [208, 2048])
def test_serving_k2_k3_k4_caches_equal_a_fresh_prefill_after_every_step(rig_for, models, ids, kv_tokens):
    """Keys and values of target and draft are those of a fresh forward over the committed tokens (K1-K4).

    Rows are at different lengths, accept different numbers, and are preempted where blocks are scarce.
    """
    rig = rig_for(exact=True, kv_tokens=kv_tokens)
    rig.engine.controller = Changing(5)
    items = _mixed(ids, None)

    def compare(step: int) -> None:
        if step % 4:
            return
        for item in rig.engine.scheduler.running:
            for runner, model, length in (
                (rig.engine.target, models[0], item.num_target_kv),
                (rig.engine.proposers.draft.runner, models[1], item.num_draft_kv),
            ):
                assert length <= len(item.tokens)
                if not length:
                    continue
                for layer, (keys, values) in enumerate(_fresh(model, item.tokens[:length])):
                    for pool, true in ((runner.pool.keys, keys), (runner.pool.values, values)):
                        held = pool[layer][item.block_table].flatten(0, 1)[:length]
                        torch.testing.assert_close(held, true, atol=1e-4, rtol=1e-4)

    rig.run(items, compare)


def test_serving_k4_a_round_reads_only_what_is_new(rig_for, ids):
    """After every round the target lacks one token and the draft two at most, and forwards are no larger than that."""
    rig = rig_for(exact=True)
    rig.engine.controller = FixedGamma(4)
    engine, proposer = rig.engine, rig.engine.proposers.draft
    items = _mixed(ids, None)
    target_sizes: list[tuple[int, int]] = []
    run = engine.target.run

    def noted(work, model=None, **more):
        target_sizes.extend((item.num_logits, len(item.token_ids)) for item in work if item.start)
        return run(work, model, **more)

    def check(step: int) -> None:
        if len(drafted) == len(items):
            assert max(proposer.forwards, default=0) <= 2 * len(items)
        for item in engine.scheduler.running:
            if item.num_generated:
                assert item.num_target_kv == len(item.tokens) - 1
            if item.by_version:
                assert 1 <= len(item.tokens) - item.num_draft_kv <= 2
                drafted.add(item.request_id)

    drafted: set[str] = set()
    engine.target.run = noted
    try:
        rig.run([request(f"first{i}", prompt, 2) for i, prompt in enumerate(ids)])
        target_sizes.clear()
        rig.run(items, check)
    finally:
        del engine.target.run
    decoded = [size for size in target_sizes if size[0]]
    assert len(drafted) == len(items)
    assert sum(wanted == size for wanted, size in decoded) >= len(decoded) - len(items)  # but for a prompt's last chunk


def test_serving_a5_no_block_belongs_to_two_requests(rig_for, ids):
    """Block tables are disjoint, hold no block 0, and with the free list make up the pool, at every step (I5)."""
    rig = rig_for(kv_tokens=208)
    scheduler = rig.engine.scheduler

    def check(_step: int) -> None:
        held = [block for item in scheduler.running for block in item.block_table]
        assert all(not item.block_table for item in scheduler.waiting)
        assert sorted(held + scheduler.pool.unheld) == list(range(1, scheduler.num_blocks))

    rig.run(_mixed(ids, 5), check)


# -- cancelling and counting -----------------------------------------------------------------


def test_serving_a4_cancelling_frees_blocks_at_once(rig_for, ids, sampled):
    """A request that leaves while running, prefilling or waiting gives its blocks back; the others go on (A4)."""
    rig = rig_for(kv_tokens=208)
    free = rig.engine.scheduler.free_blocks
    items = _mixed(ids, 3)
    for item in items:
        rig.engine.submit(item)
    for gone in (1, 4, 6, 7):
        rig.engine.step()
        rig.engine.end(str(gone), "cancelled", 0)
        rig.engine.end(str(gone), "cancelled", 0)  # a second goodbye is not an error
        assert not items[gone].block_table
    rig.run([])
    assert rig.engine.scheduler.free_blocks == free
    for i in (0, 2, 3, 5):
        assert items[i].tokens[items[i].prompt_tokens :] == sampled[i]
    assert {items[i].finish_reason for i in (1, 4, 6, 7)} == {"cancelled"}


def test_serving_n3_n4_counters_agree(rig_for, ids):
    """Requests, outcomes and the engine's totals count the same rounds and tokens (I8, N3, N4)."""
    rig = rig_for()
    rig.engine.controller = Changing(9)
    before = {name: getattr(rig.engine.stats, name) for name in ("rounds", "drafted", "examined", "accepted")}
    tokens = rig.engine.stats.generated_tokens
    rig.collect(rig.engine.recorder._settings)
    items = _mixed(ids, None)
    rig.run(items)
    total = sum((item.unversioned for item in items), counts_of(items))
    logged = [outcome.counts + outcome.unversioned for outcome in rig.log.outcomes]
    for name, field in (
        ("rounds", "num_rounds"), ("drafted", "num_drafted"), ("examined", "num_examined"),
        ("accepted", "num_accepted"),
    ):  # fmt: skip
        assert getattr(rig.engine.stats, name) - before[name] == getattr(total, field)
        assert sum(getattr(one, field) for one in logged) == getattr(total, field)
    assert rig.engine.stats.generated_tokens - tokens == sum(item.num_generated for item in items)
    assert sum(outcome.delivered_tokens for outcome in rig.log.outcomes) == len(items) * N
    for item in items:
        assert sum(item.accepted_by_position) == counts_of([item]).num_accepted
        both = counts_of([item]) + item.unversioned
        assert item.num_generated == both.num_accepted + both.num_rounds + item.plain_rounds


# -- pairs and settings that do not fit ------------------------------------------------------


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
@pytest.mark.parametrize("width", [112, 128])
def test_serving_v1_a_draft_may_pad_its_vocabulary_differently(folder, tmp_path, models, ids, greedy, coupling, width):
    """Wider or narrower logits of a draft with the same tokenizer change no text and crash nothing (V1)."""
    from transformers import LlamaForCausalLM

    shutil.copytree(folder / "tiny-target", tmp_path / "draft")
    config = copy.deepcopy(models[0].config)
    config.vocab_size = width
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "draft")
    rig = build_rig(folder, tmp_path / "data", draft=str(tmp_path / "draft"), coupling=coupling)
    assert rig.run([request(str(i), prompt, N) for i, prompt in enumerate(ids)]) == greedy
    rig.run([request(f"s{i}", prompt, N, temperature=1.5, seed=i) for i, prompt in enumerate(ids)])
    rig.built.publisher.close()


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"gamma": 9, "controller": "fixed"}, "engine.gamma = 9 is more than engine.gamma_max = 8"),
        ({"kv_tokens": 200}, "engine.kv_tokens = 200"),
        ({"max_model_len": 513}, "512 positions"),
    ],
)
def test_settings_that_cannot_work_are_refused(folder, tmp_path, engine, words):
    """A draft length past its maximum, a cache too small for one request, more positions than trained for."""
    with pytest.raises(SettingsError, match=words):
        build_rig(folder, tmp_path, **engine)
