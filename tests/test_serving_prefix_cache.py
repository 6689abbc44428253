"""Reused blocks on the tiny pair: the same tokens, and the keys and values of a fresh forward."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_rig import Changing, Rig, build_rig, counts_of, prompts, reference_models, request
from tiny_pair import ENGINE

from serving.engine.blocks import block_key, root_key
from serving.engine.control.fixed import FixedGamma
from serving.engine.sequence import Sequence

SIZE = ENGINE.block_tokens
N = 30


@pytest.fixture
def rig_for(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """Return `rig_for(**engine settings)`: a fresh engine that drafts with the draft model alone, in float32."""
    built: list[Rig] = []

    def get(**engine: Any) -> Rig:
        built.append(build_rig(folder, tmp_path / str(len(built)), exact=True, **{"proposers": ("draft",), **engine}))
        return built[-1]

    yield get
    for rig in built:
        rig.built.publisher.close()


@pytest.fixture(scope="module")
def plainly(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[Sequence]], list[Any]]]:
    """Return a function that runs copies of requests without speculation, without reuse, and with room for all."""
    rig = build_rig(
        folder, tmp_path_factory.mktemp("plain"), draft="none", prefix_cache=False, proposers=(), kv_tokens=8192
    )
    yield lambda items: rig.run([_again(item, f"plain-{item.request_id}") for item in items])
    rig.built.publisher.close()


def _again(item: Sequence, name: str, **more: Any) -> Sequence:
    sampling = {field: getattr(item.sampling, field) for field in ("temperature", "top_p", "seed")}
    made = request(
        name, item.tokens[: item.prompt_tokens], item.max_tokens, gamma=item.gamma, arrived_s=item.arrived_s,
        **{**sampling, **more},
    )  # fmt: skip
    made.cache_salt = item.cache_salt
    return made


def _family(seed: int, count: int) -> list[Sequence]:
    """Requests whose prompts begin alike: one of three texts, cut anywhere, and a few tokens of their own."""
    rng, texts = random.Random(seed), prompts(110, (70, 70, 70), seed)
    texts[1][:24] = texts[0][:24]
    made = []
    for i in range(count):
        own = [rng.randrange(3, 110) for _ in range(rng.randint(0, 5))]
        prompt = rng.choice(texts)[: rng.randint(1, 70)] + own
        warm = {"temperature": rng.choice([0.0, 0.8, 1.2]), "top_p": rng.choice([1.0, 0.8]), "seed": i}
        made.append(request(f"{seed}-{i}", prompt, rng.randint(1, N), arrived_s=float(i), **warm))
    return made


def _randomly(seed: int) -> Callable[[torch.Tensor], object]:
    generator = torch.Generator().manual_seed(seed)
    return lambda weight: weight.copy_(torch.randn(weight.shape, generator=generator))


def _answers(items: list[Sequence]) -> list[list[int]]:
    return [item.tokens[item.prompt_tokens :] for item in items]


def _cached(rig: Rig, text: list[int], salt: str = "") -> list[int]:
    keys = [root_key(salt)]
    for start in range(0, len(text) - SIZE + 1, SIZE):
        keys.append(block_key(keys[-1], text[start : start + SIZE]))
    return rig.engine.scheduler.pool.find(keys[1:])


@torch.inference_mode()
def _equals_a_fresh_prefill(runner: Any, model: Any, blocks: list[int], text: list[int]) -> None:
    """Compare the keys and values of whole blocks with those of one forward over the text they stand for."""
    length = len(blocks) * SIZE
    if not length:
        return
    fresh = model(input_ids=torch.tensor([text[:length]]), use_cache=True).past_key_values
    for layer, true in enumerate(fresh.layers):
        for pool, wanted in ((runner.pool.keys, true.keys), (runner.pool.values, true.values)):
            held = pool[layer][blocks].flatten(0, 1)
            torch.testing.assert_close(held, wanted[0].transpose(0, 1), atol=1e-4, rtol=1e-4)


def _check_cached(rig: Rig, models: tuple[Any, Any], items: list[Sequence]) -> tuple[int, int]:
    """Compare every cached block of these texts, and every one the floor draft completed; return how many of each."""
    seen: set[int] = set()
    drafted: set[int] = set()
    for item in items:
        blocks = _cached(rig, item.tokens, item.cache_salt)
        complete = blocks[: rig.engine.scheduler.pool.num_drafted(blocks, 0)]
        _equals_a_fresh_prefill(rig.engine.target, models[0], blocks, item.tokens)
        _equals_a_fresh_prefill(rig.engine.proposers.draft.runner, models[1], complete, item.tokens)
        seen |= set(blocks)
        drafted |= set(complete)
    return len(seen), len(drafted)


# -- the same tokens -------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "kv_tokens"), [(0, 2048), (1, 208), (2, 264)])
def test_serving_c1_the_cache_changes_no_token(rig_for, plainly, seed, kv_tokens):
    """Shared beginnings, preemption, cancels, changing draft lengths and swaps to broken drafts, cache on and off."""
    items = _family(seed, 14)
    expected = plainly(items)
    gone = {items[i].request_id for i in (3, 8)}
    for prefix_cache in (True, False):
        rig = rig_for(kv_tokens=kv_tokens, prefix_cache=prefix_cache)
        rig.engine.controller = Changing(seed)
        drafts = [
            rig.model(_randomly(seed)),
            rig.model(lambda weight: weight.fill_(float("nan"))),
            rig.built.hotswap._slots.get(0),
        ]
        mine = [_again(item, item.request_id) for item in items]
        late = mine[5:]

        def disturb(step: int, rig: Rig = rig, mine: list = mine, late: list = late, drafts: list = drafts) -> None:
            if late and step % 3 == 1:
                rig.engine.submit(late.pop(0))
            if step % 5 == 4:
                rig.swap((step // 5 + 1) % 3, drafts[step // 5 % 3])
            if step in (6, 17):
                rig.engine.end(mine[3 if step == 6 else 8].request_id, "cancelled", 0)

        rig.run(mine[:5], disturb)
        assert not late
        for item, wanted in zip(mine, expected, strict=True):
            got = item.tokens[item.prompt_tokens :]
            assert got == (wanted[: len(got)] if item.request_id in gone else wanted)
        scheduler = rig.engine.scheduler
        assert scheduler.free_blocks == scheduler.num_blocks - 1
        assert (scheduler.prefix_hits > 0) == prefix_cache
        assert (scheduler.num_preempted > 0) == (kv_tokens < 500)
        assert scheduler.prefix_hits == sum(item.num_cached_tokens for item in mine)


def test_two_new_prompts_that_are_equal_in_one_step(rig_for, plainly):
    """Both compute; one of them is found later, and all say the same."""
    rig = rig_for()
    first = request("a", prompts(110, (40,), 5)[0], N)
    pair = [first, _again(first, "b")]
    expected = plainly([first])[0]
    assert rig.run(pair) == [expected, expected]
    assert [item.num_cached_tokens for item in pair] == [0, 0]
    third = _again(first, "c")
    assert rig.run([third]) == [expected]
    assert third.num_cached_tokens == 32  # four blocks of eight; the fifth holds the last token, which is computed


def test_a_request_joins_a_prompt_that_is_still_read(rig_for, plainly):
    """Chunks of a long prompt are found as soon as they are written, before its request ever ran a round."""
    rig = rig_for(prefill_tokens=16, max_model_len=256)
    rig.engine.controller = FixedGamma(3)
    first = request("a", prompts(110, (100,), 6)[0], 5)
    second = _again(first, "b")
    expected = plainly([first])[0]

    def join(step: int) -> None:
        if step == 3:
            assert not first.num_generated
            rig.engine.submit(second)

    assert rig.run([first], join) == [expected] == _answers([second])
    assert second.num_cached_tokens == 48


# -- keys and values -------------------------------------------------------------------------


def test_serving_k1_k4_c1_cached_blocks_equal_a_fresh_prefill(rig_for, folder):
    """After every few steps, every block that can be found holds what one forward over its text gives.

    Target and draft, under preemption, cancels, draft lengths of 0 and more, and swaps: what another
    version's draft read is not called the floor's.
    """
    rig = rig_for(kv_tokens=264)
    models = reference_models(rig.pair)
    rig.engine.controller = Changing(4, (0, 0, 1, 3, 8))
    other = rig.model(_randomly(4))
    base = rig.built.hotswap._slots.get(0)
    items = _family(4, 16)
    found = []

    def disturb(step: int) -> None:
        if step % 4 == 3:
            found.append(_check_cached(rig, models, items))
        if step % 15 == 14:
            rig.swap(*((1, other) if step % 30 == 14 else (0, base)))
        if step == 11:
            rig.engine.end(items[2].request_id, "cancelled", 0)

    rig.run(items, disturb)
    found.append(_check_cached(rig, models, items))
    assert min(blocks for blocks, _ in found) > 0
    assert max(drafted for _, drafted in found) > 5
    assert any(drafted < blocks for blocks, drafted in found)  # holes: the draft did not read all of them
    assert rig.engine.scheduler.num_preempted > 0


def test_serving_w7_what_a_broken_draft_left_in_cached_blocks_is_not_used(rig_for):
    """Prompts first read by a NaN draft are drafted for, once it is gone, as in an engine that never saw it."""
    items = _family(7, 6)
    counts = []
    for broken in (False, True):
        rig = rig_for()
        rig.engine.proposers.draft._catch_up_tokens = 10_000  # no prompt has to wait until the draft has read others
        if broken:
            rig.swap(1, rig.model(lambda weight: weight.fill_(float("nan"))))
            rig.run([_again(item, f"n{i}") for i, item in enumerate(items)])
            rig.swap(0, rig.built.hotswap._slots.get(0))
        fresh = [_again(item, f"f{i}") for i, item in enumerate(items)]
        rig.run(fresh)
        counts.append(counts_of(fresh))
        assert not broken or all(item.num_cached_tokens for item in fresh if item.prompt_tokens > SIZE)
    assert counts[0] == counts[1]


def test_draft_holes_are_caught_up_and_drafting_goes_on(rig_for, folder):
    """Prompts read without speculation are found, the draft reads them itself, and is right at once."""
    rig = rig_for(draft=str(folder / "tiny-target"))
    first = request("a", prompts(110, (60,), 8)[0], N, gamma=0)
    rig.run([first])
    second = _again(first, "b")
    second.gamma = 4
    assert rig.run([second]) == _answers([first])
    assert second.num_cached_tokens == 56
    counts = counts_of([second])
    assert counts.num_accepted == counts.num_drafted > 0


# -- what must never be found ----------------------------------------------------------------


def test_serving_c1_rejected_drafts_are_never_shared(rig_for, plainly):
    """A draft that is always wrong fills blocks with garbage; prompts that continue with it find none of it."""
    rig = rig_for()
    first = request("a", prompts(110, (21,), 9)[0], 24)
    said = plainly([first])[0]
    wrong = next(token for token in range(3, 110) if token not in said)
    real = rig.engine.proposers.draft.propose

    def biased(requests: list[Sequence], gammas: list[int]) -> list[Any]:
        proposals = real(requests, gammas)
        for proposal in proposals:
            proposal.tokens = [wrong for _ in proposal.tokens]
        return proposals

    rig.engine.proposers.draft.propose = biased
    rig.engine.controller = FixedGamma(8)
    tail = []

    def join(step: int) -> None:
        if step in (2, 4, 6) and first.num_generated:
            guess = first.tokens + [wrong] * 8 + [5]
            tail.append(request(f"g{step}", guess, 12))
            rig.engine.submit(tail[-1])
            tail[-1].arrived_s = float(len(first.tokens))

    assert rig.run([first], join) == [said]
    assert counts_of([first]).num_accepted == 0 < counts_of([first]).num_drafted
    assert len(tail) == 3
    for item in tail:
        verified = int(item.arrived_s) - 1  # the last committed token was not in the cache yet
        assert 0 < item.num_cached_tokens <= verified
    assert _answers(tail) == plainly(tail)


def test_other_salts_share_nothing(rig_for, plainly):
    """A prompt is found under its own salt alone, and the answers are the same."""
    rig = rig_for()
    first = request("a", prompts(110, (40,), 10)[0], 12)
    expected = plainly([first])[0]
    for name, salt, cached in (("a", "", 0), ("b", "tenant", 0), ("c", "tenant", 32), ("d", "other", 0), ("e", "", 32)):
        item = _again(first, name)
        item.cache_salt = salt
        assert rig.run([item]) == [expected]
        assert item.num_cached_tokens == cached


def test_the_longest_unused_goes_first(rig_for):
    """Where blocks run out, an old prompt is forgotten from its end on and a recent one is found whole."""
    rig = rig_for(kv_tokens=208)
    old, recent, third, fourth = prompts(110, (60, 60, 60, 60), 11)
    again = []
    for prompt in (old, recent, third, recent, fourth, recent, old):
        again.append(request(f"w{len(again)}", prompt, 4))
        rig.run(again[-1:])
    assert [item.num_cached_tokens for item in again] == [0, 0, 0, 56, 0, 56, 32]


# -- positions the draft does not have -------------------------------------------------------


@pytest.mark.parametrize("length", [20, 63, 90])
def test_serving_v2_a_draft_with_less_context_than_the_target(folder, tmp_path, models_dir, plainly, length):
    """Beyond the draft's positions a request goes on plainly, with the same tokens, up to the server's own limit."""
    rig = build_rig(folder, tmp_path / "data", draft=str(models_dir), proposers=("draft",))
    rig.engine.controller = FixedGamma(4)
    assert rig.engine.proposers.draft.runner.model.config.max_position_embeddings == 64
    items = [request("v", prompts(110, (length,), 12)[0], ENGINE.max_model_len - length), *_family(12, 3)]
    assert rig.run(items) == plainly(items)
    assert len(items[0].tokens) == ENGINE.max_model_len
    assert (counts_of(items[:1]).num_drafted > 0) == (length < 64)
    beyond = ENGINE.max_model_len - max(64, length)
    assert beyond - 1 <= items[0].plain_rounds <= beyond
    rig.built.publisher.close()


@pytest.fixture(scope="module")
def models_dir(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target once more, as a draft model that knows 64 positions."""
    short = tmp_path_factory.mktemp("short") / "draft"
    shutil.copytree(folder / "tiny-target", short)
    config = (short / "config.json").read_text().replace(
        '"max_position_embeddings": 512', '"max_position_embeddings": 64'
    )  # fmt: skip
    (short / "config.json").write_text(config)
    return short
