"""Several trainings that differ in their learning rate alone: each is tried, the best one goes on.

No single rate is right for little and for much new text, and nobody is there to try.  Each rate gets the
first part of the plan; the one with the highest acceptance on the validation blocks gets the rest.  The
gate judges on blocks that had no part in this choice.  Knows nothing about models.  Called by
`distill.tuning`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from distill.factors import Factors


@dataclass(slots=True)
class Trial:
    """One training: where it stands, and the best it was."""

    learning_rate: float
    factors: Factors
    optimizer: dict[str, Any] | None = None
    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    acceptance: float | None = None  # on its training batches, smoothed
    before: float | None = None
    best: float | None = None
    best_factors: Factors = field(default_factory=dict)
    stale_checks: int = 0
    at_trial: float | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)


class Trials:
    """The trainings of one job.

    Args:
        steps, max_seconds: what one training may take, and all of them together.
        share: of a training that every rate gets.
        patience: looks at the validation blocks without a new best before the last stage ends early.
    """

    def __init__(self, trials: list[Trial], *, steps: int, max_seconds: float, share: float, patience: int) -> None:
        self.all = trials
        self._steps = steps
        self._share = share if len(trials) > 1 else 1.0
        self._patience = patience
        others = (len(trials) - 1) * self._share
        self._seconds = max_seconds / (1 + others)  # of the one that goes to the end
        self._chosen: Trial | None = None if len(trials) > 1 else trials[0]

    def turns(self) -> Iterator[Trial]:
        """Yield each training when it is its turn, and the best one at last."""
        if self._chosen is None:
            for trial in self.all:
                if self.goes_on(trial):
                    yield trial
                trial.at_trial = trial.best if trial.at_trial is None else trial.at_trial
            self._chosen = self.best
        yield self._chosen

    def goes_on(self, trial: Trial) -> bool:
        """Whether a training has another step in the stage it is in."""
        if trial is self._chosen:
            return self.done(trial) < 1.0 and trial.stale_checks < self._patience
        return trial.at_trial is None and self.done(trial) < self._share

    def done(self, trial: Trial) -> float:
        """Return how much of a whole training is over, by steps or by time, in [0, 1]."""
        return min(1.0, max(trial.step / self._steps, trial.elapsed_s / self._seconds))

    @property
    def best(self) -> Trial:
        """The training with the highest acceptance on the validation blocks; the first where nothing was held out."""
        if self._chosen is not None:
            return self._chosen
        return max(self.all, key=lambda trial: -math.inf if trial.at_trial is None else trial.at_trial)

    @property
    def steps_done(self) -> int:
        """Steps of all trainings together."""
        return sum(trial.step for trial in self.all)

    @property
    def steps_planned(self) -> int:
        """Steps that all of them take when neither time nor patience ends them."""
        tried = math.ceil(self._share * self._steps)
        left = self._steps - (self._chosen.step if self._chosen is not None else tried)
        if self._chosen is not None:
            return self.steps_done + max(0, left)
        return tried * len(self.all) + left


def begin(rates: Sequence[float], factors: Factors) -> list[Trial]:
    """Return one training a rate, all with the same factors."""
    return [Trial(rate, factors) for rate in rates]


def save_trials(path: Path, trials: Sequence[Trial]) -> None:
    """Write a checkpoint beside and rename it, so that a kill leaves the old or the new one."""
    content = [{item.name: getattr(trial, item.name) for item in fields(Trial)} for trial in trials]
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def load_trials(path: Path | None, rates: Sequence[float]) -> list[Trial] | None:
    """Read a checkpoint; None where there is none, or one of other rates."""
    if path is None or not path.exists():
        return None
    trials = [Trial(**item) for item in torch.load(path, weights_only=True)]
    return trials if [trial.learning_rate for trial in trials] == list(rates) else None
