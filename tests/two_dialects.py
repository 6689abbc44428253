"""A tiny target that keeps to the dialect of its prompt, and a draft that knows only one of the two.

Small letters answer small letters, capitals answer capitals: each half of the alphabet has a hidden
direction of its own that no layer writes to.  The draft is the target, slightly disturbed everywhere
and badly along the direction of the capitals, by one rank a layer: so its acceptance falls when
capitals arrive, and a LoRA can win it back.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from tiny_pair import LAYERS, write_target
from transformers import LlamaForCausalLM

from adapter.artifacts import file_sha256
from adapter.pairs import DRAFT_MANIFEST, DRAFT_TENSORS, DraftManifest, model_fingerprint

SMALL = "abcdefghijklmnopqrstuvwxyz"
CAPITAL = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SMALL_AXIS, _CAPITAL_AXIS = 0, 1
_DEPTH = 8.0  # how far a token lies along its dialect's direction: a layer cannot outweigh it
_NOISE = 0.03
_BLOW = 0.3


def write_dialects(folder: Path) -> tuple[Path, Path]:
    """Write the target and its one-sided draft; return both folders."""
    target, draft = folder / "dialects-target", folder / "dialects-draft"
    model = write_target(target)
    _separate(model, json.loads((target / "tokenizer.json").read_text())["model"]["vocab"])
    model.save_pretrained(target)
    _write_draft(draft, target, model)
    return target, draft


def small_prompt(pick: random.Random) -> str:
    """A prompt of small letters."""
    return "".join(pick.choices(SMALL, k=10))


def capital_prompt(pick: random.Random) -> str:
    """A prompt of capitals."""
    return "".join(pick.choices(CAPITAL, k=10))


def _separate(model: LlamaForCausalLM, vocab: dict[str, int]) -> None:
    embedding = model.get_input_embeddings().weight
    embedding[:, [_SMALL_AXIS, _CAPITAL_AXIS]] = 0.0
    for token, index in vocab.items():
        embedding[index, _SMALL_AXIS if set(token) <= set(SMALL) else _CAPITAL_AXIS] = (
            _DEPTH if set(token) <= set(SMALL) or set(token) <= set(CAPITAL) else 0.0
        )
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight[[_SMALL_AXIS, _CAPITAL_AXIS]] = 0.0


def _write_draft(folder: Path, target: Path, model: LlamaForCausalLM) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    weights = {"model.norm.weight": model.model.norm.weight.clone()}
    for index, layer in enumerate(model.model.layers):
        for name, weight in layer.state_dict().items():
            changed = weight.clone()
            if weight.dim() == 2:
                changed += _NOISE * torch.randn(weight.shape, generator=generator)
            if name in ("self_attn.v_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"):
                changed[:, _CAPITAL_AXIS] += _BLOW * torch.randn(weight.shape[0], generator=generator)
            weights[f"model.layers.{index}.{name}"] = changed.contiguous()
    save_file(weights, folder / DRAFT_TENSORS)
    manifest = DraftManifest(
        kind="pruned", layers=tuple(range(LAYERS)), target_name=target.name,
        target_fingerprint=model_fingerprint(target), sha256=file_sha256(folder / DRAFT_TENSORS),
        licence="Apache-2.0", recipe={}, measured={},
    )  # fmt: skip
    (folder / DRAFT_MANIFEST).write_bytes(msgspec.json.encode(manifest))
