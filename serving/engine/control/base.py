"""What a controller decides and what it is told.  Called by the engine once a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from serving.engine.proposers.base import Offer
from serving.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Choice:
    """How one request's next round is drafted; `proposer` None, or gamma 0, is plain decoding.

    `tag` is the controller's own note of what it meant.  It comes back with the round's report: by then the
    controller may have chosen for the step after, so what it remembers is no longer about this one.
    """

    proposer: str | None = None
    gamma: int = 0
    tag: object = field(default=None, compare=False)


PLAIN = Choice()


@dataclass(frozen=True, slots=True)
class StepShape:
    """What else a step does.

    `prefill_tokens` are prompt tokens read in this step, by requests that are not ready and by
    ready ones beyond their one token; `context_tokens` is the summed context of the ready requests.
    """

    prefill_tokens: int
    context_tokens: int
    version: int


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What became of one request's round; `num_kept` tokens were added, fewer than accepted + 1 where it ended.

    `tag` is that of the choice.
    """

    request: Sequence
    proposer: str | None
    num_drafted: int
    num_accepted: int
    num_kept: int
    tag: object = None


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step cost, in seconds, and what its rounds brought.

    `rows` are all tokens the target processed; `draft_forwards` the sizes, in tokens, of the draft
    model's forwards, first catch-up included.
    """

    shape: StepShape
    rounds: list[RoundReport]
    rows: int
    draft_forwards: tuple[int, ...]
    propose_s: float
    target_s: float
    step_s: float


class Controller(Protocol):
    """Chooses how to draft."""

    def choose(self, requests: list[Sequence], offers: list[dict[str, Offer]], shape: StepShape) -> list[Choice]:
        """Choose for each ready request, once a step; offers[i] names only proposers that can draft for it now.

        The step before may not have been observed yet.
        """

    def observe(self, report: StepReport) -> None:
        """Learn from a step."""

    def forget(self, request: Sequence) -> None:
        """Drop what is kept about a request that ended; its last round was observed before."""

    def explain(self) -> dict[str, object]:
        """Return, in plain values, what is known and why the last choice was made."""
