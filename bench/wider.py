"""What widening does to one tensor, and to a configuration; `bench.widen` says why.  Pure."""

from __future__ import annotations

from typing import Any

import torch

from adapter.contracts import SettingsError

_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def wider(name: str, weight: torch.Tensor, times: int) -> torch.Tensor:
    """Return one tensor of the model as the wide model has it.

    Raises:
        SettingsError: no Llama-shaped model has a tensor of this name.
    """
    kind = name.rsplit(".", 2)[-2]
    if kind in ("q_norm", "k_norm"):  # inside a head, and heads keep their size
        return weight
    if kind == "embed_tokens":
        return weight.repeat(1, times)
    if kind == "lm_head":
        return weight.repeat(1, times) / times
    if kind == "norm" or kind.endswith("layernorm") or name.endswith(".bias"):
        return weight.repeat(times)
    if kind.endswith("_proj") and weight.dim() == 2:
        return weight.repeat(times, times) / times
    raise SettingsError(f"tensor {name!r} is not part of a Llama-shaped model; it cannot be widened")


def wider_config(config: dict[str, Any], times: int) -> dict[str, Any]:
    """Return the configuration of the wide model."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    sizes = config | {"num_key_value_heads": kv_heads}
    wide = {name: sizes[name] * times for name in _SIZES}
    return config | wide | {"head_dim": head_dim, "tie_word_embeddings": False}
