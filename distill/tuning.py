"""The training loop: a LoRA on the base draft, from verified blocks, deterministic and resumable.

Order, batches and initial factors follow from the seed; a checkpoint after every few seconds lets a
killed training go on where it was.  Knows nothing about jobs, Redis or the registry.  Called by
`distill.trainer`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from adapter.contracts import Coupling, DraftsmithError, VerifiedBlock
from adapter.settings import DistillSettings
from distill.batches import collate, judged_states, plan_batches
from distill.gate import score_blocks
from distill.losses import Kind, sparse_teacher_loss
from distill.selection import draw_by_segment

Factors = dict[str, torch.Tensor]

_ADAPTER = "default"
_WARM_UP = 0.05
_KL_ONLY = 0.3  # share of the training before the acceptance itself joins the loss
_CHECKS = 12  # looks at the validation blocks in one training
_PATIENCE = 4
_MAX_GRAD_NORM = 1.0
_LR_FLOOR = 0.05


class TrainingError(DraftsmithError):
    """Raised when a training cannot go on and would fail again; the message says why."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a training stands. `holdout_acceptance` is None while nothing was held out."""

    step: int
    steps: int
    loss: float | None
    holdout_acceptance: float | None
    eta_s: float
    tokens: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Material:
    """Blocks of one training; see `distill.selection`."""

    fresh: Sequence[VerifiedBlock]
    replay: Sequence[VerifiedBlock]
    validation: Sequence[VerifiedBlock]


@dataclass(frozen=True, slots=True)
class Tuned:
    """What came out: the best factors, and acceptance on the validation blocks before and after."""

    factors: Factors
    acceptance_before: float | None
    acceptance_after: float | None
    steps: int
    tokens: int
    seconds: float


@dataclass(slots=True)
class _State:
    """Everything a checkpoint holds beside factors and optimizer."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    before: float | None = None
    best: float | None = None
    best_factors: Factors = field(default_factory=dict)
    stale_checks: int = 0


def train(
    model: Any,
    shapes: dict[str, tuple[int, int]],
    material: Material,
    settings: DistillSettings,
    *,
    coupling: Coupling = "gumbel",
    start: Factors | None = None,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 15.0,
    report: Callable[[Progress], None] = lambda progress: None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Train factors for the modules in `shapes` ({name: (out, in)}) on `material`.

    `model` is the base draft in float32; it is left with the best factors attached, unmerged.

    Raises:
        TrainingError: there is nothing to train on, or the loss stopped being finite.
    """
    if not material.fresh and not material.replay:
        raise TrainingError("there are no logged blocks to train on; serve some requests first")
    tuned = attach(model, shapes, settings, start)
    head = model.get_output_embeddings().weight.detach()
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    plan = _plan(material, settings)
    state = _resume(checkpoint, tuned, optimizer) or _State()
    began, saved = clock() - state.elapsed_s, clock()
    every = max(1, len(plan) // _CHECKS)

    def check() -> None:
        score = _mean_score(model, head, material.validation, coupling)
        state.before = score if state.before is None else state.before
        if score is None or state.best is None or score > state.best:
            state.best, state.best_factors, state.stale_checks = score, factors_of(tuned), 0
        else:
            state.stale_checks += 1

    if state.step == 0:
        check()
    while state.step < len(plan) and state.elapsed_s < settings.max_seconds and state.stale_checks < _PATIENCE:
        done = max(state.step / len(plan), state.elapsed_s / settings.max_seconds)
        loss, tokens = _step(model, head, parameters, optimizer, plan[state.step], settings, done, state.step)
        state.step += 1
        state.tokens += tokens
        if state.step % every == 0 or state.step == len(plan):
            check()
        state.elapsed_s = clock() - began
        if checkpoint is not None and clock() - saved >= checkpoint_every_s:
            _save(checkpoint, state, tuned, optimizer)
            saved = clock()
        report(_progress(state, len(plan), loss))
    if state.step % every and state.step < len(plan) and state.stale_checks < _PATIENCE:  # time ran out
        check()
    set_factors(tuned, state.best_factors)
    return Tuned(state.best_factors, state.before, state.best, state.step, state.tokens, state.elapsed_s)


def attach(model: Any, shapes: dict[str, tuple[int, int]], settings: DistillSettings, start: Factors | None) -> Any:
    """Put a LoRA on the named modules in place, from `start` or from seeded A and zero B; return the model."""
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=sorted(shapes), lora_dropout=0.0, bias="none"
    )
    tuned = inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    set_factors(tuned, start or initial_factors(shapes, settings.rank, settings.seed))
    return tuned


def initial_factors(shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> Factors:
    """Draw A uniformly within ±1/√in and set B to zero, so that training starts at the base draft."""
    generator = torch.Generator().manual_seed(seed)
    factors: Factors = {}
    for name, (out_features, in_features) in sorted(shapes.items()):
        noise = torch.rand(rank, in_features, generator=generator) * 2 - 1
        factors[f"{name}.lora_A"] = noise / math.sqrt(in_features)
        factors[f"{name}.lora_B"] = torch.zeros(out_features, rank)
    return factors


def factors_of(tuned: Any) -> Factors:
    """Copy the factors out of a model, under their artifact names."""
    return {name: weight.detach().float().clone() for name, weight in _factor_weights(tuned).items()}


@torch.no_grad()
def set_factors(tuned: Any, factors: Factors) -> None:
    """Write factors into a model."""
    for name, weight in _factor_weights(tuned).items():
        weight.copy_(factors[name])


def _factor_weights(tuned: Any) -> Factors:
    found: Factors = {}
    for name, module in tuned.named_modules():
        if isinstance(module, LoraLayer):
            found[f"{name}.lora_A"] = module.lora_A[_ADAPTER].weight
            found[f"{name}.lora_B"] = module.lora_B[_ADAPTER].weight
    return found


def _plan(material: Material, settings: DistillSettings) -> list[list[VerifiedBlock]]:
    """Lay out every batch of the training: each pass sees all fresh blocks and another draw of replay."""
    fresh = list(material.fresh)
    wanted = round(len(fresh) * settings.replay_share / (1 - settings.replay_share)) if fresh else len(material.replay)
    steps: list[list[VerifiedBlock]] = []
    for epoch in range(math.ceil(settings.epochs)):
        items = fresh + draw_by_segment(material.replay, wanted, seed=settings.seed + epoch)
        lengths = [len(block.token_ids) // 4 for block in items]
        groups = plan_batches(lengths, settings.batch_tokens, f"{settings.seed}:{epoch}")
        part = min(1.0, settings.epochs - epoch)
        steps += [[items[i] for i in group] for group in groups[: math.ceil(part * len(groups))]]
    return steps


def _step(
    model: Any,
    head: torch.Tensor,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    blocks: list[VerifiedBlock],
    settings: DistillSettings,
    done: float,
    step: int,
) -> tuple[float, int]:
    """Run one optimizer step; return its loss and how many tokens it read."""
    warm = min(1.0, done / _WARM_UP + 0.1)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * warm * max(_LR_FLOOR, 0.5 * (1 + math.cos(math.pi * done)))
    kind: Kind = "kl" if done < _KL_ONLY else "blend"
    batch = collate(blocks, rejected_weight=settings.rejected_weight)
    states = judged_states(model, batch)
    loss, _ = sparse_teacher_loss(states, head, batch.topk_ids, batch.topk_logprobs, batch.weights, kind=kind)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)
    if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
        raise TrainingError(
            f"the loss is {loss.item()} with gradient norm {norm.item()} at step {step + 1}; nothing was published. "
            f"Lower distill.learning_rate (now {settings.learning_rate:g}) or look at the logged blocks"
        )
    optimizer.step()
    return loss.item(), batch.token_ids.numel()


def _mean_score(model: Any, head: torch.Tensor, blocks: Sequence[VerifiedBlock], coupling: Coupling) -> float | None:
    if not blocks:
        return None
    return float(np.concatenate(score_blocks(model, head, blocks, coupling)).mean())


def _progress(state: _State, steps: int, loss: float) -> Progress:
    return Progress(
        step=state.step,
        steps=steps,
        loss=loss,
        holdout_acceptance=state.best,
        eta_s=state.elapsed_s / state.step * (steps - state.step),
        tokens=state.tokens,
        elapsed_s=state.elapsed_s,
    )


def _save(path: Path, state: _State, tuned: Any, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint beside and rename it, so that a kill leaves the old or the new one."""
    content = {name: getattr(state, name) for name in _State.__slots__}
    content |= {"factors": factors_of(tuned), "optimizer": optimizer.state_dict()}
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def _resume(path: Path | None, tuned: Any, optimizer: torch.optim.Optimizer) -> _State | None:
    if path is None or not path.exists():
        return None
    content = torch.load(path, weights_only=True)
    set_factors(tuned, content.pop("factors"))
    optimizer.load_state_dict(content.pop("optimizer"))
    return _State(**content)
