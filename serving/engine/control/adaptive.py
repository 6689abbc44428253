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
from dataclasses import dataclass, field

import numpy as np

from serving.engine.control.base import PLAIN, Choice, StepReport, StepShape
from serving.engine.control.cost_model import CostModel
from serving.engine.control.explorer import Explorer
from serving.engine.control.posterior import Beliefs, Kind
from serving.engine.control.rest import Rest
from serving.engine.control.search import OFF_RULE, Priced, price, price_matches
from serving.engine.control.switchback import Step, Switchback
from serving.engine.control.view import DRAFT, StepView, kind_of, own_choice
from serving.engine.proposers.base import Offer
from serving.engine.sequence import Sequence

_GAMMA_RATE = 0.02
_FADE_STEPS = 16

REASONS = {
    "speculate": "drafting up to {depth} tokens promises {best:.1f} tokens/s against {plain:.1f} without",
    "kept": "{depth} tokens were the choice before, and no other promises {hysteresis:.0%} more than its {now:.1f} "
    "tokens/s",
    "matches": "only text matches are worth verifying: {now:.1f} tokens/s against {plain:.1f} without",
    "off": "the best, {depth_best} tokens, promises {best:.1f} tokens/s: less than {off_rule:.0%} of the {plain:.1f} "
    "without",
    "off_matches": "the text matches at hand promise {now:.1f} tokens/s: less than {off_rule:.0%} of the {plain:.1f} "
    "without",
    "probe": "{best:.1f} tokens/s at best against {plain:.1f} without; one request drafts all the same, to learn",
    "window": "a short window without speculation, to measure what it brings",
    "bypass": "speculation was measured to be slower than none; it is tried again later",
    "own": "every request named its own draft length, or switched speculation off",
    "nothing": "nothing was chosen yet, or no proposer had anything to offer",
}


@dataclass(slots=True)
class Decision:
    """The last choice, as numbers; words are made when somebody asks."""

    reason: str = "nothing"
    depth: int = 0
    alternatives: list[float] = field(default_factory=list)  # tokens per second by depth
    slots: list[int] = field(default_factory=list)
    plain: float = 0.0
    gammas: list[int] = field(default_factory=list)
    batch: int = 0


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
        self._kinds: dict[str, Kind] = {}  # of the proposal that runs now
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
        silent = self.switchback.plain_now(blocked=any(choice.gamma for choice in choices))
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
                idle = reason in ("off", "matches") and all(request.gamma is None for request in requests)
                if idle:
                    self._rest.begin(ids)
                else:
                    self._rest.end()
        elif any(request.gamma is not None for request in requests):
            reason = "own"
            self.decision = Decision(reason, batch=len(requests))
        # else it is the last round of a request, and what was decided before it is worth more to a reader
        self._note(reason, requests, offers, choices)
        return choices

    def observe(self, report: StepReport) -> None:
        """Learn from a step: acceptance, cost, and what speculation brought."""
        gained = 0
        for item in report.rounds:
            gained += item.num_kept
            kind = self._kinds.get(item.request.request_id)
            if item.num_drafted and kind is not None and item.proposer == kind[2]:
                self.beliefs.observe(item.request.request_id, kind, item.num_drafted, item.num_accepted)
        self.beliefs.renew()
        self.costs.observe(report)
        self.explorer.elapsed(report.step_s)
        batch = len(report.rounds)
        if batch:
            sampled = sum(item.request.sampling.temperature > 0 for item in report.rounds)
            plain_s, prefill_s = self.costs.plain_s(report.shape, batch, sampled)
            drafted = any(item.num_drafted for item in report.rounds)
            self.switchback.observe(Step(report.step_s, plain_s, prefill_s, gained / batch, drafted))

    def forget(self, request: Sequence) -> None:
        """Keep what a finished request taught about its kind, and nothing else of it."""
        self.beliefs.forget(request.request_id)
        self.explorer.forget(request.request_id)
        self._rest.end()
        self._kinds.pop(request.request_id, None)

    def explain(self) -> dict[str, object]:
        """Return, in plain values of bounded size, what is known and why the last choice was made."""
        return {
            "controller": "adaptive", "steps": self.steps, "changes": self.changes,
            "gamma_mean": round(self.gamma_mean, 4), "reasons": dict(self.reasons), "decision": self._explained(),
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
        reason, depth, num_slots = self._pick(priced)
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
        if probe is not None:
            at = view.index(probe[0])
            choices[at] = Choice(probe[1], min(1 if probe[1] == DRAFT else 2, offers[at][probe[1]].num_tokens))
            reason = "probe"
        self.decision = Decision(
            reason, depth, priced.tokens_per_s.tolist(), priced.slots.tolist(), priced.plain, gammas, len(requests)
        )
        return reason

    def _pick(self, priced: Priced) -> tuple[str, int, int]:
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
        if len(rates) == 1:
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

    def _set_depth(self, depth: int) -> None:
        self.changes += depth != self._depth
        self._depth = depth

    # -- telling -----------------------------------------------------------------------------

    def _note(
        self, reason: str, requests: list[Sequence], offers: list[dict[str, Offer]], choices: list[Choice]
    ) -> None:
        """Remember what will be reported on, and count."""
        self.reasons[reason] += 1
        total = 0
        for request, offer, choice in zip(requests, offers, choices, strict=True):
            if choice.gamma and choice.proposer is not None:
                total += choice.gamma
                self._kinds[request.request_id] = kind_of(request, choice.proposer, offer[choice.proposer])
        self.gamma_mean += max(_GAMMA_RATE, 1 / self.steps) * (total / len(requests) - self.gamma_mean)

    def _explained(self) -> dict[str, object]:
        last = self.decision
        rates = last.alternatives
        drafted = len(rates) > 1  # else only matches were priced
        best = int(np.argmax(rates[1:])) + 1 if drafted else 0
        words = "off_matches" if last.reason == "off" and not drafted else last.reason
        sentence = REASONS[words].format(
            depth=last.depth, depth_best=best, best=rates[best] if rates else 0.0, plain=last.plain,
            now=rates[last.depth] if rates else 0.0, hysteresis=self._hysteresis, off_rule=OFF_RULE,
        )  # fmt: skip
        alternatives = [
            {"gamma": depth, "tokens_per_s": round(rate, 3), "drafted": slots}
            for depth, (rate, slots) in enumerate(zip(rates, last.slots, strict=True))
        ]
        return {
            "reason": last.reason, "sentence": sentence, "gamma": last.depth, "batch": last.batch,
            "plain_tokens_per_s": round(last.plain, 3), "alternatives": alternatives, "gammas": last.gammas[:64],
        }  # fmt: skip


def adaptive(
    costs: CostModel, *, gamma_max: int, hysteresis: float, switchback_share: float, explore_share: float, seed: int
) -> AdaptiveController:
    """Put a controller together; the random numbers of its windows and probes follow from `seed`."""
    return AdaptiveController(
        costs, Switchback(switchback_share, random.Random(seed)), Explorer(explore_share, random.Random(seed + 1)),
        gamma_max=gamma_max, hysteresis=hysteresis,
    )  # fmt: skip
