"""The lean forward: transformers' own logits, whatever the batch, the blocks or the history of the weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engine_rig import build_rig, prompts, request
from tiny_pair import write_pair
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kernels.packed_linear import PackedLinear, can_compile, can_pack, packing_works
from serving.engine import attention
from serving.engine.llama import lean_reason
from serving.engine.runner import Forwards, ModelRunner
from serving.engine.work import Work

SHAPE = {
    "vocab_size": 203, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILY: dict[str, tuple[type, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama3 with biases": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, head_dim=16, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=16)),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None, head_dim=16)),
}  # fmt: skip
WIDER = SHAPE | {"hidden_size": 64, "intermediate_size": 96}  # whole blocks of 32 inputs
FAMILY |= {f"heads of {dim}": (Qwen3ForCausalLM, Qwen3Config(**WIDER, head_dim=dim)) for dim in (32, 64, 96, 128, 256)}
HOW: dict[str, dict[str, Any]] = {
    "plain": {"pack": False}, "packed": {"compiled": False}, "compiled": {},
}  # fmt: skip
TABLES = {
    "consecutive": ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]),
    "scattered": ([9, 2, 30, 4, 25, 6, 1, 8, 3, 10], [13, 11, 12], [17, 5, 16, 7]),
}


needs_kernels = pytest.mark.skipif(not can_compile(), reason="no C kernels here; test_kernels_cpu.py says why")


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    attention.register()


def build(name: str) -> Any:
    """A random model of the family; norms and biases are not what they are initialised to."""
    kind, config = FAMILY[name]
    torch.manual_seed(11)
    model = kind(copy.deepcopy(config)).eval().requires_grad_(False)
    for key, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.add_(0.3 * torch.randn_like(weight)) if "norm" in key else weight.normal_(0, 0.3)
    return model


def runner(model: Any, forwards: Forwards) -> ModelRunner:
    return ModelRunner(model, attention.KVPool(model.config, 32, 8, model.dtype), forwards)


def stock_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


STEPS = (  # new tokens of three requests in one forward, and how many of their logits are wanted
    ((40, 1), (5, 5), (0, 0)),
    ((34, 0), (1, 1), (9, 2)),
    ((1, 1), (1, 1), (1, 1)),
    ((1, 1), (4, 4), (2, 1)),
    ((0, 0), (0, 0), (3, 0)),
    ((1, 1), (0, 0), (0, 0)),
    ((3, 3), (6, 6), (1, 1)),
)


def feed(used: ModelRunner, texts: list[list[int]], tables: tuple[list[int], ...]) -> list[list[torch.Tensor]]:
    """Run STEPS; return each text's wanted logits with their position."""
    done, heard = [0, 0, 0], [[], [], []]
    for step in STEPS:
        work, owners = [], []
        for i, (count, wanted) in enumerate(step):
            if count:
                work.append(Work(tables[i], done[i], texts[i][done[i] : done[i] + count], wanted))
                done[i] += count
                owners += [(i, done[i] - wanted + j) for j in range(wanted)]
        output = used.run(work)
        assert output.logits.shape[0] == len(owners)
        for (i, position), row in zip(owners, output.logits, strict=True):
            heard[i].append((position, row))
    return heard


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("how", HOW)
def test_logits_are_those_of_transformers(name, tables, how):
    """Ragged batches over prompt chunks, decoding and verification: within 5e-5, and the same argmax."""
    model = build(name)
    texts = prompts(203, (80, 17, 16))
    expected = [stock_logits(model, text) for text in texts]
    assert lean_reason(model) is None
    used = runner(model, forwards := Forwards(**HOW[how]))
    assert forwards.of(model) is not None
    for rows, own in zip(feed(used, texts, TABLES[tables]), expected, strict=True):
        assert rows
        for position, row in rows:
            torch.testing.assert_close(row, own[position], atol=5e-5, rtol=0)
            assert int(row.argmax()) == int(own[position].argmax())


@torch.inference_mode()
def _both(used: ModelRunner, work: Work) -> torch.Tensor:
    """Logits and states of the wanted rows, side by side."""
    states = used._states([work], used.model)
    return torch.cat([used.model.lm_head(states).float(), states.float()], 1)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama3 with biases", "heads of 32", "heads of 128"])
def test_states_are_the_same_bits_whatever_the_batch(name, dtype):
    """Alone, with batch mates, in chunks, one by one or in other blocks, by one thread or three: not a bit moves."""
    model = build(name).to(dtype)
    texts = prompts(203, (80, 17, 16))
    forwards, expected = Forwards(), []
    for text in texts:
        expected.append(_both(runner(model, forwards), Work(list(range(1, 12)), 0, text, len(text))))
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for tables in TABLES.values():
                used = runner(model, forwards)
                for rows, own in zip(feed(used, texts, tables), expected, strict=True):
                    for position, row in rows:
                        assert torch.equal(row, own[position, : len(row)])
                one_by_one = runner(model, forwards)
                for position, token in enumerate(texts[0][:40]):
                    heard = _both(one_by_one, Work(tables[0], position, [token], 1))
                    assert torch.equal(heard[0], expected[0][position])
        finally:
            torch.set_num_threads(before)


@needs_kernels
def test_what_does_not_fit_is_refused_before_anything_is_written():
    """Blocks that a context does not have, or a pool does not have, raise instead of reaching other memory."""
    model = build("qwen3")
    used = runner(model, Forwards())
    used.pool.keys[0].fill_(7.0)
    for table in ([3], [3, 32], [3, -1]):
        with pytest.raises(IndexError, match="block"):
            used.forward([Work(table, 0, [5] * 9, 1)])
    assert bool((used.pool.keys[0] == 7.0).all())
    narrow = attention.KVPool(model.config, 32, 8, torch.float16)
    with pytest.raises(ValueError, match="shapes and types"):
        ModelRunner(model, narrow, used.forwards).forward([Work([3, 4], 0, [5] * 9, 1)])


@pytest.mark.parametrize("tables", TABLES)
def test_a_long_batch_is_read_in_place_with_the_same_result(tables, monkeypatch):
    """Where all rows are long, rows of consecutive blocks are not gathered; nothing else changes."""
    monkeypatch.setattr(attention, "_IN_PLACE_TOKENS", 16)
    model = build("llama")
    texts = prompts(203, (80, 17, 16))
    expected = [stock_logits(model, text) for text in texts]
    forwards = Forwards(compiled=False)
    for rows, own in zip(feed(runner(model, forwards), texts, TABLES[tables]), expected, strict=True):
        for position, row in rows:
            torch.testing.assert_close(row, own[position], atol=5e-5, rtol=0)


def test_states_are_those_of_transformers():
    """What the head reads is the normed last hidden state of the wanted rows."""
    model = build("qwen2")
    text = prompts(203, (20,))[0]
    expected = model.model(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0, -3:]
    with torch.inference_mode():
        states = runner(model, Forwards())._states([Work([1, 2, 3], 0, text, 3)], model)
    torch.testing.assert_close(states, expected, atol=5e-5, rtol=0)


@pytest.mark.skipif(not packing_works(), reason="this CPU has no bfloat16 instructions to pack for")
@pytest.mark.parametrize("name", FAMILY)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(name):
    """Against float32 arithmetic on the same rounded weights: mean error at most 1.5 times transformers' own."""
    model = build(name).bfloat16()
    text = prompts(203, (60,))[0]
    exact, own = stock_logits(copy.deepcopy(model).float(), text), stock_logits(model, text)
    work = [Work([3, 1, 2, 7, 6, 5, 4, 8], 0, text, len(text))]
    lean = runner(model, Forwards()).forward(work)
    assert float((lean - exact).abs().mean()) <= 1.5 * float((own - exact).abs().mean())


# -- weights -----------------------------------------------------------------------------------


def test_the_models_parameters_are_the_fused_weights():
    """Nothing is held twice: the model's projections are views, and the model itself still works."""
    model = build("qwen3")
    text = prompts(203, (12,))[0]
    before = stock_logits(model, text)
    bytes_before = sum(item.numel() for item in model.parameters())
    runner(model, Forwards(pack=False))
    attention_part = model.model.layers[1].self_attn
    stores = {getattr(attention_part, f"{part}_proj").weight.untyped_storage().data_ptr() for part in "qkv"}
    assert len(stores) == 1
    held = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in model.parameters()}
    assert sum(held.values()) == 4 * bytes_before
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(stock_logits(model, text), before, atol=5e-5, rtol=0)


@pytest.mark.parametrize("how", HOW)
def test_weights_written_in_place_count_after_prepare(how):
    """Merging into a prepared model and preparing it again is all a swap takes."""
    model, other = build("llama"), build("llama")
    text = prompts(203, (10,))[0]
    used = runner(model, forwards := Forwards(**HOW[how]))
    lean = forwards.of(model)
    for part in (model, other):
        for layer in part.model.layers:
            for linear in (layer.self_attn.k_proj, layer.mlp.up_proj, layer.mlp.down_proj, layer.self_attn.o_proj):
                linear.weight.copy_(linear.weight.roll(1, 0) * 0.5)
    forwards.prepare(model)
    assert forwards.of(model) is lean
    logits = used.forward([Work([4, 5], 0, text, 10)])
    torch.testing.assert_close(logits, stock_logits(other, text), atol=5e-5, rtol=0)


def test_a_copy_owns_its_weights_and_shares_the_packed_head():
    """A slot copied from a prepared model changes alone; what both share is packed once."""
    model = build("llama")
    text = prompts(203, (10,))[0]
    expected = stock_logits(model, text)
    used = runner(model, forwards := Forwards())
    head = model.lm_head.weight
    slot = copy.deepcopy(model, {id(head): head})
    for layer in slot.model.layers:
        layer.mlp.gate_proj.weight.zero_()
    forwards.prepare(slot, like=model)
    work = [Work([4, 5], 0, text, 10)]
    torch.testing.assert_close(used.forward(work), expected, atol=5e-5, rtol=0)
    assert not torch.allclose(used.forward(work, model=slot), expected, atol=1e-2)
    if can_pack(torch.float32, compiled=True):
        assert isinstance(slot.lm_head, PackedLinear)
        kept = (model.lm_head.packed, model.lm_head.panels)
        assert any(part is not None for part in kept)
        assert (slot.lm_head.packed, slot.lm_head.panels) == kept


# -- which models ------------------------------------------------------------------------------


def odd_models() -> dict[str, Any]:
    windowed = MistralConfig(**SHAPE, sliding_window=64)
    activation = LlamaConfig(**SHAPE, hidden_act="gelu")
    stretched = LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    mixed = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=64, max_window_layers=1)
    return {
        "architecture": Phi3ForCausalLM(Phi3Config(**SHAPE, pad_token_id=0)),
        "window": MistralForCausalLM(windowed), "activation": LlamaForCausalLM(activation),
        "rotary": LlamaForCausalLM(stretched), "layers": Qwen2ForCausalLM(mixed),
    }  # fmt: skip


def test_what_the_lean_forward_does_not_know_is_left_to_transformers():
    """Each refusal names its reason."""
    for word, model in odd_models().items():
        assert word in str(lean_reason(model))
        assert Forwards().of(model) is None


def test_another_architecture_runs_through_transformers():
    """Logits of an architecture the lean forward does not know, over the same paged cache."""
    torch.manual_seed(5)
    model = Phi3ForCausalLM(Phi3Config(**SHAPE, pad_token_id=0)).eval().requires_grad_(False)
    texts = prompts(203, (80, 17, 16))
    expected = [stock_logits(model, text) for text in texts]
    for rows, own in zip(feed(runner(model, Forwards()), texts, TABLES["scattered"]), expected, strict=True):
        for position, row in rows:
            torch.testing.assert_close(row, own[position], atol=5e-5, rtol=0)


def test_the_setting_forces_transformers_and_no_token_changes(tmp_path):
    """`engine.lean`, `engine.pack` and `engine.compiled` change neither a greedy nor a sampled token."""
    write_pair(tmp_path)
    said = []
    for lean, pack, compiled in ((True, True, True), (True, True, False), (True, False, True), (False, False, True)):
        rig = build_rig(tmp_path, tmp_path / f"data{len(said)}", lean=lean, pack=pack, compiled=compiled)
        target = rig.engine.target
        assert (target.forwards.of(target.model) is not None) == lean
        ids = prompts(target.model.config.vocab_size, (5, 30, 12))
        samplings: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.0, "seed": 4}]
        requests = [request(str(i), ids[i], 24, gamma=3, **sampling) for i, sampling in enumerate(samplings)]
        said.append(rig.run(requests))
        rig.built.publisher.close()
    assert all(own == said[0] for own in said)
