"""Draft by matching: what followed the last time this request's own text ended like this?

Looks at tokens only, so preemption, swaps and caches do not matter to it.  Needs no model.
"""

from __future__ import annotations

from serving.engine.proposers.base import Offer, Proposal
from serving.engine.proposers.matched import matched_proposal
from serving.engine.proposers.suffix import SuffixAutomaton
from serving.engine.sequence import Sequence

NOTHING = Offer(0)
SHORTEST = 2  # tokens; what a single token was followed by says too little
_READ_TOKENS = 512  # a round's share of a long prompt, a millisecond or two


class NgramProposer:
    """Propose the continuation of the longest suffix of prompt and output that occurred before in them.

    A match that runs up to the end of the text is a repetition, and continued as one.

    Args:
        vocab: width of the target's logits, where the laws of the proposals are needed (the maximal coupling).
    """

    name = "ngram"

    def __init__(self, *, vocab: int | None = None) -> None:
        self._vocab = vocab
        self._read: dict[str, SuffixAutomaton] = {}

    def offer(self, request: Sequence, limit: int) -> Offer:
        """Offer what the match can be continued by; nothing while a long prompt is still being read."""
        if request.gamma == 0:
            return NOTHING
        found = self._match(request)
        if found is None or found.match_tokens < SHORTEST:
            return NOTHING
        return Offer(limit, match_tokens=found.match_tokens)

    def propose(self, requests: list[Sequence], gammas: list[int]) -> list[Proposal]:
        """Copy what followed the match."""
        return [self._one(request, gamma) for request, gamma in zip(requests, gammas, strict=True)]

    def committed(self, request: Sequence, before: int, proposal: Proposal, num_accepted: int) -> None:
        """Keep nothing: what is new is read with the next offer."""

    def ended(self, request: Sequence) -> None:
        """Free the request's index."""
        self._read.pop(request.request_id, None)

    def _match(self, request: Sequence) -> SuffixAutomaton | None:
        """Read what is new, and return the index once it has read everything."""
        found = self._read.get(request.request_id)
        if found is None:
            found = self._read[request.request_id] = SuffixAutomaton()
        seen = len(found.text)
        for token in request.tokens[seen : seen + _READ_TOKENS]:
            found.append(token)
        return found if len(found.text) == len(request.tokens) else None

    def _one(self, request: Sequence, gamma: int) -> Proposal:
        found = self._match(request)
        if found is None or found.match_tokens < SHORTEST:
            return Proposal()
        text, first = found.text, found.match_end + 1
        period = len(text) - first
        return matched_proposal(self.name, [text[first + i % period] for i in range(gamma)], self._vocab)
