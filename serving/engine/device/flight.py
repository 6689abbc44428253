"""A step that was begun on a device, and what came of it once it has landed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from serving.engine.device.graphs import Fetch, Mark
from serving.engine.device.wire import Landing, Sent
from serving.engine.proposers.base import Proposal
from serving.engine.proposers.draft import DraftProposer
from serving.engine.rounds import Ask, Outcome, Round, TopTokens
from serving.engine.sequence import Sequence


class FlightOnDevice:
    """A step under way; `requests` and what belongs to them are in the order of the device's batch."""

    def __init__(self, ask: Ask, device: torch.device, waited: Callable[[float], None]) -> None:
        self.ask = ask
        self._waited = waited  # hears, in seconds, how long the host stood still for this step
        self.begun, self.drafted, self.verified = Mark(device), Mark(device), Mark(device)
        self.requests: list[Sequence] = []
        self.tables: list[list[int]] = []  # as they were: who ends meanwhile has none any more
        self.proposer: DraftProposer | None = None
        self.version: int | None = None
        self.sent: Sent | None = None
        self.fetch: Fetch | None = None
        self.draft_forwards: list[int] = []
        self.elsewhere = Outcome([])  # what the host ran of the same step

    @property
    def landed(self) -> bool:
        """Whether nothing of the step was left to the device: then `land` answers at once."""
        return self.fetch is None

    def land(self) -> Outcome:
        """Wait until the results are here, and read them."""
        other = self.elsewhere
        if self.fetch is None or self.sent is None:
            return other
        begin = time.perf_counter()
        arrived = self.fetch.wait()
        self._waited(time.perf_counter() - begin)
        landing = self.sent.unpack(arrived)
        self._note_broken(landing)
        rounds = {id(item.request): item for item in other.rounds}
        for row, request in enumerate(self.requests):
            rounds[id(request)] = self._round(landing, row, request)
        poisoned = [
            block for table, finite in zip(self.tables, landing.finite, strict=False) if not finite for block in table
        ]
        return Outcome(
            [rounds[id(request)] for request in self.ask.ready], other.broken,
            (*self.draft_forwards, *other.draft_forwards),
            other.draft_s + self.drafted.seconds_since(self.begun),
            other.target_s + self.verified.seconds_since(self.drafted), poisoned,
        )  # fmt: skip

    def _note_broken(self, landing: Landing) -> None:
        """Let the draft's proposer hear whose draft was no numbers, asked for or not: what that wrote must not stay."""
        broken = [row for row in range(len(self.requests)) if not landing.sound[row]]
        if broken and self.proposer is not None and self.version is not None:
            blocks = [block for row in broken for block in self.tables[row]]
            self.proposer.note_broken(blocks, len(broken), self.version)

    def _round(self, landing: Landing, row: int, request: Sequence) -> Round:
        gamma, accepted = landing.drafted[row], landing.accepted[row]
        proposal = Proposal()
        if gamma:
            proposal = Proposal(
                landing.drafts[row][:gamma], landing.draft_logprobs[row][:gamma], proposer=DraftProposer.name,
                version=self.version,
            )  # fmt: skip
        kept = accepted + 1
        top = None
        if self.sent is not None and self.sent.top_k:
            top = TopTokens(landing.topk_ids[row, :kept], landing.topk_logprobs[row, :kept])
        return Round(request, proposal, accepted, landing.tokens[row], finite=bool(landing.finite[row]), top=top)
