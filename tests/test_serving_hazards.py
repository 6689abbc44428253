"""Failures that speculation engines are known for, by their ids; docs/hazards.md lists where each is tested."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from control_simulator import controller, gpu_table
from engine_rig import MIXED, Changing, Rig, build_rig, counts_of, plain, plain_each, prompts, request, requests_for
from reachable import names_within
from tiny_pair import pair_settings
from transformers import LlamaForCausalLM

from adapter.contracts import Sampling, SettingsError
from adapter.models import prepare_pair
from serving.engine.control.fixed import FixedGamma

N = 30
SEEDED = [{"temperature": 1.0, "seed": seed} for seed in range(8)]


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / "tiny-target").eval()


@pytest.fixture(scope="module")
def ids(model: LlamaForCausalLM) -> list[list[int]]:
    return prompts(model.config.vocab_size)


@pytest.fixture(scope="module")
def said(model: LlamaForCausalLM, ids: list[list[int]]) -> list[list[int]]:
    return plain_each(model, ids, SEEDED, N)


@pytest.fixture
def rig(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """An engine of its own; indirect parameters are engine settings."""
    rig = build_rig(folder, tmp_path, **getattr(request, "param", {}))
    rig.engine.controller = FixedGamma(3)
    yield rig
    rig.built.publisher.close()


def test_serving_a2_what_nobody_wrote_never_reaches_a_result(rig, ids, said):
    """Blocks start full of huge numbers; padded rows, block 0 and unwritten slots still weigh nothing."""
    for runner in (rig.engine.target, rig.engine.proposers.draft.runner):
        for tensor in (*runner.pool.keys, *runner.pool.values):
            tensor.fill_(1e30)
    rig.engine.controller = Changing(2)
    assert rig.run(requests_for(ids, SEEDED, N)) == said


def test_serving_a_broken_cache_ends_its_request_alone(rig, ids, said):
    """NaN in one request's cache ends that one with `error`; nobody else, later or at once, notices.

    Its blocks can no longer be found by their text, and are clean when they are given away again.
    """
    rig.engine.controller = Changing(4)
    pool = rig.engine.target.pool
    for layer in (0, 1):
        items = requests_for(ids, SEEDED, N, prefix=f"{layer}-")
        bad = items[4]
        for item in items:
            rig.engine.submit(item)
        for _ in range(3):
            rig.engine.step()
        where = layer * (bad.num_target_kv - 1)  # in its first block, which is shared by text, and in its last
        pool.token_values[layer][bad.block_table[where // 8] * 8 + where % 8] = float("nan")
        rig.run([])
        assert bad.finish_reason == "error"
        assert bad.num_generated < N
        answers = [item.tokens[item.prompt_tokens :] for item in items]
        assert answers[:4] + answers[5:] == said[:4] + said[5:]
        assert all(bool(tensor.isfinite().all()) for tensor in (*pool.keys, *pool.values))
        assert rig.run(requests_for(ids, SEEDED, N, prefix=f"again-{layer}-")) == said
    assert rig.engine.stats.not_finite == 2
    assert rig.engine.stats.finished_by_reason["error"] == 2


def test_serving_a_broken_target_publishes_nothing(rig, ids):
    """With NaN in the target's weights every request ends with `error` and no token, and no block is cached."""
    norm = rig.engine.target.model.model.norm
    with torch.no_grad():
        norm.weight[0] = float("nan")
    items = requests_for(ids, SEEDED, N)
    assert rig.run(items) == [[] for _ in ids]
    assert {item.finish_reason for item in items} == {"error"}
    assert not rig.log.blocks
    assert not rig.engine.scheduler.pool.num_cached


@pytest.mark.parametrize("rig", [{"prefill_tokens": 16}], indirect=True)
def test_serving_a2_a_broken_prompt_that_nobody_judged_is_emptied(rig, model):
    """A prompt broken in its first part and cancelled before its last leaves neither NaN nor a cached block."""
    pool = rig.engine.target.pool
    item = request("long", prompts(model.config.vocab_size, (100,), 4)[0], N)
    rig.engine.submit(item)
    for _ in range(3):
        rig.engine.step()
    assert rig.engine.scheduler.pool.num_cached
    pool.token_values[0][item.block_table[0] * 8 + 3] = float("nan")
    rig.engine.step()
    assert item.num_generated == 0 < item.num_target_kv < 99
    rig.engine.end("long", "cancelled")
    assert all(bool(tensor.isfinite().all()) for tensor in (*pool.keys, *pool.values))
    assert not rig.engine.scheduler.pool.num_cached


def test_serving_a4_nothing_remembers_a_request_that_ended(rig, ids):
    """After requests ended, or were cancelled waiting, reading and decoding, no part of the engine holds their name."""
    rig.engine.controller = controller(gpu_table(), seed=1, explore_share=1.0)
    items = [item for turn in range(4) for item in requests_for(ids, SEEDED, N, prefix=f"leak-{turn}-")]
    for item in items:
        rig.engine.submit(item)
    for step in range(12):
        rig.engine.step()
        assert "leak-" in "".join(names_within(rig.built)), "the test would not notice"
        for item in (items[step], items[-1 - step]):
            rig.engine.end(item.request_id, "cancelled")
    rig.run([])
    rig.log.blocks.clear()
    rig.log.outcomes.clear()
    del items, item
    rig.run([request("after", ids[0], 2)])
    assert not [name for name in names_within(rig.built) if "leak-" in name]


@pytest.mark.parametrize("rig", [{"prefill_tokens": 16}], indirect=True)
def test_serving_a3_steps_that_deliver_nothing_do_not_stall(rig, model):
    """A prompt read over several steps delivers nothing meanwhile, and then its whole answer."""
    prompt = prompts(model.config.vocab_size, (100,), 4)[0]
    item = request("long", prompt, N)
    rig.engine.submit(item)
    silent = 0
    while not (heard := rig.engine.step()):
        silent += 1
        assert rig.engine.busy
        assert silent < 20
    assert silent >= 5, "100 tokens at 16 a step take seven steps, the last of which says something"
    assert heard[0].request_id == "long"
    rig.run([])
    assert item.tokens[len(prompt) :] == plain(model, prompt, N, Sampling(temperature=0.0))


@pytest.mark.parametrize("rig", [{"max_model_len": 500, "kv_tokens": 1024}], indirect=True)
def test_serving_q1_acceptance_does_not_die_with_position(folder, tmp_path, model, rig):
    """The target as its own draft is right at every position up to the last one the model has."""
    own = build_rig(
        folder, tmp_path / "own", draft=str(folder / "tiny-target"), exact=True, max_model_len=512, kv_tokens=1024
    )
    own.engine.controller = FixedGamma(5)
    item = request("q", prompts(model.config.vocab_size, (12,), 3)[0], 500)
    own.run([item])
    own.built.publisher.close()
    counts = counts_of([item])
    assert item.num_generated == 500
    assert counts.num_accepted == counts.num_drafted
    # Only where the draft's positions end may a round run without it.
    assert counts.num_rounds >= 500 // 6
    assert item.plain_rounds <= 5


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
def test_serving_q1_d2_d4_a_draft_equal_to_its_target_is_never_rejected(folder, tmp_path, model, coupling):
    """Eight mixed requests at once, three waves: each row is judged by its own law, in the precision it was drawn in.

    The third wave, after 500 tokens and as many positions of the caches used twice, does as well as the first.
    """
    own = build_rig(
        folder, tmp_path, draft=str(folder / "tiny-target"), exact=True, coupling=coupling, prefix_cache=False
    )
    own.engine.controller = FixedGamma(4)
    ids = prompts(model.config.vocab_size)
    for wave in range(3):
        items = requests_for(ids, MIXED, N, prefix=f"{wave}-")
        own.run(items)
        counts = counts_of(items)
        assert counts.num_drafted >= 8 * N // 2
        assert counts.num_accepted == counts.num_drafted
    own.built.publisher.close()


def test_adapter_v1_another_token_map_is_refused(folder, tmp_path):
    """A draft of the same shape and size whose tokenizer swaps two ids is refused by name, before it is loaded."""
    draft = tmp_path / "draft"
    shutil.copytree(folder / "tiny-target", draft)
    path = draft / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(SettingsError, match="map tokens to ids differently"):
        prepare_pair(pair_settings(folder, tmp_path / "data", draft=str(draft)))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}, "sliding window"),
        (
            {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True,
             "sliding_window": 64, "max_window_layers": 1},
            "sliding window",
        ),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layers of kind linear_attention"),
    ],
)  # fmt: skip
def test_serving_k5_caches_that_cannot_be_rolled_back_are_refused(folder, tmp_path, change, word):
    """A target whose layers keep a window or a state instead of all positions is refused by name at start."""
    target = tmp_path / "tiny-target"
    shutil.copytree(folder / "tiny-target", target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SettingsError, match=word):
        build_rig(tmp_path, tmp_path / "data", draft="none")


def test_serving_s4_ignoring_end_tokens_reaches_max_tokens(rig, ids, said):
    """Without end tokens an answer runs to its limit, whatever the draft proposes."""
    token = said[0][5]
    ended = request("e", ids[0], N, temperature=1.0, seed=0, ends=[token])
    ignored = request("i", ids[0], N, temperature=1.0, seed=0)
    assert rig.run([ended, ignored]) == [said[0][: said[0].index(token) + 1], said[0]]
    assert (ended.finish_reason, ignored.finish_reason) == ("stop", "length")


def test_serving_n4_the_rate_is_over_what_was_really_drafted(rig, ids):
    """With a draft length that changes every round, drafted and examined are counted round by round."""
    controller = Changing(7)
    rig.engine.controller = controller
    drafted: list[int] = []
    examined: list[int] = []

    def note(step: int) -> None:
        if step:
            rounds = [item for item in controller.report.rounds if item.proposer == "draft" and item.num_drafted]
            drafted.extend(item.num_drafted for item in rounds)
            examined.extend(min(item.num_accepted + 1, item.num_drafted) for item in rounds)

    items = requests_for(ids, SEEDED, N)
    rig.run(items, note)
    note(1)
    counts = counts_of(items)
    assert (counts.num_drafted, counts.num_examined) == (sum(drafted), sum(examined))
    assert counts.num_examined < counts.num_drafted
