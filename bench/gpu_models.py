"""Models for the GPU benchmark: the default pair at any width, and a random pair of a common shape.

Used by `bench.gpu`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from adapter.contracts import SettingsError
from bench.wider import wider, wider_config

SHIPPED = Path(__file__).resolve().parent.parent / "adapter" / "data" / "smollm2-135m-instruct"
DTYPE = torch.bfloat16

LARGE = {  # as Llama 3.1 8B has them
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
SMALL = {  # half a billion parameters, most of them the head
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 128256,
}  # fmt: skip
TINY_LARGE = {  # to try the program
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
TINY_SMALL = TINY_LARGE | {"num_hidden_layers": 1}


@dataclass(frozen=True, slots=True)
class PairOnDevice:
    """A target and its draft, in evaluation mode on one device."""

    name: str
    target: Any
    draft: Any


def check_target(folder: Path) -> None:
    """Refuse what is no folder of a model.

    Raises:
        SettingsError: it holds no configuration or no weights.
    """
    for needed in ("config.json", "*.safetensors"):
        if not any(folder.glob(needed)):
            raise SettingsError(f"{folder} holds no {needed}; expected the folder of a SmolLM2-135M-Instruct model")


def widened(folder: Path, times: int, device: torch.device) -> PairOnDevice:
    """Load the model of a folder, widened, and the shipped draft of the narrow one.

    Raises:
        SettingsError: the folder holds no such model.
    """
    check_target(folder)
    narrow = {name: tensor.to(DTYPE) for path in sorted(folder.glob("*.safetensors")) for name, tensor in _read(path)}
    config = json.loads((folder / "config.json").read_text())
    weights = {name: wider(name, tensor.to(device), times) for name, tensor in narrow.items()}
    embedding = narrow["model.embed_tokens.weight"].to(device)
    if "lm_head.weight" not in weights:
        weights["lm_head.weight"] = wider("lm_head.weight", embedding, times)
    target = _filled(_config(wider_config(config, times)), weights, device)
    return PairOnDevice(f"SmolLM2-135M-Instruct widened {times}x", target, shipped_draft(config, embedding, device))


def shipped_draft(config: dict[str, Any], embedding: torch.Tensor, device: torch.device) -> Any:
    """Load the draft that ships with the project; embedding and head are the narrow target's."""
    manifest = json.loads((SHIPPED / "manifest.json").read_text())
    weights = {name: tensor.to(device, DTYPE) for name, tensor in _read(SHIPPED / "draft.safetensors")}
    weights |= {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    return _filled(_config(config | {"num_hidden_layers": len(manifest["layers"])}), weights, device)


def random_pair(device: torch.device, target: dict[str, int], draft: dict[str, int], seed: int = 0) -> PairOnDevice:
    """Build a pair of these shapes with random weights: it costs what a real one costs and says nothing."""
    torch.manual_seed(seed)
    models = []
    for shape in (target, draft):
        config = LlamaConfig(**shape, max_position_embeddings=8192, tie_word_embeddings=False)
        with torch.device(device):
            models.append(AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval().requires_grad_(False))
    billions = sum(item.numel() for item in models[0].parameters()) / 1e9
    return PairOnDevice(f"random weights, {billions:.1f} B parameters", *models)


def _read(path: Path) -> list[tuple[str, torch.Tensor]]:
    return list(load_file(path).items())


def _config(values: dict[str, Any]) -> Any:
    known = {name: value for name, value in values.items() if name not in ("torch_dtype", "dtype", "architectures")}
    return AutoConfig.for_model(**known)


def _filled(config: Any, weights: dict[str, torch.Tensor], device: torch.device) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    model.load_state_dict(weights, strict=True, assign=True)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval().requires_grad_(False)
