"""The training loop: a LoRA on the base draft, from verified blocks, deterministic and resumable.

Every learning rate is tried for the first part of the training; the one that does best on the validation
blocks goes on to the end (`distill.trials`).  Order, batches and initial factors follow from the seed, and a
checkpoint every few seconds lets a killed training go on where it was.  Several processes may share one draft
(`distill.sharding`): every step is that of one process on the whole batch, and rank 0's clock decides.  Knows nothing
about jobs, Redis or the registry.  Called by `distill.assignment`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from adapter.contracts import Coupling, DraftsmithError, VerifiedBlock
from adapter.sections import DistillSettings
from distill.batches import RowWeights, by_request, judged_states, num_tokens, plan_batches
from distill.factors import Factors, attach, factors_of, set_factors
from distill.laws import lesson
from distill.losses import LossStats, kl_share, sparse_teacher_loss
from distill.ranks import Ranks
from distill.scoring import weighted_mean
from distill.selection import draw_by_segment
from distill.sharding import collate_share, gradient_norm, placed_state, score_together, shard, whole_state
from distill.trials import Trial, Trials, begin, load_trials, save_trials
from distill.vocabulary import Vocabulary
from kernels.packed_linear import packing_works

_WARM_UP = 0.05
_CHECKS = 12  # looks at the validation blocks in one training
_PATIENCE = 4
_MAX_GRAD_NORM = 1.0
_LR_FLOOR = 0.05
_SMOOTH = 0.9  # of the acceptance on training batches, which the schedule of the loss follows


class TrainingError(DraftsmithError):
    """Raised when a training cannot go on and would fail again; the message says why."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a training stands. `holdout_acceptance` is None while nothing was held out."""

    step: int
    steps: int
    loss: float | None
    holdout_acceptance: float | None
    learning_rate: float
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
    """What came out: the best factors, and acceptance on the validation blocks before and after.

    `rates` holds what each learning rate reached when the trials ended; `curve` the looks at the validation blocks
    of the one that was kept, as (steps, acceptance).
    """

    factors: Factors
    acceptance_before: float | None
    acceptance_after: float | None
    steps: int
    tokens: int
    seconds: float
    learning_rate: float
    rates: dict[str, float | None]
    curve: list[tuple[int, float]]


def train(
    model: Any,
    shapes: dict[str, tuple[int, int]],
    material: Material,
    settings: DistillSettings,
    *,
    coupling: Coupling = "gumbel",
    allowed: torch.Tensor | None = None,
    start: Factors | None = None,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 15.0,
    report: Callable[[Progress], None] = lambda progress: None,
    clock: Callable[[], float] = time.monotonic,
    ranks: Ranks | None = None,
) -> Tuned:
    """Train factors for the modules in `shapes` ({name: (out, in)}) on `material`.

    `model` is the base draft in float32; it is left with the best factors attached, unmerged.  `allowed` [size]
    are the tokens it scores when serving, ascending; None for all.  Every process of `ranks` calls this with the same
    arguments, gets the same result, and is left with its part of the model; rank 0 reads and writes the checkpoint.

    Raises:
        TrainingError: there is nothing to train on, or the loss stopped being finite.
    """
    if not material.fresh and not material.replay:
        raise TrainingError("there are no logged blocks to train on; serve some requests first")
    training = _Training(
        model, shapes, material, settings, coupling, allowed, start, checkpoint, ranks or Ranks.alone()
    )
    return training.run(checkpoint_every_s, report, clock)


class _Training:
    """One model, several trials that take turns with it."""

    def __init__(
        self, model: Any, shapes: dict[str, tuple[int, int]], material: Material, settings: DistillSettings,
        coupling: Coupling, allowed: torch.Tensor | None, start: Factors | None, checkpoint: Path | None, ranks: Ranks,
    ) -> None:  # fmt: skip
        self._settings, self._material, self._coupling, self._allowed = settings, material, coupling, allowed
        self._checkpoint, self._ranks = checkpoint, ranks
        full_head = model.get_output_embeddings().weight.detach()
        self._vocabulary = Vocabulary(allowed, full_head.shape[0])
        self._full_head, self._head = full_head, self._vocabulary.head_of(full_head)
        self._model = attach(model, shapes, rank=settings.rank, alpha=settings.alpha, seed=settings.seed, start=start)
        shard(self._model, ranks)
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._plan = plan_steps(material, settings)
        self._weights = RowWeights(rejected=settings.rejected_weight, accepted=settings.accepted_weight)
        self._half = settings.half_precision and packing_works()
        self._every = max(1, len(self._plan) // _CHECKS)
        rates = settings.learning_rates
        saved = ranks.share(load_trials(checkpoint, rates) if ranks.first else None)
        self._trials = Trials(
            saved or begin(rates, factors_of(self._model)), steps=len(self._plan),
            max_seconds=settings.max_seconds, share=settings.trial_share, patience=_PATIENCE,
        )  # fmt: skip

    def run(self, checkpoint_every_s: float, report: Callable[[Progress], None], clock: Callable[[], float]) -> Tuned:
        """Try every rate, then follow the best one to its end."""
        trials, ranks, saved = self._trials, self._ranks, clock()
        for trial in trials.turns():
            optimizer = self._take_up(trial)
            began = clock() - trial.elapsed_s
            while trials.goes_on(trial):
                loss, tokens = self._step(trial, optimizer)
                trial.step += 1
                trial.tokens += tokens
                trial.elapsed_s = ranks.decide(clock() - began)
                if trial.step % self._every == 0 or not trials.goes_on(trial):
                    self._check(trial)
                if self._checkpoint is not None and ranks.decide(clock() - saved) >= checkpoint_every_s:
                    self._put_down(trial, optimizer)
                    if ranks.first:
                        save_trials(self._checkpoint, trials.all)
                    saved = clock()
                report(self._progress(trial, loss))
            self._put_down(trial, optimizer)
        best = trials.best
        set_factors(self._model, best.best_factors)
        return Tuned(
            best.best_factors, best.before, best.best, best.step, sum(item.tokens for item in trials.all),
            sum(item.elapsed_s for item in trials.all), best.learning_rate,
            {f"{item.learning_rate:g}": item.at_trial for item in trials.all}, best.curve,
        )  # fmt: skip

    def _take_up(self, trial: Trial) -> torch.optim.Optimizer:
        """Put a trial's factors into the model and bring its optimizer back."""
        set_factors(self._model, trial.factors)
        optimizer = torch.optim.AdamW(self._parameters, lr=trial.learning_rate, weight_decay=0.0)
        if trial.optimizer is not None:
            optimizer.load_state_dict(placed_state(trial.optimizer, self._parameters))
        if trial.step == 0:
            self._check(trial)
        return optimizer

    def _put_down(self, trial: Trial, optimizer: torch.optim.Optimizer) -> None:
        trial.factors, trial.optimizer = factors_of(self._model), whole_state(optimizer)

    def _check(self, trial: Trial) -> None:
        known = self._trials.all[0].before if trial.step == 0 else None  # all begin alike
        score = known if known is not None else self._score()
        trial.before = score if trial.before is None else trial.before
        if score is not None and trial.step:
            trial.curve.append((trial.step, score))
        if score is None or trial.best is None or score > trial.best:
            trial.best, trial.best_factors, trial.stale_checks = score, factors_of(self._model), 0
        else:
            trial.stale_checks += 1

    def _score(self) -> float | None:
        blocks = self._material.validation
        return weighted_mean(
            blocks, score_together(self._model, self._full_head, blocks, self._coupling, self._allowed, self._ranks)
        )

    def _step(self, trial: Trial, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
        """Run one optimizer step; return its loss and how many tokens it read."""
        settings, done = self._settings, self._trials.done(trial)
        warm = min(1.0, done / _WARM_UP + 0.1)
        rate = trial.learning_rate * warm * max(_LR_FLOOR, 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch, weight, tokens = collate_share(self._plan[trial.step], self._weights, self._ranks)
        part, stats = self._loss(batch, kl_share(settings.loss, done=done, acceptance=trial.acceptance))
        optimizer.zero_grad(set_to_none=True)
        part.backward()  # type: ignore[no-untyped-call]
        norm = gradient_norm(self._parameters, self._ranks)
        torch.nn.utils.clip_grads_with_norm_(self._parameters, _MAX_GRAD_NORM, norm)
        loss, acceptance, read = self._ranks.total(part.item(), weight * stats.acceptance, tokens)
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            raise TrainingError(
                f"the loss is {loss} with gradient norm {norm.item()} at step {trial.step + 1}; nothing was "
                f"published. Lower distill.learning_rates (now {trial.learning_rate:g}) or look at the logged blocks"
            )
        optimizer.step()
        known = trial.acceptance
        trial.acceptance = acceptance if known is None else _SMOOTH * known + (1 - _SMOOTH) * acceptance
        return loss, int(read)

    def _loss(self, batch: Any, share: float) -> tuple[torch.Tensor, LossStats]:
        taught = lesson(batch, self._vocabulary, self._settings.greedy_temperature)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
            states = judged_states(self._model, batch)
        states = states.float() / taught.heat[:, None]
        return sparse_teacher_loss(
            states, self._head, taught.ids, taught.logprobs, batch.weights, kind="blend", blend=share
        )

    def _progress(self, trial: Trial, loss: float) -> Progress:
        trials = self._trials
        elapsed_s = sum(item.elapsed_s for item in trials.all)
        return Progress(
            step=trials.steps_done, steps=trials.steps_planned, loss=loss, holdout_acceptance=trial.best,
            learning_rate=trial.learning_rate, tokens=sum(item.tokens for item in trials.all),
            eta_s=elapsed_s / max(1, trials.steps_done) * (trials.steps_planned - trials.steps_done),
            elapsed_s=elapsed_s,
        )  # fmt: skip


def plan_steps(material: Material, settings: DistillSettings) -> list[list[VerifiedBlock]]:
    """Lay out every batch of the training: each pass sees all fresh blocks and another draw of replay.

    Blocks of a request stay together, so that `collate` can join them.
    """
    fresh = list(material.fresh)
    wanted = round(len(fresh) * settings.replay_share / (1 - settings.replay_share)) if fresh else len(material.replay)
    steps: list[list[VerifiedBlock]] = []
    for epoch in range(math.ceil(settings.epochs)):
        items = by_request(fresh + draw_by_segment(material.replay, wanted, seed=settings.seed + epoch))
        groups = plan_batches([num_tokens(item) for item in items], settings.batch_tokens, f"{settings.seed}:{epoch}")
        part = min(1.0, settings.epochs - epoch)
        batches = [[block for i in group for block in items[i]] for group in groups]
        steps += batches[: math.ceil(part * len(batches))]
    return steps
