"""The decoding loop: `step` is one round for every request that is ready.

Knows nothing about HTTP, Redis, SQL or tokenizers.  Called by `serving.engine.server`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapter.contracts import FLOOR_VERSION, FinishReason, TokenLogprob
from adapter.logs import get_logger
from serving.engine.control.base import PLAIN, Controller, RoundReport, StepReport, StepShape
from serving.engine.control.router import Router
from serving.engine.proposers.collection import Proposers
from serving.engine.recorder import Recorder
from serving.engine.rounds import Ask, Flight, Outcome, Round, Rounds
from serving.engine.runner import ModelRunner
from serving.engine.scheduler import Plan, Scheduler
from serving.engine.sequence import Sequence
from serving.engine.stats import EngineStats

if TYPE_CHECKING:
    from adapter.hotswap import HotSwap

log = get_logger(__name__)


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
        rounds: where rounds are computed.
        hotswap: None keeps the base draft for good.
        router: chooses between the live version and its alternates; None gives all requests to the live one.
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
        rounds: Rounds,
        *,
        lookahead: int,
        hotswap: HotSwap | None = None,
        router: Router | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.target = target
        self.proposers = proposers
        self.scheduler = scheduler
        self.controller = controller
        self.recorder = recorder
        self.hotswap = hotswap
        self.router = router
        self.stats = EngineStats()
        self.rounds = rounds
        self._lookahead = lookahead
        self._flight: Flight | None = None  # a step whose outcome is not known yet
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
        if self.router is not None and self.hotswap is not None and request.version is None:
            swap = self.hotswap
            version = self.router.choose(request.segment, self.version, swap.alternates, swap.gain)
            if version != self.version:  # what is live may change while it runs, and then it follows
                request.routed = version
                self.stats.routed += 1
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
        """Begin one round for every ready request, prefill for the others; return what is known of rounds begun."""
        begin = self._clock()
        deliveries: list[Delivery] = []
        if self._flight is not None and not self._may_run_ahead():
            deliveries, begin = self._land(begin), self._clock()
        self._follow_registry()
        ahead = frozenset(() if self._flight is None else [item.request_id for item in self._flight.ask.ready])
        ask = self._ask(self.scheduler.next_batch(self._lookahead * (2 if ahead else 1)))
        if ahead and not self._all_may_run_ahead(ask):
            deliveries += self._land(begin)  # some now need what only the host can do, so it must know where they are
            begin, ahead, ask = self._clock(), frozenset(), self._fit(ask)
        flight: Flight | None = self.rounds.launch(ask, ahead) if ask.plans else None
        deliveries += self._land(begin)
        self._flight = flight
        return deliveries + self._land(begin) if flight is not None and flight.landed else deliveries

    # -- the stages of a step ----------------------------------------------------------------

    def _follow_registry(self) -> None:
        self.proposers.follow()
        receipt = self.hotswap.poll() if self.hotswap else None
        if receipt is not None and self.hotswap is not None:
            self.proposers.use(self.hotswap.model, receipt.version)
            self.stats.swapped(receipt)

    def _may_run_ahead(self) -> bool:
        """Whether the next step can begin before the last one has landed: the same requests, and room for all."""
        flight, scheduler = self._flight, self.scheduler
        if flight is None or scheduler.waiting or (self.hotswap is not None and self.hotswap.waits):
            return False
        same = set(map(id, scheduler.running)) == set(map(id, flight.ask.ready))
        if not same or not all(self.rounds.under_way(request) for request in scheduler.running):
            return False
        return scheduler.has_room(2 * self._lookahead)

    def _all_may_run_ahead(self, ask: Ask) -> bool:
        rounds = zip(ask.ready, ask.choices, strict=True)
        return all(self.rounds.may_run_ahead(request, choice) for request, choice in rounds)

    def _ask(self, plans: list[Plan]) -> Ask:
        """Choose how each ready request drafts; asked once a step, as choosing counts, draws and remembers."""
        begin = self._clock()
        ready = [plan.sequence for plan in plans if plan.ready]
        shape = self._shape(plans)
        offers = self.proposers.offers(ready, self._lookahead - 1)
        choices = self.controller.choose(ready, offers, shape)
        now = self._clock()
        for plan in plans:
            if plan.sequence.started_s is None:
                plan.sequence.started_s = now
        return Ask(plans, choices, shape, self.recorder.top_k, now - begin)

    def _fit(self, ask: Ask) -> Ask:
        """Cut what was chosen to what there is, now that the step before has landed: some have ended, all went on."""
        plans = self.scheduler.next_batch(self._lookahead)
        ready = [plan.sequence for plan in plans if plan.ready]
        chosen = dict(zip(map(id, ask.ready), ask.choices, strict=True))
        choices = []
        for request, offer in zip(ready, self.proposers.offers(ready, self._lookahead - 1), strict=True):
            choice = chosen.get(id(request), PLAIN)
            limit = offer[choice.proposer].num_tokens if choice.proposer in offer else 0
            choices.append(replace(choice, gamma=min(choice.gamma, limit)))
        return replace(ask, plans=plans, choices=choices, shape=self._shape(plans))

    def _shape(self, plans: list[Plan]) -> StepShape:
        ready = [plan.sequence for plan in plans if plan.ready]
        return StepShape(
            prefill_tokens=sum(plan.num_new for plan in plans) - len(ready),
            context_tokens=sum(len(request.tokens) for request in ready),
            version=self.version,
        )

    def _land(self, begin: float) -> list[Delivery]:
        """Take in what came of the step in flight, if there is one; `begin` is when its time began to count."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        outcome = flight.land()
        for request in outcome.broken:
            if self._requests.get(request.request_id) is request:
                self.scheduler.spoil(request)
        if outcome.poisoned:  # a request that ended meanwhile has given them back, and nobody else knows of them
            self.target.pool.scrub(sorted(set(outcome.poisoned)))
        rounds = [item for item in outcome.rounds if self._requests.get(item.request.request_id) is item.request]
        deliveries = self._commit(rounds)
        self._learn(flight.ask, outcome, rounds, deliveries, self._clock() - begin)
        for delivery in deliveries:  # after their last round was learned from
            if delivery.finish_reason is not None:
                self._close(delivery.sequence, delivery.sequence.num_generated)
        return deliveries

    def _commit(self, rounds: list[Round]) -> list[Delivery]:
        """Append what was verified, roll both caches back by row, count and record."""
        kept = [self._commit_round(item) for item in rounds]
        self.recorder.record(rounds, kept)
        deliveries = []
        for item, tokens in zip(rounds, kept, strict=True):
            request = item.request
            self.scheduler.committed(request)
            if tokens:
                self.stats.round(item.proposal, item.num_accepted, len(tokens))
            logprobs = None if item.logprobs is None else item.logprobs[: len(tokens)]
            deliveries.append(Delivery(request.request_id, tokens, request.finish_reason, request, logprobs))
        return deliveries

    def _commit_round(self, item: Round) -> list[int]:
        """Append what one round brought and return it."""
        request = item.request
        if not item.finite:
            self._end_broken(request)
            return []
        before = len(request.tokens)
        kept = request.commit(item.tokens)
        request.num_target_kv = before + min(item.num_accepted, len(kept))
        if request.constraints is not None:
            request.constraints.commit(kept)
            if request.constraints.failed:
                request.finish_reason = "error"
        self.proposers.committed(request, before, item.proposal, item.num_accepted)
        request.count(item.proposal.version, len(item.proposal.tokens), item.num_accepted)
        if request.first_token_s is None:
            request.first_token_s = self._clock()
        return kept

    def _end_broken(self, request: Sequence) -> None:
        """Let a request whose logits are NaN or +inf end, and nobody find or inherit what it wrote."""
        request.finish_reason = "error"
        self.scheduler.spoil(request)
        self.stats.not_finite += 1
        log.error("target_not_finite", request_id=request.request_id, position=len(request.tokens))

    def _learn(
        self, ask: Ask, outcome: Outcome, rounds: list[Round], deliveries: list[Delivery], step_s: float
    ) -> None:  # fmt: skip
        """Tell the controller and the counters what the step cost and brought."""
        tags = {id(request): choice.tag for request, choice in zip(ask.ready, ask.choices, strict=True)}
        reports = [
            RoundReport(item.request, item.proposal.proposer, len(item.proposal.tokens), item.num_accepted,
                        len(delivery.token_ids), tags.get(id(item.request)))
            for item, delivery in zip(rounds, deliveries, strict=True)
        ]  # fmt: skip
        drafted = sum(len(item.proposal.tokens) for item in rounds)
        propose_s = ask.choose_s + outcome.draft_s
        self.controller.observe(
            StepReport(
                shape=ask.shape, rounds=reports, rows=sum(plan.num_new for plan in ask.plans) + drafted,
                draft_forwards=outcome.draft_forwards, propose_s=propose_s, target_s=outcome.target_s, step_s=step_s,
            )
        )  # fmt: skip
        self.stats.step(step_s, propose_s, len(rounds))

    def _close(self, request: Sequence, delivered_tokens: int) -> None:
        del self._requests[request.request_id]
        self.scheduler.remove(request)
        self.proposers.ended(request)
        self.rounds.ended(request)
        self.controller.forget(request)
        if self.router is not None:
            for version, counts in request.by_version.items():
                self.router.observe(request.segment, version, counts.num_accepted, counts.num_examined)
        self.recorder.finish(request, delivered_tokens, self._clock())
        self.stats.finished(request)
