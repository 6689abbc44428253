"""Choose how many tokens to draft.  Today: what the request asked for, else the server's setting."""

from __future__ import annotations

from serving.engine.sequence import Sequence


class FixedGamma:
    """The same draft length for every round, unless a request names its own."""

    def __init__(self, gamma: int) -> None:
        self.gamma = gamma

    def choose_gamma(self, requests: list[Sequence]) -> list[int]:
        """Return a draft length for each request, cut to what its max_tokens can still use."""
        return [request.gamma_limit(self.gamma if request.gamma is None else request.gamma) for request in requests]
