"""What a step's rounds are asked for and what they come back with, wherever they are computed.

`serving.engine.host_rounds` computes them one stage after the other; `serving.engine.device` leaves them to
a GPU and fetches what came of them when the next step is already under way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from adapter.contracts import TokenLogprob
from serving.engine.control.base import Choice, StepShape
from serving.engine.proposers.base import Proposal
from serving.engine.scheduler import Plan
from serving.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The target's likeliest tokens of consecutive positions.  Shapes: ids [positions, k]; logprobs [positions, k]."""

    ids: np.ndarray
    logprobs: np.ndarray


@dataclass(slots=True)
class Round:
    """One request's round: what was drafted, how much of it was accepted, and the target's own next token.

    `finite` is false where the target's logits were no numbers; the rest then means nothing.  `top` and
    `logprobs` cover the accepted tokens and the next one, where they were asked for.
    """

    request: Sequence
    proposal: Proposal
    num_accepted: int
    token: int
    finite: bool = True
    top: TopTokens | None = None
    logprobs: list[TokenLogprob] | None = None

    @property
    def tokens(self) -> list[int]:
        """What the round may add to the request: the accepted tokens and the target's own."""
        return [*self.proposal.tokens[: self.num_accepted], self.token]


@dataclass(frozen=True, slots=True)
class Ask:
    """What a step is to do: plans in the order of the batch, a choice for each ready one, and how it is recorded.

    `top_k` tokens a position are recorded, 0 none; choosing took `choose_s` seconds.
    """

    plans: list[Plan]
    choices: list[Choice]
    shape: StepShape
    top_k: int
    choose_s: float = 0.0

    @property
    def ready(self) -> list[Sequence]:
        """The requests that run a round."""
        return [plan.sequence for plan in self.plans if plan.ready]


@dataclass(slots=True)
class Outcome:
    """What came of a step: a round for each ready request, and what the stages took, in seconds.

    `poisoned` are blocks of rounds that were no numbers, of requests that may have ended since.

    `broken` are requests whose prompt gave logits that are no numbers before they were ready; `draft_forwards`
    the sizes, in tokens, of the draft model's forwards.
    """

    rounds: list[Round]
    broken: list[Sequence] = field(default_factory=list)
    draft_forwards: tuple[int, ...] = ()
    draft_s: float = 0.0
    target_s: float = 0.0
    poisoned: list[int] = field(default_factory=list)


class Flight(Protocol):
    """A step that was begun."""

    @property
    def ask(self) -> Ask:
        """What the step was to do."""

    @property
    def landed(self) -> bool:
        """Whether `land` answers at once."""

    def land(self) -> Outcome:
        """Return what came of it, waiting for that where need be."""


class Rounds(Protocol):
    """Where rounds are computed."""

    def launch(self, ask: Ask, ahead: frozenset[str]) -> Flight:
        """Begin a step.  Requests in `ahead` are still in a flight that has not landed: their tokens lie behind."""

    def under_way(self, request: Sequence) -> bool:
        """Whether this request's round of the step begun last was left to the device, so that the next can follow."""

    def may_run_ahead(self, request: Sequence, choice: Choice) -> bool:
        """Whether a round of this choice can be begun before the one under way has landed."""

    def ended(self, request: Sequence) -> None:
        """Forget a request."""
