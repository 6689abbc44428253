"""The decoding loop: `step` is one round for every request that is ready.

Knows nothing about HTTP, Redis, SQL or tokenizers.  Called by `serving.engine.server`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import structlog
import torch

from adapter.contracts import FLOOR_VERSION, FinishReason, TokenLogprob
from adapter.hotswap import HotSwap
from kernels.dispatch import largest
from kernels.sampling import shape_logits
from kernels.verify import verify_greedy, verify_gumbel, verify_maximal
from serving.engine.control.base import Controller, RoundReport, StepReport, StepShape
from serving.engine.logprobs import token_logprobs
from serving.engine.parameters import row_params
from serving.engine.proposers.base import Proposal
from serving.engine.proposers.collection import Proposers
from serving.engine.recorder import Recorder
from serving.engine.runner import ModelRunner, TargetOutput, Work
from serving.engine.scheduler import Plan, Scheduler
from serving.engine.sequence import Sequence
from serving.engine.stats import EngineStats

log = structlog.get_logger(__name__)

Judged = tuple[int, int]  # how many drafted tokens were accepted, and the target's own next token


@dataclass(frozen=True, slots=True)
class Delivery:
    """Tokens one request gained in a step, and why it ended if it did."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    sequence: Sequence
    logprobs: list[TokenLogprob] | None = None


class Engine:
    """Target, proposers and caches, and the requests that run on them.

    Args:
        proposers: may be empty, which serves without speculation.
        hotswap: None keeps the base draft for good.
        lookahead: most tokens a round may commit, gamma_max + 1.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        target: ModelRunner,
        proposers: Proposers,
        scheduler: Scheduler,
        controller: Controller,
        recorder: Recorder,
        *,
        coupling: str,
        lookahead: int,
        hotswap: HotSwap | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.target = target
        self.proposers = proposers
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

    def end(self, request_id: str, reason: FinishReason, delivered_tokens: int | None = None) -> Sequence | None:
        """End a request now and free its slot: the client left, or a stop string was found; return it."""
        request = self._requests.get(request_id)
        if request is not None:
            request.finish_reason = reason
            self._close(request, request.num_generated if delivered_tokens is None else delivered_tokens)
        return request

    def step(self) -> list[Delivery]:
        """Run one round for every ready request, and prefill for the others."""
        begin = self._clock()
        self._follow_registry()
        plans = self.scheduler.next_batch(self._lookahead)
        ready = [plan.sequence for plan in plans if plan.ready]
        shape = self._shape(plans, ready)
        shaped = self._clock()
        proposals = self._propose(ready, shape)
        proposed = self._clock()
        output = self._run_target(plans, proposals)
        verdicts, rows = self._judge(output.logits, ready, proposals)
        judged = self._clock()
        deliveries = self._commit(output, rows, ready, proposals, verdicts)
        self._learn(plans, ready, proposals, deliveries, verdicts, shape, (begin, shaped, proposed, judged))
        for delivery in deliveries:  # after their last round was learned from
            if delivery.finish_reason is not None:
                self._close(delivery.sequence, delivery.sequence.num_generated)
        return deliveries

    # -- the stages of a step ----------------------------------------------------------------

    def _follow_registry(self) -> None:
        self.proposers.follow()
        receipt = self.hotswap.poll() if self.hotswap else None
        if receipt is not None and self.hotswap is not None:
            self.proposers.use(self.hotswap.model, receipt.version)
            self.stats.swapped(receipt)

    def _shape(self, plans: list[Plan], ready: list[Sequence]) -> StepShape:
        decoding = len(ready)
        return StepShape(
            prefill_tokens=sum(plan.num_new for plan in plans) - decoding,
            context_tokens=sum(len(request.tokens) for request in ready),
            version=self.version,
        )

    def _propose(self, ready: list[Sequence], shape: StepShape) -> list[Proposal]:
        offers = self.proposers.offers(ready, self._lookahead - 1)
        choices = self.controller.choose(ready, offers, shape)
        return self.proposers.propose(ready, choices)

    def _run_target(self, plans: list[Plan], proposals: list[Proposal]) -> TargetOutput:
        """Bring the target's cache up to date and get its logits at every drafted position of the ready requests."""
        drafts = iter(proposals)
        work = []
        for plan in plans:
            request = plan.sequence
            start = request.num_target_kv
            tokens = request.tokens[start : start + plan.num_new]
            drafted = next(drafts).tokens if plan.ready else []
            work.append(Work(request.block_table, start, tokens + drafted, len(drafted) + 1))
            request.num_target_kv = start + plan.num_new
            if request.started_s is None:
                request.started_s = self._clock()
        output = self.target.run(work, hidden=self.proposers.want_hidden_states)
        return output if all(plan.ready for plan in plans) else self._without_prompts(plans, work, output)

    def _without_prompts(self, plans: list[Plan], work: list[Work], output: TargetOutput) -> TargetOutput:
        """Keep the rows of ready requests; spoil the cache of a prompt that is broken before anybody judges it.

        The last row of a part has read all positions up to it, so it is broken if one of them is.
        """
        kept: list[int] = []
        row = 0
        for plan, item in zip(plans, work, strict=True):
            if plan.ready:
                kept.extend(range(row, row + item.num_logits))
            elif not bool(torch.isfinite(output.logits[row].amax())):
                self.scheduler.spoil(plan.sequence)
            row += item.num_logits
        hidden = None if output.hidden is None else output.hidden[kept]
        return TargetOutput(output.logits[kept], hidden)

    def _judge(
        self, logits: torch.Tensor, ready: list[Sequence], proposals: list[Proposal]
    ) -> tuple[list[Judged], list[range]]:
        """Return the verdict on each ready request's proposal, and which rows of the logits are its own."""
        if not ready:
            return [], []
        drafts = [proposal.tokens for proposal in proposals]
        ends = list(accumulate(len(drafted) + 1 for drafted in drafts))
        rows = [range(end - len(drafted) - 1, end) for end, drafted in zip(ends, drafts, strict=True)]
        peaks, places = largest(logits)
        finite = [math.isfinite(peak) for peak in peaks.tolist()]  # a NaN is the largest; -inf cannot be said
        if not all(finite):
            logits = self._end_broken(logits, finite, rows, ready)
        elif all(request.sampling.temperature == 0 and request.constraints is None for request in ready):
            return verify_greedy(places.tolist(), drafts), rows
        samplings = [request.sampling for request, own in zip(ready, rows, strict=True) for _ in own]
        positions = [len(request.tokens) + j for request, own in zip(ready, rows, strict=True) for j in range(len(own))]
        params = row_params(samplings, positions)
        scaled = shape_logits(_constrained(logits, rows, ready, proposals), params)
        if self._coupling == "gumbel":
            return verify_gumbel(scaled, params, drafts), rows
        laws = [torch.stack(item.scaled) if item.scaled else scaled[:0] for item in proposals]
        return verify_maximal(scaled, params, drafts, laws), rows

    def _end_broken(
        self, logits: torch.Tensor, finite: list[bool], rows: list[range], ready: list[Sequence]
    ) -> torch.Tensor:
        """Let requests whose logits are NaN or +inf end, and nobody find or inherit what they wrote."""
        for request, own in zip(ready, rows, strict=True):
            if not all(finite[own.start : own.stop]):
                request.finish_reason = "error"
                self.scheduler.spoil(request)
                self.stats.not_finite += 1
                log.error("target_not_finite", request_id=request.request_id, position=len(request.tokens))
        return logits.masked_fill(~torch.tensor(finite)[:, None], 0.0)

    def _commit(
        self, output: TargetOutput, rows: list[range], ready: list[Sequence], proposals: list[Proposal],
        verdicts: list[Judged],
    ) -> list[Delivery]:  # fmt: skip
        """Append what was verified, roll both caches back by row, count and record."""
        kept_tokens: list[list[int]] = []
        for request, proposal, own, (num_accepted, token) in zip(ready, proposals, rows, verdicts, strict=True):
            if request.finish_reason is not None:  # its logits were broken
                kept_tokens.append([])
                continue
            before = len(request.tokens)
            kept = request.commit([*proposal.tokens[:num_accepted], token])
            kept_tokens.append(kept)
            request.num_target_kv = before + min(num_accepted, len(kept))
            if request.constraints is not None:
                request.constraints.commit(kept)
                if request.constraints.failed:
                    request.finish_reason = "error"
            hidden = None if output.hidden is None else output.hidden[own.start : own.stop]
            self.proposers.committed(request, before, proposal, num_accepted, hidden)
            request.count(proposal.version, len(proposal.tokens), num_accepted)
            if request.first_token_s is None:
                request.first_token_s = self._clock()
        accepted = [verdict[0] for verdict in verdicts]
        self.recorder.record(output.logits, rows, ready, proposals, kept_tokens, accepted)
        deliveries = []
        for request, proposal, own, kept, count in zip(ready, proposals, rows, kept_tokens, accepted, strict=True):
            self.scheduler.committed(request)
            if kept:
                self.stats.round(proposal, count, len(kept))
            logprobs = token_logprobs(output.logits[own.start : own.stop], kept, request.logprobs)
            deliveries.append(Delivery(request.request_id, kept, request.finish_reason, request, logprobs))
        return deliveries

    def _learn(
        self, plans: list[Plan], ready: list[Sequence], proposals: list[Proposal], deliveries: list[Delivery],
        verdicts: list[Judged], shape: StepShape, times: tuple[float, float, float, float],
    ) -> None:  # fmt: skip
        """Tell the controller and the counters what the step cost and brought."""
        if not plans:
            return
        begin, shaped, proposed, judged = times
        done = self._clock()
        rounds = [
            RoundReport(request, proposal.proposer, len(proposal.tokens), count, len(delivery.token_ids))
            for request, proposal, delivery, (count, _) in zip(ready, proposals, deliveries, verdicts, strict=True)
        ]
        num_rows = sum(plan.num_new for plan in plans) + sum(item.num_drafted for item in rounds)
        self.controller.observe(
            StepReport(
                shape=shape, rounds=rounds, rows=num_rows, draft_forwards=tuple(self.proposers.draft_forwards),
                propose_s=proposed - shaped, target_s=judged - proposed, step_s=done - begin,
            )
        )  # fmt: skip
        self.stats.step(done - begin, proposed - shaped, len(ready))

    def _close(self, request: Sequence, delivered_tokens: int) -> None:
        del self._requests[request.request_id]
        self.scheduler.remove(request)
        self.proposers.ended(request)
        self.controller.forget(request)
        self.recorder.finish(request, delivered_tokens, self._clock())
        self.stats.finished(request)


def _constrained(
    logits: torch.Tensor, rows: list[range], ready: list[Sequence], proposals: list[Proposal]
) -> torch.Tensor:
    """Put each request's own constraints on its rows, in a copy: the log keeps what the target said."""
    if all(request.constraints is None for request in ready):
        return logits
    shaped = logits.clone()
    for request, own, proposal in zip(ready, rows, proposals, strict=True):
        if request.constraints is not None:
            request.constraints.apply(shaped[own.start : own.stop], proposal.tokens)
    return shaped
