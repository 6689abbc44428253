"""Make a day-0 draft for a Llama-shaped target: prune layers, distil on text the target writes itself.

No data set is needed.  Three phases, each resumable: the target writes chats into numbered shards
and notes its law beside every token; a copy of its first layers and its last one is trained on
them; the result is scored on a shard it never saw and written with a manifest.  Everything follows
from the seed and the recipe.  Called by `draftsmith bootstrap`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from adapter.pairs import DRAFT_MANIFEST, DRAFT_TENSORS, DraftManifest, model_fingerprint, read_config
from distill.losses import sparse_teacher_loss
from distill.selfplay import SelfPlay, chat_turns, grouped_attention, write_chats

Report = Callable[[str, int, int, dict[str, float]], None]  # phase, done, total, figures

_USER_WEIGHT = 0.5  # user turns are text too, but answers are what will be drafted
_SAVE_EVERY = 40


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result.

    `shards` of `rows` chats with `length` tokens are written, the last shard is held out;
    `steps` optimizer steps of `batch_rows` chats follow.  The loss is forward KL first; over the
    second half its share falls to `final_kl_share` and -log(acceptance) takes the rest.
    """

    layers: int = 4
    shards: int = 14
    rows: int = 128
    length: int = 384
    top_k: int = 32
    steps: int = 400
    batch_rows: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    final_kl_share: float = 0.4
    seed: int = 20261121


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


def bootstrap(target: Path, target_name: str, out: Path, work: Path, recipe: Recipe, report: Report) -> DraftManifest:
    """Run all phases, continuing where an earlier run of the same recipe stopped.

    Raises:
        SettingsError: the target is not Llama-shaped, or `work` belongs to another recipe.
    """
    _claim(work, recipe, target)
    _write_shards(target, work, recipe, report)
    model = _train(target, work, recipe, report)
    measured = evaluate(model, _load_shard(work, recipe.shards - 1), recipe.batch_rows)
    return _export(model, target, target_name, out, recipe, measured)


# -- text ------------------------------------------------------------------------------------


def _write_shards(target: Path, work: Path, recipe: Recipe, report: Report) -> None:
    missing = [i for i in range(recipe.shards) if not _shard(work, i).exists()]
    if not missing:
        return
    AttentionInterface.register("draftsmith_grouped", grouped_attention)
    AttentionMaskInterface.register("draftsmith_grouped", lambda *args, **kwargs: None)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    turns = chat_turns(AutoTokenizer.from_pretrained(target))
    total = recipe.shards * recipe.rows * recipe.length
    done = (recipe.shards - len(missing)) * recipe.rows * recipe.length
    for index in missing:

        def heard(tokens: int) -> None:
            nonlocal done
            done += tokens
            report("writing", done, total, {})

        chats = write_chats(
            model, turns, rows=recipe.rows, length=recipe.length, seed=recipe.seed * 1000 + index,
            top_k=recipe.top_k, on_step=heard,
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


def _train(target: Path, work: Path, recipe: Recipe, report: Report) -> Any:
    layers = choose_layers(read_config(target)["num_hidden_layers"], recipe.layers)
    model = prune(target, layers)
    own = [p for name, p in model.named_parameters() if ".layers." in name or name == "model.norm.weight"]
    for parameter in own:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(own, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    step = _resume(work, model, optimizer)
    shards = [_load_shard(work, i) for i in range(recipe.shards - 1)]
    rows = [(shard, row) for shard in range(len(shards)) for row in range(recipe.rows)]
    model.train()
    while step < recipe.steps:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        batch = _batch(shards, _draw_rows(rows, step, recipe))
        loss, stats = _loss(model, batch, _kl_share(step, recipe))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        report("training", step, recipe.steps, {"kl": stats.kl, "acceptance": stats.acceptance})
        if step % _SAVE_EVERY == 0 or step == recipe.steps:
            _save(work, model, optimizer, step)
    return model.eval()


def _schedule(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def _kl_share(step: int, recipe: Recipe) -> float:
    """1 over the first half, then falling linearly: -log(acceptance) alone learns badly from cold."""
    progress = max(0.0, step / recipe.steps - 0.5) * 2
    return 1.0 - progress * (1.0 - recipe.final_kl_share)


def _draw_rows(rows: list[tuple[int, int]], step: int, recipe: Recipe) -> list[tuple[int, int]]:
    """Walk a fresh permutation of all chats each epoch; a pure function of the step, so resuming is exact."""
    chosen = []
    for i in range(step * recipe.batch_rows, (step + 1) * recipe.batch_rows):
        epoch, index = divmod(i, len(rows))
        generator = torch.Generator().manual_seed(recipe.seed + epoch)
        chosen.append(rows[int(torch.randperm(len(rows), generator=generator)[index])])
    return chosen


def _batch(shards: list[SelfPlay], chosen: list[tuple[int, int]]) -> SelfPlay:
    return SelfPlay(
        **{name: torch.stack([getattr(shards[s], name)[r] for s, r in chosen]) for name in SelfPlay.__slots__}
    )


def _loss(model: Any, batch: SelfPlay, kl_share: float) -> tuple[torch.Tensor, Any]:
    hidden = model.model(input_ids=batch.token_ids[:, :-1].long(), use_cache=False).last_hidden_state
    weights = batch.free_mask * torch.where(batch.answer_mask, 1.0, _USER_WEIGHT)
    keep = weights.flatten() > 0
    weights = weights.flatten()[keep]
    return sparse_teacher_loss(
        hidden.flatten(0, 1)[keep], model.lm_head.weight, batch.topk_ids.flatten(0, 1)[keep].long(),
        batch.topk_logprobs.flatten(0, 1)[keep].float(), weights / weights.sum(), kind="blend", blend=kl_share,
    )  # fmt: skip


def _save(work: Path, model: Any, optimizer: Any, step: int) -> None:
    temporary = work / "checkpoint.part"
    torch.save({"step": step, "model": own_weights(model), "optimizer": optimizer.state_dict()}, temporary)
    os.replace(temporary, work / "checkpoint.pt")


def _resume(work: Path, model: Any, optimizer: Any) -> int:
    path = work / "checkpoint.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


# -- result ----------------------------------------------------------------------------------


def own_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors a pruned draft does not share with its target."""
    return {
        name: tensor for name, tensor in model.state_dict().items() if ".layers." in name or name == "model.norm.weight"
    }


@torch.no_grad()
def evaluate(model: Any, chats: SelfPlay, batch_rows: int) -> dict[str, Any]:
    """Score a draft on chats it never saw: how often its likeliest token is the target's, in answers.

    That is the acceptance of greedy traffic, given that everything before was right.
    """
    hits = total = 0
    model.eval()
    for start in range(0, len(chats.token_ids), batch_rows):
        part = slice(start, start + batch_rows)
        mask = chats.answer_mask[part] & chats.free_mask[part]
        hidden = model.model(input_ids=chats.token_ids[part, :-1].long(), use_cache=False).last_hidden_state[mask]
        for piece, truth in zip(hidden.split(512), chats.topk_ids[part][mask][:, 0].split(512), strict=True):
            hits += int((model.lm_head(piece).argmax(-1) == truth).sum())
            total += len(truth)
    return {"acceptance": hits / max(1, total), "positions": total, "what": "greedy, held-out self-written chats"}


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
        kind="pruned", layers=tuple(choose_layers(read_config(target)["num_hidden_layers"], recipe.layers)),
        target_name=target_name, target_fingerprint=model_fingerprint(target),
        sha256=file_sha256(out / DRAFT_TENSORS), licence="Apache-2.0",
        recipe={**asdict(recipe), "tokens": tokens, "positions": positions},
        measured=measured,
    )  # fmt: skip
    (out / DRAFT_MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    return manifest
