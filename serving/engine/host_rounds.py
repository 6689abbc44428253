"""Compute rounds stage by stage, with what every stage says at hand: draft, verify, judge.

Runs every proposer, constraint and model; waits for each stage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

from kernels.dispatch import largest, sparse_log_probs
from kernels.sampling import shape_logits
from kernels.verify import verify_greedy, verify_gumbel, verify_maximal
from serving.engine.control.base import Choice
from serving.engine.logprobs import token_logprobs
from serving.engine.parameters import row_params
from serving.engine.proposers.base import Proposal
from serving.engine.proposers.collection import Proposers
from serving.engine.rounds import Ask, Outcome, Round, TopTokens
from serving.engine.runner import ModelRunner, TargetOutput
from serving.engine.scheduler import Plan
from serving.engine.sequence import Sequence
from serving.engine.work import Work


@dataclass(frozen=True, slots=True)
class Landed:
    """A step that is over."""

    ask: Ask
    outcome: Outcome
    landed: bool = True

    def land(self) -> Outcome:
        """Return what came of it."""
        return self.outcome


class HostRounds:
    """Rounds whose every stage this thread waits for.

    Args:
        proposers: may be empty, which decodes plainly.
        clock: monotonic seconds.
    """

    def __init__(
        self, target: ModelRunner, proposers: Proposers, *, coupling: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._target = target
        self._proposers = proposers
        self.coupling = coupling
        self._clock = clock

    def under_way(self, request: Sequence) -> bool:
        """Say no: a round is over when `launch` returns."""
        return False

    def may_run_ahead(self, request: Sequence, choice: Choice) -> bool:
        """Say no: a round starts from the tokens of the one before."""
        return False

    def ended(self, request: Sequence) -> None:
        """Keep nothing about requests."""

    def launch(self, ask: Ask, ahead: frozenset[str] = frozenset()) -> Landed:
        """Run a step to its end."""
        begin, ready = self._clock(), ask.ready
        proposals = self._proposers.propose(ready, ask.choices)
        proposed = self._clock()
        output, broken = self._run_target(ask.plans, proposals)
        rounds = self._judge(output.logits, ready, proposals)
        judged = self._clock()
        _record(rounds, output, ask.top_k)
        forwards = tuple(self._proposers.draft_forwards)
        return Landed(ask, Outcome(rounds, broken, forwards, proposed - begin, judged - proposed))

    def _run_target(self, plans: list[Plan], proposals: list[Proposal]) -> tuple[TargetOutput, list[Sequence]]:
        """Bring the target's cache up to date and get its logits at every drafted position of the ready requests.

        The others whose prompt is broken are named, before anybody judges it.
        """
        drafts = iter(proposals)
        work = []
        for plan in plans:
            request = plan.sequence
            start = request.num_target_kv
            tokens = request.tokens[start : start + plan.num_new]
            drafted = next(drafts).tokens if plan.ready else []
            work.append(Work(request.block_table, start, tokens + drafted, len(drafted) + 1))
            request.num_target_kv = start + plan.num_new
        prompts = [number for number, plan in enumerate(plans) if not plan.ready]
        # The last row of a part has read all positions up to it, so it is broken if one of them is.
        output = self._target.run(work, looked_at=prompts)
        return output, [plans[number].sequence for number in output.broken]

    def _judge(self, logits: torch.Tensor, ready: list[Sequence], proposals: list[Proposal]) -> list[Round]:
        """Return the verdict on each ready request's proposal."""
        if not ready:
            return []
        drafts = [proposal.tokens for proposal in proposals]
        ends = list(accumulate(len(drafted) + 1 for drafted in drafts))
        rows = [range(end - len(drafted) - 1, end) for end, drafted in zip(ends, drafts, strict=True)]
        peaks, places = largest(logits)
        finite = [math.isfinite(peak) for peak in peaks.tolist()]  # a NaN is the largest; -inf cannot be said
        if not all(finite):
            logits = logits.masked_fill(~torch.tensor(finite)[:, None], 0.0)
        elif all(request.sampling.temperature == 0 and request.constraints is None for request in ready):
            return _rounds(ready, proposals, verify_greedy(places.tolist(), drafts), rows, finite)
        samplings = [request.sampling for request, own in zip(ready, rows, strict=True) for _ in own]
        positions = [len(request.tokens) + j for request, own in zip(ready, rows, strict=True) for j in range(len(own))]
        params = row_params(samplings, positions)
        scaled = shape_logits(_constrained(logits, rows, ready, proposals), params)
        if self.coupling == "gumbel":
            return _rounds(ready, proposals, verify_gumbel(scaled, params, drafts), rows, finite)
        laws = [torch.stack(item.scaled) if item.scaled else scaled[:0] for item in proposals]
        return _rounds(ready, proposals, verify_maximal(scaled, params, drafts, laws), rows, finite)


def _rounds(
    ready: list[Sequence], proposals: list[Proposal], verdicts: list[tuple[int, int]], rows: list[range],
    finite: list[bool],
) -> list[Round]:  # fmt: skip
    return [
        Round(request, proposal, count, token, finite=all(finite[own.start : own.stop]))
        for request, proposal, (count, token), own in zip(ready, proposals, verdicts, rows, strict=True)
    ]


def _record(rounds: list[Round], output: TargetOutput, top_k: int) -> None:
    """Add to each round what the target thought of the tokens it may add, all rows in one pass."""
    if not top_k and all(item.request.logprobs is None for item in rounds):
        return
    starts = accumulate((len(item.proposal.tokens) + 1 for item in rounds), initial=0)
    begins = dict(zip(map(id, rounds), starts, strict=False))
    sound = [item for item in rounds if item.finite]
    for item in sound:
        if item.request.logprobs is not None:
            item.logprobs = token_logprobs(output.logits[begins[id(item)] :], item.tokens, item.request.logprobs)
    logged = [item for item in sound if item.request.learn]
    wanted = [begins[id(item)] + j for item in logged for j in range(item.num_accepted + 1)]
    if not top_k or not wanted:
        return
    logits = output.logits if len(wanted) == len(output.logits) else output.logits[torch.tensor(wanted)]
    found = sparse_log_probs(logits, min(top_k, logits.shape[1]))
    ids, logprobs = found[0].numpy().astype("<u4"), found[1].numpy().astype("<f2")
    row = 0
    for item in logged:
        end = row + item.num_accepted + 1
        item.top = TopTokens(ids[row:end], logprobs[row:end])
        row = end


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
