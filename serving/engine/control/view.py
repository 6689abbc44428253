"""One step, turned from requests and offers into the arrays that `search` prices.  Used by `adaptive`."""

from __future__ import annotations

import numpy as np

from serving.engine.control.base import PLAIN, Choice, StepShape
from serving.engine.control.cost_model import CostModel
from serving.engine.control.posterior import Beliefs, Kind, match_bucket
from serving.engine.control.search import Problem
from serving.engine.proposers.base import Offer
from serving.engine.sequence import Sequence

DRAFT = "draft"  # the proposer whose tokens cost forwards; all others only cost rows
_LEAST_PRICE = 0.1  # of a probe's cost, however much it is believed to bring
_LONGEST_DWELL = 256  # rounds a draft that caught up is expected to serve, at the most


class StepView:
    """One step as the search needs it."""

    def __init__(
        self, beliefs: Beliefs, costs: CostModel, requests: list[Sequence], offers: list[dict[str, Offer]],
        shape: StepShape, choices: list[Choice],
    ) -> None:  # fmt: skip
        self._beliefs, self._costs = beliefs, costs
        self._requests, self._offers, self._shape = requests, offers, shape
        self.free_names = [""] * len(requests)
        batch, width = len(requests), beliefs.max_gamma
        limits, means, backlog = [0] * batch, [0.5] * batch, [1] * batch
        self._free = np.zeros((batch, width))
        own_rows = np.zeros(width, dtype=np.int64)
        own_backlog, own_gain = 0, 0.0
        for i, (request, offer) in enumerate(zip(requests, offers, strict=True)):
            if request.gamma is not None:
                gamma, name = choices[i].gamma, choices[i].proposer
                if gamma and name is not None:
                    mean = beliefs.mean(request.request_id, kind_of(request, name, offer[name]))
                    own_gain += sum(beliefs.front(mean, name, gamma))
                    if name == DRAFT:
                        own_rows[:gamma] += 1
                        own_backlog += offer[name].backlog_tokens
                continue
            for name, item in offer.items():
                mean = beliefs.mean(request.request_id, kind_of(request, name, item))
                if name == DRAFT:
                    limits[i], means[i], backlog[i] = min(item.num_tokens, width), mean, item.backlog_tokens
                else:
                    self._consider(i, name, mean, min(item.num_tokens, width))
        draft = beliefs.survival(means, DRAFT)
        if min(limits) < width:
            draft[np.arange(width) >= np.array(limits)[:, None]] = 0.0
        self._once_s = [self._reading_s(tokens) for tokens in backlog]
        catch_up_s = np.array([s / self._dwell(r) if s else 0.0 for s, r in zip(self._once_s, requests, strict=True)])
        self.problem = Problem(
            draft=draft, free=self._free, catch_up_s=catch_up_s, prefill_rows=shape.prefill_tokens,
            context_tokens=shape.context_tokens,
            sampled_share=sum(request.sampling.temperature > 0 for request in requests) / batch,
            own_rows=own_rows, own_backlog=own_backlog, own_gain=own_gain,
        )  # fmt: skip

    def candidates(self, choices: list[Choice], plain: float) -> list[tuple[str, str, float, float]]:
        """Return what could be probed, and what one more request's try would cost beyond what it will bring.

        `plain` is the tokens per second without drafting: what a token is worth.
        """
        costs, context = self._costs, self._shape.context_tokens
        batch = len(self._requests)
        row_s = float(costs.more_target_s(batch + self.problem.prefill_rows, 3, self.problem.sampled_share)[2]) / 2
        one_s = costs.draft_s(1, 0, context / batch)
        token_s = 1 / plain if plain > 0 else 0.0
        found = []
        for i, (request, offer) in enumerate(zip(self._requests, self._offers, strict=True)):
            if request.gamma is None and not choices[i].gamma:
                for name, item in offer.items():
                    drafts = name == DRAFT
                    mean = self._beliefs.mean(request.request_id, kind_of(request, name, item))
                    whole_s = one_s + row_s if drafts else 2 * row_s
                    round_s = max(_LEAST_PRICE * whole_s, whole_s - mean * token_s)
                    found.append((request.request_id, name, self._once_s[i] if drafts else 0.0, round_s))
        return found

    def index(self, request_id: str) -> int:
        """Return where a request is in the batch."""
        return next(i for i, request in enumerate(self._requests) if request.request_id == request_id)

    def _consider(self, i: int, name: str, mean: float, limit: int) -> None:
        """Keep the free proposal that is expected to bring most."""
        row = self._beliefs.front(mean, name, limit)
        if not self.free_names[i] or sum(row) > self._free[i].sum():
            self._free[i, :limit], self._free[i, limit:] = row, 0.0
            self.free_names[i] = name

    def _reading_s(self, backlog: int) -> float:
        """Seconds the draft needs to read what it missed, beyond the one or two tokens of every round."""
        return self._costs.read_s(backlog - 2) if backlog > 2 else 0.0

    @staticmethod
    def _dwell(request: Sequence) -> float:
        """Rounds a request will probably still run; how far it stops short of its limit nobody knows."""
        return min(_LONGEST_DWELL, max(1.0, (request.max_tokens - request.num_generated) / 4.0))


def own_choice(request: Sequence, offers: dict[str, Offer]) -> Choice:
    """Return what a request that named its own draft length gets: the draft model, or the longest match."""
    gamma = request.gamma or 0  # offers are cut to what max_tokens can still use
    if not gamma or not offers:
        return PLAIN
    name = DRAFT if DRAFT in offers else max(offers, key=lambda item: offers[item].num_tokens)
    return Choice(name, min(gamma, offers[name].num_tokens))


def kind_of(request: Sequence, proposer: str, offer: Offer) -> Kind:
    """Return the kind of request this is to this proposer; only the draft model has versions."""
    return (request.segment, offer.version, proposer, match_bucket(offer.match_tokens))
