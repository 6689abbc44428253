"""The same draft length for every round, unless a request names its own."""

from __future__ import annotations

from serving.engine.control.base import PLAIN, Choice, StepReport, StepShape
from serving.engine.proposers.base import Offer
from serving.engine.sequence import Sequence


class FixedGamma:
    """Draft `gamma` tokens a round with the first proposer, by preference of `order`, that offers any.

    An empty `order` never drafts, whatever a request asks for.
    """

    def __init__(self, gamma: int, order: tuple[str, ...] = ("draft",)) -> None:
        self.gamma = gamma
        self._order = order

    def choose(self, requests: list[Sequence], offers: list[dict[str, Offer]], shape: StepShape) -> list[Choice]:
        """Return the fixed length for each request, cut to what its max_tokens can still use."""
        return [self._one(request, offer) for request, offer in zip(requests, offers, strict=True)]

    def observe(self, report: StepReport) -> None:
        """Learn nothing."""

    def forget(self, request: Sequence) -> None:
        """Nothing is kept."""

    def explain(self) -> dict[str, object]:
        """Say that the length is fixed, and whether anything may draft at all."""
        return {"controller": "fixed", "gamma": self.gamma, "drafts": bool(self._order)}

    def _one(self, request: Sequence, offers: dict[str, Offer]) -> Choice:
        gamma = request.gamma_limit(self.gamma if request.gamma is None else request.gamma)
        for name in self._order:
            if name in offers:
                return Choice(name, min(gamma, offers[name].num_tokens))
        return PLAIN
