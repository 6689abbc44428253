"""The decoding loop: `step` is one round for every request that is ready.

Knows nothing about HTTP, Redis, SQL or tokenizers.  Called by `serving.engine.server`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapter.contracts import FLOOR_VERSION, FinishReason, Sampling
from adapter.hotswap import HotSwap
from kernels.sampling import shape_logits
from kernels.verify import verify_gumbel, verify_maximal
from serving.engine.controller import FixedGamma
from serving.engine.parameters import row_params
from serving.engine.proposer import DraftProposer, Proposal
from serving.engine.recorder import Recorder
from serving.engine.runner import ModelRunner, Work
from serving.engine.scheduler import Plan, Scheduler
from serving.engine.sequence import Sequence
from serving.engine.stats import EngineStats


@dataclass(frozen=True, slots=True)
class Delivery:
    """Tokens one request gained in a step, and why it ended if it did."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    sequence: Sequence


class Engine:
    """Target, proposer and caches, and the requests that run on them.

    Args:
        proposer: None serves without speculation.
        hotswap: None keeps the base draft for good.
        lookahead: most tokens a round may commit, gamma_max + 1.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        target: ModelRunner,
        proposer: DraftProposer | None,
        scheduler: Scheduler,
        controller: FixedGamma,
        recorder: Recorder,
        *,
        coupling: str,
        lookahead: int,
        hotswap: HotSwap | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.target = target
        self.proposer = proposer
        self.scheduler = scheduler
        self.controller = controller
        self.recorder = recorder
        self.hotswap = hotswap
        self.stats = EngineStats()
        self._coupling = coupling
        self._lookahead = lookahead
        self._clock = clock
        self._requests: dict[str, Sequence] = {}

    @property
    def version(self) -> int:
        """The draft version that drafts now."""
        return self.hotswap.version if self.hotswap else FLOOR_VERSION

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    def submit(self, request: Sequence) -> None:
        """Queue a request; it joins at the next step that has room."""
        self._requests[request.request_id] = request
        self.scheduler.add(request)

    def end(self, request_id: str, reason: FinishReason, delivered_tokens: int | None = None) -> None:
        """End a request now and free its slot: the client left, or a stop string was found."""
        request = self._requests.get(request_id)
        if request is not None:
            request.finish_reason = reason
            self._close(request, request.num_generated if delivered_tokens is None else delivered_tokens)

    def step(self) -> list[Delivery]:
        """Run one round for every ready request, and prefill for the others."""
        begin = self._clock()
        self._follow_registry()
        plans = self.scheduler.next_batch(self._lookahead)
        ready = [plan.sequence for plan in plans if plan.ready]
        proposals = self._propose(ready)
        logits = self._run_target(plans, proposals)
        verdicts, first_rows = self._judge(logits, ready, proposals)
        deliveries = self._commit(logits, first_rows, ready, proposals, verdicts)
        self.stats.step(plans, self._clock() - begin)
        return deliveries

    # -- the stages of a step ----------------------------------------------------------------

    def _follow_registry(self) -> None:
        receipt = self.hotswap.poll() if self.hotswap else None
        if receipt is not None and self.proposer is not None and self.hotswap is not None:
            self.proposer.use(self.hotswap.model)
            self.stats.swapped(receipt)

    def _propose(self, ready: list[Sequence]) -> list[Proposal]:
        if self.proposer is None:
            return [Proposal() for _ in ready]
        begin = self._clock()
        proposals = self.proposer.propose(ready, self.controller.choose_gamma(ready))
        self.stats.draft_s += self._clock() - begin
        return proposals

    def _run_target(self, plans: list[Plan], proposals: list[Proposal]) -> torch.Tensor:
        """Bring the target's cache up to date and get its logits at every drafted position."""
        drafts = iter(proposals)
        work = []
        for plan in plans:
            request = plan.sequence
            start = request.num_target_kv
            tokens = request.tokens[start : start + plan.num_new]
            drafted = next(drafts).tokens if plan.ready else []
            work.append(Work(request.block_table, start, tokens + drafted, len(drafted) + 1 if plan.ready else 0))
            request.num_target_kv = start + plan.num_new
            if request.started_s is None:
                request.started_s = self._clock()
        return self.target.forward(work) if work else torch.empty(0, 0)

    def _judge(
        self, logits: torch.Tensor, ready: list[Sequence], proposals: list[Proposal]
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """Return (num_accepted, next token) of each ready request, and where its rows begin."""
        samplings: list[Sampling] = []
        positions: list[int] = []
        first_rows: list[int] = []
        for request, proposal in zip(ready, proposals, strict=True):
            first_rows.append(len(positions))
            rows = len(proposal.tokens) + 1
            samplings.extend([request.sampling] * rows)
            positions.extend(range(len(request.tokens), len(request.tokens) + rows))
        if not ready:
            return [], []
        params = row_params(samplings, positions)
        scaled = shape_logits(logits, params)
        drafts = [proposal.tokens for proposal in proposals]
        if self._coupling == "gumbel":
            return verify_gumbel(scaled, params, drafts), first_rows
        laws = [torch.stack(item.scaled) if item.scaled else scaled[:0] for item in proposals]
        return verify_maximal(scaled, params, drafts, laws), first_rows

    def _commit(
        self, logits: torch.Tensor, first_rows: list[int], ready: list[Sequence], proposals: list[Proposal],
        verdicts: list[tuple[int, int]],
    ) -> list[Delivery]:  # fmt: skip
        """Append what was verified, roll both caches back by row, count and record."""
        kept_tokens = []
        for request, proposal, (num_accepted, token) in zip(ready, proposals, verdicts, strict=True):
            before = len(request.tokens)
            kept = request.commit([*proposal.tokens[:num_accepted], token])
            kept_tokens.append(kept)
            request.num_target_kv = before + min(num_accepted, len(kept))
            DraftProposer.commit(request, before, len(proposal.tokens), num_accepted)
            request.count(self.version, len(proposal.tokens), num_accepted)
            if request.first_token_s is None:
                request.first_token_s = self._clock()
        accepted = [verdict[0] for verdict in verdicts]
        self.recorder.record(logits, first_rows, ready, proposals, kept_tokens, accepted, self.version)
        deliveries = []
        for request, proposal, kept, count in zip(ready, proposals, kept_tokens, accepted, strict=True):
            self.stats.round(len(proposal.tokens), count, len(kept))
            deliveries.append(Delivery(request.request_id, kept, request.finish_reason, request))
            if request.finish_reason is not None:
                self._close(request, request.num_generated)
        return deliveries

    def _close(self, request: Sequence, delivered_tokens: int) -> None:
        del self._requests[request.request_id]
        self.scheduler.remove(request)
        self.recorder.finish(request, delivered_tokens, self._clock())
        self.stats.finished(request, delivered_tokens)
