"""What every way to draft has in common.  The engine knows proposers only by this.

A proposer says what it could draft (`offer`), drafts it (`propose`), and hears what became of every
round (`committed`), also of rounds that others drafted.  One that skips layers of the target takes the
target's runner when it is built, and needs no change in the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from serving.engine.sequence import Sequence


@dataclass(slots=True)
class Proposal:
    """Drafted tokens of one request; empty where nothing was drafted.

    `logprobs` are the draft's log-probs at temperature 1, empty where the proposer has none.
    `scaled` [gamma, vocab] are the shaped logits each token was drawn from; kept only where the
    acceptance rule needs them.  `version` is the draft version that drafted, None for proposers
    that are not versioned.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    scaled: list[torch.Tensor] = field(default_factory=list)
    proposer: str | None = None
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """What a proposer could do for one request in this round.

    `backlog_tokens` is what it must read first; `match_tokens` is how much of the text before the
    proposal it found elsewhere, 0 for proposers that do not match; `version` is the draft version
    that would draft, 0 for proposers that are not versioned.
    """

    num_tokens: int
    backlog_tokens: int = 0
    match_tokens: int = 0
    version: int = 0


class Proposer(Protocol):
    """One way to draft."""

    name: str

    def offer(self, request: Sequence, limit: int) -> Offer:
        """Say what could be drafted for a request now, at most `limit` tokens.  Cheap; changes nothing."""

    def propose(self, requests: list[Sequence], gammas: list[int]) -> list[Proposal]:
        """Draft at most gammas[i] tokens for requests[i]; fewer, or none, is always allowed."""

    def committed(self, request: Sequence, before: int, proposal: Proposal, num_accepted: int) -> None:
        """Hear the verdict on a round, whoever drafted it.

        `before` is the length of the request's tokens when the round began.
        """

    def ended(self, request: Sequence) -> None:
        """Forget a request."""
