"""The proposers of one engine, by name: ask all what they offer, let the chosen ones draft."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

from serving.engine.control.base import Choice
from serving.engine.proposers.base import Offer, Proposal, Proposer
from serving.engine.proposers.draft import DraftProposer
from serving.engine.sequence import Sequence


class Proposers:
    """What an engine can draft with; empty serves without speculation."""

    def __init__(self, members: SequenceOf[Proposer] = ()) -> None:
        self.members = {member.name: member for member in members}

    @property
    def draft(self) -> DraftProposer | None:
        """The draft model's proposer, if there is one."""
        member = self.members.get(DraftProposer.name)
        return member if isinstance(member, DraftProposer) else None

    @property
    def draft_forwards(self) -> list[int]:
        """Sizes, in tokens, of the draft model's forwards in the last round."""
        return self.draft.forwards if self.draft else []

    def use(self, model: Any, version: int) -> None:
        """Draft with another draft model from now on."""
        if self.draft is not None:
            self.draft.use(model, version)

    @property
    def vocabulary_counts(self) -> dict[str, int]:
        """What the snapshot says of the draft's vocabulary; empty where all tokens are scored for good."""
        vocabulary = self.draft.vocabulary if self.draft else None
        return {} if vocabulary is None else vocabulary.counters()

    @property
    def draft_not_finite(self) -> int:
        """How many of the draft model's forwards gave logits that are no numbers."""
        return self.draft.num_not_finite if self.draft else 0

    def follow(self) -> None:
        """Let the draft take what was prepared for it.  Called between two rounds."""
        if self.draft is not None:
            self.draft.follow()

    def offers(self, requests: list[Sequence], gamma_max: int) -> list[dict[str, Offer]]:
        """Ask every proposer what it could do for every request; only real offers are listed."""
        found = []
        for request in requests:
            limit = request.gamma_limit(gamma_max)
            asked = {name: member.offer(request, limit) for name, member in self.members.items()} if limit else {}
            found.append({name: offer for name, offer in asked.items() if offer.num_tokens})
        return found

    def propose(self, requests: list[Sequence], choices: list[Choice]) -> list[Proposal]:
        """Let each chosen proposer draft for its requests, all of them in one call."""
        proposals = [Proposal() for _ in requests]
        if self.draft is not None:
            self.draft.forwards = []
        for name, member in self.members.items():
            mine = [i for i, choice in enumerate(choices) if choice.proposer == name and choice.gamma]
            if not mine:
                continue
            drafted = member.propose([requests[i] for i in mine], [choices[i].gamma for i in mine])
            for i, proposal in zip(mine, drafted, strict=True):
                proposals[i] = proposal
        return proposals

    def committed(self, request: Sequence, before: int, proposal: Proposal, num_accepted: int) -> None:
        """Tell every proposer what became of a round."""
        for member in self.members.values():
            member.committed(request, before, proposal, num_accepted)

    def ended(self, request: Sequence) -> None:
        """Tell every proposer that a request ended."""
        for member in self.members.values():
            member.ended(request)
