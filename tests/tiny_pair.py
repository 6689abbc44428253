"""A tiny random Llama with a real byte-level tokenizer on disk, a pruned draft for it, and LoRA artifacts.

Everything follows from the seeds.  The text is nonsense, but tokens, templates, caches, drafts and
artifacts are the real thing, so a test that passes here says something about the real pair.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

from adapter import artifacts
from adapter.artifacts import file_sha256
from adapter.pairs import DRAFT_MANIFEST, DRAFT_TENSORS, DraftManifest, Pair, expected_tensors, model_fingerprint
from adapter.sections import EngineSettings
from adapter.settings import Settings

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 2
MERGES = ("t h", "th e", "i n", "a n", "e r", "o n", "Ġ the", "in g", "an d", "r e", "u s", "us er", "a s")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAYERS = 3
KEPT = (0, 2)
ENGINE = EngineSettings(
    max_batch=8, max_model_len=192, kv_tokens=2048, block_tokens=8, prefill_tokens=64, gamma=3, gamma_max=8, threads=1,
    swap_poll_s=0.02, controller="fixed",
)  # fmt: skip


def _byte_symbols() -> dict[int, str]:
    """The printable stand-ins of byte-level BPE, for ASCII and the bytes of é, € and 🙂."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return {byte: table[byte] for byte in [10, *range(32, 127), *sorted(set("é€🙂".encode()))]}


def write_tokenizer(folder: Path) -> Tokenizer:
    """Write tokenizer.json, its config and a chat template; return the tokenizer."""
    tokens = [*SPECIAL, *_byte_symbols().values(), *(merge.replace(" ", "") for merge in MERGES)]
    pairs: Any = [tuple(merge.split(" ")) for merge in MERGES]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[1], "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0], "unk_token": SPECIAL[0],
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END, "pad_token_id": 0}))
    return tokenizer


def write_spaced_tokenizer(folder: Path, decoder: Any = None) -> Tokenizer:
    """Write a tokenizer that spells spaces as ▁ and bytes as <0xE2>, and drops a text's first space, as Llama 2's does.

    Its special tokens are `<s>` and `</s>`; texts are encoded letter by letter, with `<s>` before them.
    """
    told = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *told, *"▁abcdef.é", "▁▁", "▁the", "▁Paris"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write_target(
    folder: Path, *, seed: int = 0, spread: float = 0.3, layers: int = LAYERS, brevity: float = 1.0
) -> LlamaForCausalLM:
    """Write a random target with its tokenizer; return the model.  More `brevity` ends turns sooner."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    vocab = len(SPECIAL) + len(_byte_symbols()) + len(MERGES)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=spread,
        bos_token_id=1, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.model.embed_tokens.weight[END] *= brevity
    for layer in model.model.layers[1:-1]:  # what a draft leaves out matters little, as in trained models
        layer.self_attn.o_proj.weight *= 0.3
        layer.mlp.down_proj.weight *= 0.3
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_draft(folder: Path, target: Path, model: LlamaForCausalLM, *, noise: float = 0.02) -> None:
    """Write a pruned draft: some of the target's layers, slightly disturbed."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    weights = {"model.norm.weight": model.model.norm.weight.clone()}
    for new, old in enumerate(KEPT):
        for name, weight in model.model.layers[old].state_dict().items():
            disturbed = weight + noise * torch.randn(weight.shape, generator=generator) if weight.dim() == 2 else weight
            weights[f"model.layers.{new}.{name}"] = disturbed.contiguous().clone()
    save_file(weights, folder / DRAFT_TENSORS)
    manifest = DraftManifest(
        kind="pruned", layers=KEPT, target_name=target.name, target_fingerprint=model_fingerprint(target),
        sha256=file_sha256(folder / DRAFT_TENSORS), licence="Apache-2.0", recipe={}, measured={},
    )  # fmt: skip
    (folder / DRAFT_MANIFEST).write_bytes(msgspec.json.encode(manifest))


def write_pair(folder: Path) -> tuple[Path, Path]:
    """Write a target and its pruned draft; return both folders."""
    target, draft = folder / "tiny-target", folder / "tiny-draft"
    write_draft(draft, target, write_target(target))
    return target, draft


def pair_settings(folder: Path, data: Path, *, draft: str | None = None, **more: Any) -> Settings:
    """Settings that serve the pair written into `folder`; `engine` fields override `ENGINE`."""
    engine = ENGINE.model_copy(update=more.pop("engine", {}))
    return Settings(
        target=str(folder / "tiny-target"), draft=draft or str(folder / "tiny-draft"), data_dir=data,
        cache_dir=folder / "cache", engine=engine, **more,
    )  # fmt: skip


def endless_prompt(target: Path, max_tokens: int) -> str:
    """A prompt that greedy decoding answers with `max_tokens` tokens and no end token among them."""
    model = LlamaForCausalLM.from_pretrained(target).eval()
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    for word in ("the", "and", "thing", "user", "in", "on", "er", "as", "re", "us"):
        ids = torch.tensor([tokenizer.encode(word).ids])
        said = model.generate(ids, max_new_tokens=max_tokens, do_sample=False, eos_token_id=END, pad_token_id=0)
        if said.shape[1] - ids.shape[1] == max_tokens:
            return word
    raise AssertionError("every prompt ends")


def random_factors(pair: Pair, *, rank: int = 4, seed: int = 0, size: float = 0.3) -> dict[str, torch.Tensor]:
    """Random LoRA factors of the right shapes, large enough to change what the draft says."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(shape, generator=generator) / (rank**0.5 if name.endswith("B") else 1)
        for name, shape in expected_tensors(pair, rank).items()
    }


def store_artifact(
    root: Path, pair: Pair, factors: dict[str, torch.Tensor], *, rank: int = 4, scale: float = 1.0, **claims: Any
) -> artifacts.Manifest:
    """Put factors into the artifact store as the trainer would; `claims` override fingerprints."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"new-{os.getpid()}-{time.monotonic_ns()}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in factors.items()}, path)
    claims = {"target_fingerprint": pair.target_fingerprint, "base_fingerprint": pair.base_fingerprint, **claims}
    return artifacts.store(root, path, rank=rank, scale=scale, trained_on={}, created_at_s=0.0, **claims)
