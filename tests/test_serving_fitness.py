"""Models the engine would get wrong are refused at start, by name, and never served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_rig import build_rig, prompts, request
from tiny_pair import END, write_tokenizer
from transformers import AutoModelForCausalLM, CohereConfig, GPT2Config, GraniteConfig, LlamaConfig, PreTrainedConfig

from adapter.contracts import SettingsError
from serving.engine import attention

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": END, "pad_token_id": 0,
}  # fmt: skip


def write_model(folder: Path, config: PreTrainedConfig) -> None:
    """Write a random model of this configuration, with the tiny pair's tokenizer, as `tiny-target`."""
    target = folder / "tiny-target"
    target.mkdir(parents=True)
    config.vocab_size = write_tokenizer(target).get_vocab_size()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**SHAPE, tie_word_embeddings=True, logits_scaling=8.0),
        CohereConfig(**SHAPE, tie_word_embeddings=True, logit_scale=0.25),
    ],
)
def test_logits_changed_after_the_head_are_refused(tmp_path, config):
    """A target that scales its logits would be sampled at another temperature; it is refused by its type."""
    write_model(tmp_path, config)
    with pytest.raises(SettingsError, match=f"'{config.model_type}' does more to its logits"):
        build_rig(tmp_path, tmp_path / "data", draft="none")


def test_a_granite_that_scales_nothing_is_served(tmp_path):
    """The same architecture with a scale of one is served: the refusal is about logits, not about names."""
    write_model(tmp_path, GraniteConfig(**SHAPE, tie_word_embeddings=True, logits_scaling=1.0))
    rig = build_rig(tmp_path, tmp_path / "data", draft="none")
    assert len(rig.run([request("r", prompts(100)[0], 5)])[0]) == 5
    rig.built.publisher.close()


def test_capped_logits_are_refused(tmp_path):
    """A cap may change small logits hardly at all, so it is refused by its name in the configuration."""
    write_model(tmp_path, LlamaConfig(**SHAPE, tie_word_embeddings=True, final_logit_softcapping=30.0))
    with pytest.raises(SettingsError, match="final_logit_softcapping"):
        build_rig(tmp_path, tmp_path / "data", draft="none")


@pytest.mark.parametrize("extra", [{"softcap": 50.0}, {"s_aux": torch.zeros(4)}])
def test_attention_that_is_not_plain_is_refused(extra: dict[str, Any]):
    """Capped attention scores and attention sinks raise instead of being left out."""
    with pytest.raises(SettingsError, match="softcap"):
        attention.paged_attention(
            torch.nn.Linear(1, 1), torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), None,
            paged=None, **extra,
        )  # fmt: skip


def test_a_model_not_shaped_like_llama_is_refused(tmp_path):
    """A configuration without key-value heads is refused by its type and by what it lacks."""
    write_model(tmp_path, GPT2Config(n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=END))
    with pytest.raises(SettingsError, match="'gpt2' says nothing of num_key_value_heads"):
        build_rig(tmp_path, tmp_path / "data", draft="none")


def test_a_gpu_that_is_there_changes_nothing(folder, tmp_path, monkeypatch):
    """Nothing is placed on a GPU yet, so packing and the draft's dtype follow the CPU, with or without one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    kinds = []
    for present in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        for exact in (False, True):
            rig = build_rig(folder, tmp_path / f"{present}{exact}", exact=exact)
            kinds.append((_kinds(rig), rig.engine.target.forwards._pack))
            rig.built.publisher.close()
    assert kinds[:2] == kinds[2:]


def _kinds(rig: Any) -> list[set[str]]:
    runners = (rig.engine.target, rig.engine.proposers.draft.runner)
    return [
        {type(module).__name__ for module in runner.model.modules()} | {str(runner.model.dtype)} for runner in runners
    ]
