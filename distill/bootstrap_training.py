"""Train a pruned draft on chats that its target wrote, from checkpoint to checkpoint.

What is scored is what will be scored when serving: the tokens that such text uses most, not the whole vocabulary,
whose head costs more than the layers.  Everything follows from the recipe and the step, so a run that was cut
goes on as if it had not been.  Knows nothing of files but its checkpoint.  Called by `distill.bootstrap`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from distill.bootstrap_recipe import Recipe
from distill.losses import LossStats, kl_share, sparse_teacher_loss
from distill.selfplay import SelfPlay
from distill.vocabulary import Vocabulary
from kernels.packed_linear import packing_works

Report = Callable[[str, int, int, dict[str, float]], None]  # phase, done, total, figures

_USER_WEIGHT = 0.5  # user turns are text too, but answers are what will be drafted
_SAVE_EVERY = 40
_SMOOTH = 0.9  # of the acceptance, which the schedule of the loss follows


def train(
    model: Any, shards: Sequence[SelfPlay], vocabulary: Vocabulary, recipe: Recipe, work: Path, report: Report
) -> Any:  # fmt: skip
    """Train the layers and the final norm of a draft; embedding and head stay the target's."""
    own = [p for name, p in model.named_parameters() if ".layers." in name or name == "model.norm.weight"]
    for parameter in own:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(own, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    step, acceptance = _resume(work, model, optimizer)
    head = vocabulary.head_of(model.lm_head.weight.detach())
    rows = [(shard, row) for shard in range(len(shards)) for row in range(recipe.rows)]
    model.train()
    while step < recipe.steps:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        share = kl_share("lk", done=step / recipe.steps, acceptance=acceptance)
        loss, stats = _loss(model, head, vocabulary, _batch(shards, _draw_rows(rows, step, recipe)), share)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        acceptance = stats.acceptance if acceptance is None else _SMOOTH * acceptance + (1 - _SMOOTH) * stats.acceptance
        report("training", step, recipe.steps, {"kl": stats.kl, "acceptance": acceptance})
        if step % _SAVE_EVERY == 0 or step == recipe.steps:
            _save(work, model, optimizer, step, acceptance)
    return model.eval()


def used_tokens(shards: Sequence[SelfPlay], size: int, full: int) -> Vocabulary:
    """Return the `size` tokens that the target expects to use most in these chats; 0 are all of them."""
    if not 0 < size < full:
        return Vocabulary(None, full)
    use = torch.zeros(full, dtype=torch.float64)
    for shard in shards:
        free = shard.free_mask
        use.index_add_(0, shard.topk_ids[free].flatten().long(), shard.topk_logprobs[free].double().exp().flatten())
    order = torch.argsort(use, descending=True, stable=True)
    return Vocabulary(order[:size].sort().values, full)


def own_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors a pruned draft does not share with its target."""
    return {
        name: tensor for name, tensor in model.state_dict().items() if ".layers." in name or name == "model.norm.weight"
    }


@torch.no_grad()
def evaluate(model: Any, chats: SelfPlay, batch_rows: int, vocabulary: Vocabulary) -> dict[str, Any]:
    """Score a draft on chats it never saw: how often its likeliest token is the target's, in answers.

    That is the acceptance of greedy traffic, given that everything before was right.  `vocabulary`: what it scores.
    """
    hits = total = 0
    model.eval()
    head = vocabulary.head_of(model.lm_head.weight)
    for start in range(0, len(chats.token_ids), batch_rows):
        part = slice(start, start + batch_rows)
        mask = chats.answer_mask[part] & chats.free_mask[part]
        hidden = model.model(input_ids=chats.token_ids[part, :-1].long(), use_cache=False).last_hidden_state[mask]
        for piece, truth in zip(hidden.split(512), chats.topk_ids[part][mask][:, 0].split(512), strict=True):
            hits += int(((piece @ head.T).argmax(-1) == vocabulary.find(truth.long())).sum())
            total += len(truth)
    return {"acceptance": hits / max(1, total), "positions": total, "what": "greedy, held-out self-written chats"}


def _schedule(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def _draw_rows(rows: list[tuple[int, int]], step: int, recipe: Recipe) -> list[tuple[int, int]]:
    """Walk a fresh permutation of all chats each epoch; a pure function of the step, so resuming is exact."""
    chosen = []
    for i in range(step * recipe.batch_rows, (step + 1) * recipe.batch_rows):
        epoch, index = divmod(i, len(rows))
        generator = torch.Generator().manual_seed(recipe.seed + epoch)
        chosen.append(rows[int(torch.randperm(len(rows), generator=generator)[index])])
    return chosen


def _batch(shards: Sequence[SelfPlay], chosen: list[tuple[int, int]]) -> SelfPlay:
    return SelfPlay(
        **{name: torch.stack([getattr(shards[s], name)[r] for s, r in chosen]) for name in SelfPlay.__slots__}
    )


def _loss(
    model: Any, head: torch.Tensor, vocabulary: Vocabulary, batch: SelfPlay, share_of_kl: float
) -> tuple[torch.Tensor, LossStats]:
    with torch.autocast("cpu", torch.bfloat16, enabled=packing_works()):
        hidden = model.model(input_ids=batch.token_ids[:, :-1].long(), use_cache=False).last_hidden_state
    weights = (batch.free_mask * torch.where(batch.answer_mask, 1.0, _USER_WEIGHT)).flatten()
    keep = weights > 0
    ids, logprobs = vocabulary.translate(
        batch.topk_ids.flatten(0, 1)[keep].long(), batch.topk_logprobs.flatten(0, 1)[keep].float()
    )
    return sparse_teacher_loss(
        hidden.flatten(0, 1)[keep].float(), head, ids, logprobs, weights[keep] / weights[keep].sum(), kind="blend",
        blend=share_of_kl,
    )  # fmt: skip


def _save(work: Path, model: Any, optimizer: Any, step: int, acceptance: float) -> None:
    temporary = work / "checkpoint.part"
    state = {"step": step, "acceptance": acceptance, "model": own_weights(model), "optimizer": optimizer.state_dict()}
    torch.save(state, temporary)
    os.replace(temporary, work / "checkpoint.pt")


def _resume(work: Path, model: Any, optimizer: Any) -> tuple[int, float | None]:
    path = work / "checkpoint.pt"
    if not path.exists():
        return 0, None
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), float(state["acceptance"])
