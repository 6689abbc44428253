"""What the processes of one training do together, which is all that those other than rank 0 do.

Rank 0 hands out blocks, start and vocabulary; then all train, and score what the gate will judge on.  What comes
before and after is rank 0's alone (`distill.job`).  Called by `distill.job` and `distill.trainer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapter.contracts import Coupling, VerifiedBlock
from adapter.models import load_draft
from adapter.pairs import Pair
from adapter.sections import DistillSettings
from distill.factors import Factors
from distill.ranks import Ranks
from distill.sharding import score_together
from distill.tuning import Material, TrainingError, train
from distill.verdict import Scores


@dataclass(frozen=True, slots=True)
class Assignment:
    """A training as rank 0 hands it out; `judged` are the gate's blocks."""

    pair: Pair
    material: Material
    judged: Sequence[VerifiedBlock]
    coupling: Coupling
    allowed: torch.Tensor | None
    start: Factors | None
    checkpoint: Path

    @property
    def terms(self) -> dict[str, Any]:
        """What `train` takes by name and every rank must give alike."""
        return {
            "coupling": self.coupling, "allowed": self.allowed, "start": self.start, "checkpoint": self.checkpoint
        }  # fmt: skip

    def score(self, model: Any, ranks: Ranks) -> Scores:
        """Return how the trained factors, never merged or stored, score on the gate's blocks; on every rank."""
        head = model.get_output_embeddings().weight.detach()
        return score_together(model, head, self.judged, self.coupling, self.allowed, ranks)


def follow(settings: DistillSettings, ranks: Ranks) -> None:
    """Help rank 0 with what it hands out, if anything; a training that fails fails there too, and is told there."""
    assignment = ranks.receive()
    if assignment is None:
        return
    model = load_draft(assignment.pair, torch.float32)
    try:
        train(model, assignment.pair.lora_shapes, assignment.material, settings, **assignment.terms, ranks=ranks)
    except TrainingError:
        return
    assignment.score(model, ranks)
