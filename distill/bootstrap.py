"""Make a day-0 draft for a Llama-shaped target: prune layers, distil on text the target writes itself.

No data set is needed.  Three phases, each resumable: the target writes chats into numbered shards
and notes its law beside every token; a copy of its first layers and its last one is trained on
them; the result is scored on a shard it never saw and written with a manifest.  Everything follows
from the seed and the recipe.  Called by `draftsmith bootstrap`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface

from adapter.artifacts import file_sha256
from adapter.contracts import SettingsError
from adapter.models import attach_shared, empty_draft, read_shared
from adapter.pairs import (
    DRAFT_MANIFEST,
    DRAFT_TENSORS,
    DraftManifest,
    load_draft_manifest,
    model_fingerprint,
    read_config,
)
from distill.bootstrap_recipe import OPENINGS, Recipe
from distill.bootstrap_training import Report, evaluate, own_weights, train, used_tokens
from distill.selfplay import SelfPlay, chat_turns, grouped_attention, write_chats


def choose_layers(num_layers: int, keep: int) -> list[int]:
    """Return the first keep - 1 layers and the last one.

    Raises:
        SettingsError: the target has too few layers.
    """
    if not 2 <= keep < num_layers:
        raise SettingsError(
            f"layers = {keep}: a draft keeps at least 2 of the target's {num_layers} layers and not all"
        )
    return [*range(keep - 1), num_layers - 1]


def bootstrap(
    target: Path, target_name: str, out: Path, work: Path, recipe: Recipe, report: Report, start: Path | None = None
) -> DraftManifest:  # fmt: skip
    """Run all phases, continuing where an earlier run of the same recipe stopped.

    Args:
        start: a draft of this target to go on from; None begins with the target's own layers.

    Raises:
        SettingsError: the target is not Llama-shaped, `start` is no draft of it, or `work` belongs to another recipe.
    """
    if start is not None:
        recipe = _check_start(start, target, recipe)
    _claim(work, recipe, target)
    _write_shards(target, work, recipe, report)
    shards = [_load_shard(work, i) for i in range(recipe.shards)]
    model = _begin(target, start, recipe)
    vocabulary = used_tokens(shards[:-1], recipe.vocab_size, model.lm_head.weight.shape[0])
    model = train(model, shards[:-1], vocabulary, recipe, work, report)
    measured = evaluate(model, shards[-1], recipe.batch_rows, vocabulary)
    return _export(model, target, target_name, out, recipe, measured)


# -- text ------------------------------------------------------------------------------------


def _write_shards(target: Path, work: Path, recipe: Recipe, report: Report) -> None:
    missing = [i for i in range(recipe.shards) if not _shard(work, i).exists()]
    if not missing:
        return
    AttentionInterface.register("draftsmith_grouped", grouped_attention)
    AttentionMaskInterface.register("draftsmith_grouped", lambda *args, **kwargs: None)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(target)
    turns = chat_turns(tokenizer)
    openings = [tokenizer.encode(words, add_special_tokens=False) for words in OPENINGS]
    total = recipe.shards * recipe.rows * recipe.length
    done = (recipe.shards - len(missing)) * recipe.rows * recipe.length
    for index in missing:

        def heard(tokens: int) -> None:
            nonlocal done
            done += tokens
            report("writing", done, total, {})

        chats = write_chats(
            model, turns, rows=recipe.rows, length=recipe.length, seed=recipe.seed * 1000 + index,
            top_k=recipe.top_k, openings=openings, opened=recipe.openings, on_step=heard,
        )  # fmt: skip
        path = _shard(work, index)
        save_file({name: getattr(chats, name).contiguous() for name in SelfPlay.__slots__}, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)


def _shard(work: Path, index: int) -> Path:
    return work / "shards" / f"{index:05d}.safetensors"


def _load_shard(work: Path, index: int) -> SelfPlay:
    return SelfPlay(**load_file(_shard(work, index)))


def _claim(work: Path, recipe: Recipe, target: Path) -> None:
    (work / "shards").mkdir(parents=True, exist_ok=True)
    mine = {**asdict(recipe), "target": model_fingerprint(target)}
    path = work / "recipe.json"
    if path.exists() and json.loads(path.read_text()) != mine:
        raise SettingsError(f"{work} holds the work of another recipe or target; choose another --work or delete it")
    path.write_text(json.dumps(mine, indent=1))


# -- training --------------------------------------------------------------------------------


def prune(target: Path, layers: list[int]) -> Any:
    """Build the untrained draft: the chosen layers and the final norm, with the target's embedding and head."""
    model = empty_draft(target, len(layers), torch.float32)
    weights = {}
    for path in sorted(target.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                renamed = _kept_name(name, layers)
                if renamed is not None:
                    weights[renamed] = file.get_tensor(name).float()
    return attach_shared(model, weights, target, torch.float32, None)


def _kept_name(name: str, layers: list[int]) -> str | None:
    if name == "model.norm.weight":
        return name
    parts = name.split(".")
    if parts[:2] == ["model", "layers"] and int(parts[2]) in layers:
        return ".".join(["model", "layers", str(layers.index(int(parts[2]))), *parts[3:]])
    return None


def _layers(target: Path, recipe: Recipe) -> list[int]:
    return choose_layers(read_config(target)["num_hidden_layers"], recipe.layers)


def _begin(target: Path, start: Path | None, recipe: Recipe) -> Any:
    """Build the draft that training begins with."""
    model = prune(target, _layers(target, recipe))
    if start is not None:
        begin = {name: value.float() for name, value in load_file(start / DRAFT_TENSORS).items()}
        model.load_state_dict(begin, strict=False)
    return model


def _check_start(start: Path, target: Path, recipe: Recipe) -> Recipe:
    """Return the recipe with the name of what it begins with.

    Raises:
        SettingsError: a draft of another target, or of other layers.
    """
    manifest = load_draft_manifest(start)
    layers = tuple(_layers(target, recipe))
    if manifest.target_fingerprint != model_fingerprint(target):
        raise SettingsError(f"{start} is a draft of {manifest.target_name}, not of this target; leave --start out")
    if manifest.layers != layers:
        raise SettingsError(
            f"{start} keeps the layers {list(manifest.layers)}, asked for are {list(layers)}; "
            f"choose --layers {len(manifest.layers)} or leave --start out"
        )
    return replace(recipe, start=manifest.sha256)


# -- result ----------------------------------------------------------------------------------


def _export(
    model: Any, target: Path, target_name: str, out: Path, recipe: Recipe, measured: dict[str, Any]
) -> DraftManifest:
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in own_weights(model).items()}
    save_file(weights, out / (DRAFT_TENSORS + ".part"))
    os.replace(out / (DRAFT_TENSORS + ".part"), out / DRAFT_TENSORS)
    tokens = (recipe.shards - 1) * recipe.rows * recipe.length
    positions = recipe.steps * recipe.batch_rows * (recipe.length - 1)
    read_shared(target)  # a target whose embedding cannot be shared fails here and not at serving time
    manifest = DraftManifest(
        kind="pruned", layers=tuple(_layers(target, recipe)),
        target_name=target_name, target_fingerprint=model_fingerprint(target),
        sha256=file_sha256(out / DRAFT_TENSORS), licence="Apache-2.0",
        recipe={**asdict(recipe), "tokens": tokens, "positions": positions},
        measured=measured,
    )  # fmt: skip
    (out / DRAFT_MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    return manifest
