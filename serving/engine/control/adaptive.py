"""Choose how each request drafts so that the whole step brings most tokens per second.

Beliefs about acceptance (`posterior`) times prices of forwards (`cost_model`), searched by `search`;
kept steady by a hysteresis, kept honest by plain windows (`switchback`) and kept curious by probes
(`explorer`).  Everything a choice depends on is known before the round: past verdicts, past times,
the text so far, and random numbers of its own.  So a drafted token never decides whether it is
verified, which the maximal coupling needs to stay exact.  Called by the engine once a step.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace

from serving.engine.control.base import PLAIN, Choice, StepReport, StepShape
from serving.engine.control.cost_model import CostModel
from serving.engine.control.decision import Decision
from serving.engine.control.explorer import Explorer
from serving.engine.control.posterior import Beliefs, Kind
from serving.engine.control.rest import Rest
from serving.engine.control.search import OFF_RULE, Priced, price, price_matches
from serving.engine.control.switchback import Mark, Step, Switchback
from serving.engine.control.view import DRAFT, StepView, kind_of, own_choice
from serving.engine.proposers.base import Offer
from serving.engine.sequence import Sequence

_GAMMA_RATE = 0.02
_FADE_STEPS = 16
_LAST_ROUNDS = 2  # a request that fills its max_tokens in so few rounds, all of a draft accepted, is about to end
_IDLE = ("off", "matches", "short", "backlog")  # the draft model does nothing, and will not soon


@dataclass(frozen=True, slots=True)
class Tag:
    """What a choice was, for when its round is heard of: what the step was to measure, and the kind of the draft."""

    mark: Mark
    kind: Kind | None = None


class AdaptiveController:
    """Expected tokens per second decide, over the whole batch.

    Args:
        gamma_max: the longest draft.
        hysteresis: how much better another depth must promise to be before it replaces the one in force.
    """

    def __init__(
        self, costs: CostModel, switchback: Switchback, explorer: Explorer, *, gamma_max: int, hysteresis: float = 0.03
    ) -> None:
        self.costs = costs
        self.switchback = switchback
        self.explorer = explorer
        self.beliefs = Beliefs(max(1, gamma_max))
        self.decision = Decision()
        self.changes = 0  # of the depth in force
        self.steps = 0
        self.reasons: Counter[str] = Counter()
        self.gamma_mean = 0.0
        self._hysteresis = hysteresis
        self._depth = 0
        self._version: int | None = None
        self._rest = Rest()
        self._faded_at = 0

    # -- the interface of a controller ---------------------------------------------------------

    def choose(self, requests: list[Sequence], offers: list[dict[str, Offer]], shape: StepShape) -> list[Choice]:
        """Choose for each ready request; one that named its own length gets that, as far as it is offered."""
        if not requests:
            return []
        self._follow(shape.version)
        choices = [
            PLAIN if request.gamma is None else own_choice(request, offer)
            for request, offer in zip(requests, offers, strict=True)
        ]
        self.steps += 1
        mark = self.switchback.begin_step(blocked=any(choice.gamma for choice in choices))
        silent = mark.plain
        reason = silent or "nothing"
        if silent:
            self.decision = Decision(silent, batch=len(requests))
            self._rest.end()
        elif any(offer for request, offer in zip(requests, offers, strict=True) if request.gamma is None):
            ids = [request.request_id for request in requests]
            if self._rest.take(ids):
                reason = self._match(requests, offers, shape, choices)
            else:
                reason = self._decide(requests, offers, shape, choices)
                if reason in _IDLE and all(request.gamma is None for request in requests):
                    self._rest.begin(ids)
                else:
                    self._rest.end()
        elif any(request.gamma is not None for request in requests):
            reason = "own"
            self.decision = Decision(reason, batch=len(requests))
        # else it is the last round of a request, and what was decided before it is worth more to a reader
        self._count(reason, choices)
        return [
            replace(choice, tag=Tag(mark, _kind_of(request, offer, choice)))
            for request, offer, choice in zip(requests, offers, choices, strict=True)
        ]

    def observe(self, report: StepReport) -> None:
        """Learn from a step: acceptance, cost, and what speculation brought."""
        gained, mark = 0, None
        for item in report.rounds:
            gained += item.num_kept
            if not isinstance(item.tag, Tag):
                continue
            mark, kind = item.tag.mark, item.tag.kind
            if item.num_drafted and kind is not None and item.proposer == kind[2]:
                self.beliefs.observe(item.request.request_id, kind, item.num_drafted, item.num_accepted)
        self.beliefs.renew()
        self.costs.observe(report)
        self.explorer.elapsed(report.step_s)
        batch = len(report.rounds)
        if mark is not None:  # else nobody gained anything, or another controller chose
            sampled = sum(item.request.sampling.temperature > 0 for item in report.rounds)
            plain_s, prefill_s = self.costs.plain_s(report.shape, batch, sampled)
            drafted = any(item.num_drafted for item in report.rounds)
            self.switchback.observe(Step(report.step_s, plain_s, prefill_s, gained / batch, drafted), mark)

    def forget(self, request: Sequence) -> None:
        """Keep what a finished request taught about its kind, and nothing else of it."""
        self.beliefs.forget(request.request_id)
        self.explorer.forget(request.request_id)
        self._rest.end()

    def explain(self) -> dict[str, object]:
        """Return, in plain values of bounded size, what is known and why the last choice was made."""
        return {
            "controller": "adaptive", "steps": self.steps, "changes": self.changes,
            "gamma_mean": round(self.gamma_mean, 4), "reasons": dict(self.reasons),
            "decision": self.decision.explain(self._hysteresis),
            "costs": self.costs.explain(), "beliefs": self.beliefs.explain(),
            "switchback": self.switchback.explain(), "exploration": self.explorer.explain(),
        }  # fmt: skip

    # -- deciding ----------------------------------------------------------------------------

    def _match(
        self, requests: list[Sequence], offers: list[dict[str, Offer]], shape: StepShape, choices: list[Choice]
    ) -> str:
        """Decide about text matches alone, and return the reason; one that drafts nothing leaves the last decision."""
        matches = [{name: item for name, item in offer.items() if name != DRAFT} for offer in offers]
        if not any(matches):
            return "off"
        view = StepView(self.beliefs, self.costs, requests, matches, shape, choices)
        rate, plain, found = price_matches(view.problem, self.costs)
        if rate < OFF_RULE * plain:
            return "off"
        gammas = found.tolist()
        for i, gamma in enumerate(gammas):
            choices[i] = Choice(view.free_names[i], gamma) if gamma else PLAIN
        self.decision = Decision("matches", 0, [rate], [sum(gammas)], plain, gammas, len(requests))
        return "matches"

    def _follow(self, version: int) -> None:
        """Notice a new draft version: old measurements and failed probes say little about it."""
        if self._version is not None and version != self._version:
            self._rest.end()
            self.switchback.forget()
            self.explorer.renew()
        self._version = version

    def _decide(
        self, requests: list[Sequence], offers: list[dict[str, Offer]], shape: StepShape, choices: list[Choice]
    ) -> str:
        """Fill in the choices of the requests that leave it to the server, and return the reason."""
        view = StepView(self.beliefs, self.costs, requests, offers, shape, choices)
        priced = price(view.problem, self.costs)
        nothing = len(priced.tokens_per_s) > 1 and not priced.tokens_per_s[1:].any()
        short = nothing and self._end_soon(requests, offers)
        reason, depth, num_slots = self._pick(priced, short)
        if depth:
            self._faded_at = self.steps  # what is drafted is observed
        if len(priced.tokens_per_s) > 1:  # else there was nothing to decide about the draft model
            self.explorer.decided(drafting=depth > 0)
        gammas = priced.allocate(depth, num_slots).tolist() if num_slots else [0] * len(requests)
        drafted = priced.drafted[depth]
        for i, gamma in enumerate(gammas):
            if gamma:
                choices[i] = Choice(DRAFT if drafted[i] else view.free_names[i], gamma)
        probe = self.explorer.pick(view.candidates(choices, priced.plain)) if not depth else None
        if nothing and reason == "off":
            reason = "short" if short else "backlog"
        if probe is not None:
            at = view.index(probe[0])
            choices[at] = Choice(probe[1], min(1 if probe[1] == DRAFT else 2, offers[at][probe[1]].num_tokens))
            reason = "probe"
        if reason != "short" or self.decision.reason == "nothing":  # what was decided before is worth more to a reader
            self.decision = Decision(
                reason, depth, priced.tokens_per_s.tolist(), priced.slots.tolist(), priced.plain, gammas, len(requests)
            )
        return reason

    def _pick(self, priced: Priced, short: bool) -> tuple[str, int, int]:
        """Apply the off rule and the hysteresis; return the reason, the depth and its slots.

        The draft model is switched on for `OFF_RULE` times what is possible without it, and stays on
        while it promises no less than that: between the two lies the room in which nothing changes.
        """
        rates = priced.tokens_per_s.tolist()
        matches = rates[0] >= OFF_RULE * priced.plain
        without = rates[0] if matches else priced.plain
        idle = ("matches", 0, int(priced.slots[0])) if matches else ("off", 0, 0)
        best = rates.index(max(rates[1:]), 1) if len(rates) > 1 else 0
        before = min(self._depth, len(rates) - 1)
        worth = best > 0 and rates[best] >= OFF_RULE * without
        if before and rates[before] >= without and rates[best] <= (1 + self._hysteresis) * rates[before]:
            return ("speculate" if before == best else "kept"), before, int(priced.slots[before])
        if len(rates) == 1 or short:
            return idle  # too few tokens are left to draft any: that says nothing about the depth in force
        if worth:
            self._set_depth(best)
            return "speculate", best, int(priced.slots[best])
        self._set_depth(0)
        periods = (self.steps - self._faded_at) // _FADE_STEPS
        if periods:
            self._faded_at = self.steps
            self.beliefs.fade(periods)
        return idle

    def _end_soon(self, requests: list[Sequence], offers: list[dict[str, Offer]]) -> bool:
        """Whether all that may draft end within a few rounds."""
        left = [
            request.max_tokens - request.num_generated
            for request, offer in zip(requests, offers, strict=True) if request.gamma is None and DRAFT in offer
        ]  # fmt: skip
        return max(left, default=0) <= _LAST_ROUNDS * (self.beliefs.max_gamma + 1)

    def _set_depth(self, depth: int) -> None:
        self.changes += depth != self._depth
        self._depth = depth

    # -- telling -----------------------------------------------------------------------------

    def _count(self, reason: str, choices: list[Choice]) -> None:
        """Remember what will be reported on."""
        self.reasons[reason] += 1
        total = sum(choice.gamma for choice in choices if choice.proposer is not None)
        self.gamma_mean += max(_GAMMA_RATE, 1 / self.steps) * (total / len(choices) - self.gamma_mean)


def _kind_of(request: Sequence, offers: dict[str, Offer], choice: Choice) -> Kind | None:
    """Return the kind that a round's verdict will be about; None where nothing is drafted."""
    if not choice.gamma or choice.proposer is None:
        return None
    return kind_of(request, choice.proposer, offers[choice.proposer])


def adaptive(
    costs: CostModel, *, gamma_max: int, hysteresis: float, switchback_share: float, explore_share: float, seed: int
) -> AdaptiveController:
    """Put a controller together; the random numbers of its windows and probes follow from `seed`."""
    return AdaptiveController(
        costs, Switchback(switchback_share, random.Random(seed)), Explorer(explore_share, random.Random(seed + 1)),
        gamma_max=gamma_max, hysteresis=hysteresis,
    )  # fmt: skip
