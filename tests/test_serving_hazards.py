"""Failures that speculation engines are known for, by their ids; docs/hazards.md lists where each is tested."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_rig import Changing, Rig, build_rig, counts_of, plain, prompts, request
from tiny_pair import pair_settings, write_pair
from transformers import LlamaForCausalLM

from adapter.contracts import Sampling, SettingsError
from adapter.models import prepare_pair
from serving.engine import build
from serving.engine.control.fixed import FixedGamma

N = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / "tiny-target").eval()


@pytest.fixture(scope="module")
def ids(model: LlamaForCausalLM) -> list[list[int]]:
    return prompts(model.config.vocab_size)


@pytest.fixture(scope="module")
def said(model: LlamaForCausalLM, ids: list[list[int]]) -> list[list[int]]:
    return [plain(model, prompt, N, Sampling(temperature=1.0, seed=i)) for i, prompt in enumerate(ids)]


@pytest.fixture
def rig(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """An engine of its own; indirect parameters are engine settings."""
    rig = build_rig(folder, tmp_path, **getattr(request, "param", {}))
    rig.engine.controller = FixedGamma(3)
    yield rig
    rig.built.publisher.close()


def _sampled(ids: list[list[int]]) -> list[Any]:
    return [
        request(str(i), prompt, N, temperature=1.0, seed=i, arrived_s=float(i)) for i, prompt in enumerate(ids)
    ]  # fmt: skip


def test_serving_a2_what_nobody_wrote_never_reaches_a_result(rig, ids, said):
    """Blocks start full of huge numbers; padded rows, block 0 and unwritten slots still weigh nothing."""
    for runner in (rig.engine.target, rig.engine.proposers.draft.runner):
        for tensor in (*runner.pool.keys, *runner.pool.values):
            tensor.fill_(1e30)
    rig.engine.controller = Changing(2)
    assert rig.run(_sampled(ids)) == said


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
def test_serving_q1_acceptance_does_not_die_with_position(folder, tmp_path, model, monkeypatch, rig):
    """The target as its own draft is right at every position up to the last one the model has."""
    monkeypatch.setattr(build, "packing_works", lambda: False)
    own = build_rig(
        folder, tmp_path / "own", draft=str(folder / "tiny-target"), max_model_len=512, kv_tokens=1024
    )  # fmt: skip
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

    items = _sampled(ids)
    rig.run(items, note)
    note(1)
    counts = counts_of(items)
    assert (counts.num_drafted, counts.num_examined) == (sum(drafted), sum(examined))
    assert counts.num_examined < counts.num_drafted
