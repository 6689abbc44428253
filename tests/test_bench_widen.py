"""A widened target says exactly what the narrow one says, and works as an ordinary target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_rig import build_rig, prompts, reference_models, request
from tiny_pair import pair_settings, write_pair
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config

from adapter.contracts import SettingsError
from adapter.models import prepare_pair
from bench.widen import export_draft, widen, widened_pair

SHAPE = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
}  # fmt: skip
KINDS = {
    "llama": lambda **more: LlamaConfig(**SHAPE, **more),
    "llama_one_kv_head": lambda **more: LlamaConfig(**(SHAPE | {"num_key_value_heads": 1}), **more),
    "llama_wide_heads": lambda **more: LlamaConfig(**SHAPE, head_dim=8, attention_bias=True, mlp_bias=True, **more),
    "qwen2": lambda **more: Qwen2Config(**SHAPE, **more),  # biases on q, k and v
    "qwen3": lambda **more: Qwen3Config(**(SHAPE | {"head_dim": 8}), **more),  # norms inside the heads
}


def random_model(folder: Path, kind: str, tied: bool) -> torch.nn.Module:
    """Write a random model whose every tensor, norms and biases included, is far from its usual start."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(KINDS[kind](tie_word_embeddings=tied)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_widened_model_gives_the_same_logits(tmp_path: Path, kind: str, times: int, tied: bool) -> None:
    """Logits agree within 1e-4 in float32 and every argmax is equal, over 4 x 60 random tokens."""
    narrow = random_model(tmp_path / "narrow", kind, tied)
    wide = AutoModelForCausalLM.from_pretrained(widen(tmp_path / "narrow", tmp_path / "wide", times)).eval()
    tokens = torch.randint(0, SHAPE["vocab_size"], (4, 60), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        before, after = narrow(tokens).logits, wide(tokens).logits

    assert before.std() > 0.1
    assert float((before - after).abs().max()) < 1e-4
    assert torch.equal(before.argmax(-1), after.argmax(-1))


def test_a_widened_model_has_n_times_the_width_and_heads(tmp_path: Path) -> None:
    """Hidden size, FFN, heads and key heads grow n times; head size, layers and vocabulary do not."""
    random_model(tmp_path / "narrow", "llama", True)
    config = LlamaForCausalLM.from_pretrained(widen(tmp_path / "narrow", tmp_path / "wide", 3)).config

    assert (72, 120, 18, 6) == (
        config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads
    )  # fmt: skip
    assert (4, 2, 97) == (config.head_dim, config.num_hidden_layers, config.vocab_size)
    assert not config.tie_word_embeddings


def test_models_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    """A model whose norms or residuals work differently is named and refused, and so is a factor below one."""
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(SettingsError, match="'gemma2' model; only llama"):
        widen(tmp_path, tmp_path / "wide", 2)
    with pytest.raises(SettingsError, match="times = 0"):
        widen(tmp_path, tmp_path / "wide", 0)


def test_the_exported_draft_says_what_the_pruned_one_says(tmp_path: Path) -> None:
    """A draft written as a complete model gives the logits of the pruned one, bit for bit."""
    write_pair(tmp_path)
    settings = pair_settings(tmp_path, tmp_path / "data")
    _, pruned = reference_models(prepare_pair(settings))
    whole = AutoModelForCausalLM.from_pretrained(export_draft(prepare_pair(settings), tmp_path / "whole")).eval()
    tokens = torch.tensor([[3, 9, 27, 81, 5, 40]])

    assert torch.equal(pruned(tokens).logits, whole(tokens).logits)


def test_a_widened_pair_serves_like_the_narrow_one(tmp_path: Path) -> None:
    """The engine takes both folders by path; text and acceptance are those of the narrow pair."""
    write_pair(tmp_path)
    narrow = build_rig(tmp_path, tmp_path / "data")
    target, draft = widened_pair(narrow.pair, 2, tmp_path / "made")
    assert (target, draft) == widened_pair(narrow.pair, 2, tmp_path / "made")
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide/tiny-target").symlink_to(target)
    wide = build_rig(tmp_path / "wide", tmp_path / "data2", draft=str(draft))
    said, accepted = [], []
    for rig in (narrow, wide):
        requests = [request(str(i), prompt, gamma=3) for i, prompt in enumerate(prompts(97))]
        said.append(rig.run(requests))
        accepted.append([sum(counts.num_accepted for counts in item.by_version.values()) for item in requests])

    assert said[0] == said[1]
    assert sum(accepted[0]) > 50
    assert accepted[0] == accepted[1]
    assert wide.pair.target_fingerprint != narrow.pair.target_fingerprint
