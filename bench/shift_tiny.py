"""A tiny random pair for `bench.shift --quick`: small letters, and capitals that the draft guesses badly.

The target answers each half of the alphabet in kind: each has a hidden direction that no layer writes to.  The
draft is the target, disturbed by one rank a layer along the direction of capitals, so a LoRA can win back what
it loses there.  Everything follows from the seeds.  Called by `bench.shift`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from adapter.artifacts import file_sha256
from adapter.pairs import DRAFT_MANIFEST, DRAFT_TENSORS, DraftManifest, model_fingerprint
from bench.shift_prompts import Segment

SMALL, CAPITAL = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 2
_LAYERS = 3
_DEPTH, _NOISE, _BLOW = 8.0, 0.03, 0.3
_PROMPTS = 600


def write_pair(folder: Path) -> tuple[Path, Path]:
    """Write target and draft into a folder; return where they lie."""
    target, draft = folder / "tiny-target", folder / "tiny-draft"
    target.mkdir(parents=True)
    vocab = _write_tokenizer(target)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=_LAYERS, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.3,
        bos_token_id=1, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers[1:-1]:  # what lies between matters little, as in trained models
        layer.self_attn.o_proj.weight *= 0.3
        layer.mlp.down_proj.weight *= 0.3
    _separate(model, vocab)
    model.save_pretrained(target)
    _write_draft(draft, target, model)
    return target, draft


def segments(seed: int) -> tuple[Segment, Segment]:
    """Return words of small letters and words of capitals."""
    made = []
    for name, letters in (("small", SMALL), ("capital", CAPITAL)):
        pick = random.Random(f"{seed}:{name}")
        words = tuple("".join(pick.choices(letters, k=10)) for _ in range(_PROMPTS))
        third = _PROMPTS // 3
        made.append(Segment(name=name, learning=words[third:], measuring=words[:third], varied=False))
    return made[0], made[1]


def _write_tokenizer(folder: Path) -> dict[str, int]:
    hidden = {10: chr(256 + 10), 32: chr(256 + 32)}  # byte-level BPE's stand-ins for newline and space
    letters = [hidden.get(byte, chr(byte)) for byte in (10, *range(32, 127))]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[1], "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0], "unk_token": SPECIAL[0],
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END, "pad_token_id": 0}))
    return vocab


def _separate(model: Any, vocab: dict[str, int]) -> None:
    """Give each half of the alphabet an axis of its own, deeper than any layer can outweigh."""
    embedding = model.get_input_embeddings().weight
    embedding[:, :2] = 0.0
    for token, index in vocab.items():
        for axis, letters in enumerate((SMALL, CAPITAL)):
            embedding[index, axis] = _DEPTH if token in letters else 0.0
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight[:2] = 0.0


def _write_draft(folder: Path, target: Path, model: Any) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    weights = {"model.norm.weight": model.model.norm.weight.clone()}
    for index, layer in enumerate(model.model.layers):
        for name, weight in layer.state_dict().items():
            changed = weight.clone()
            if weight.dim() == 2:
                changed += _NOISE * torch.randn(weight.shape, generator=generator)
            if name in ("self_attn.v_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"):
                changed[:, 1] += _BLOW * torch.randn(weight.shape[0], generator=generator)
            weights[f"model.layers.{index}.{name}"] = changed.contiguous()
    save_file(weights, folder / DRAFT_TENSORS)
    manifest = DraftManifest(
        kind="pruned", layers=tuple(range(_LAYERS)), target_name=target.name,
        target_fingerprint=model_fingerprint(target), sha256=file_sha256(folder / DRAFT_TENSORS),
        licence="Apache-2.0", recipe={}, measured={},
    )  # fmt: skip
    (folder / DRAFT_MANIFEST).write_bytes(msgspec.json.encode(manifest))
