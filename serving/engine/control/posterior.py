"""What is believed about acceptance: per request, and per kind of request before it has spoken for itself.

A drafted token is examined only if those before it were accepted, so what is learned is the chance
that an examined token is accepted, by request and mildly by position; a token that was not examined
says nothing.  Knows nothing about cost.  Used by `adaptive`.
"""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from serving.engine.control.cost_table import Floats

_KINDS = 256  # kinds remembered; the one unused longest goes first
_START = (0.5, 4.0)  # acceptance nobody measured, and how many examined tokens that is worth
_HERITAGE = 0.3  # what a new draft version believes of what was known about the one before
_HERITAGE_TOKENS = 24.0
_KIND_FORGETTING, _RECENT_FORGETTING = 0.998, 0.97  # an examined token
_RECENT_VARIANCE = (1 - _RECENT_FORGETTING) / (1 + _RECENT_FORGETTING)  # of a mean that forgets so fast
_CHANGED = 3.0  # deviations between the recent mean and the long one that are taken for a change
_RECENT_ENOUGH = 16.0
_SPREAD_FORGETTING = 0.98  # a request, or a stretch of one
_STRETCH = 48.0  # examined tokens after which a running request says how it did
_OPTIMISM = 0.7  # standard deviations a kind is believed to be better than it was seen to be
_STRENGTH = (4.0, 200.0)  # examined tokens a kind's mean is worth for one of its requests
_START_STRENGTH = 10.0
_FADING, _FADED_TOKENS = 0.94, 12.0
_POSITION_WEIGHT = 40.0  # examined tokens before a position may differ from the others
_POSITION_LIMITS = (0.6, 1.4)
_POSITION_EVERY = 32  # rounds
_POSITION_FORGETTING = 0.97
_HIGHEST = 0.985
_BUCKETS = (0, 2, 4, 8, 16)

Kind = tuple[str, int, str, int]  # segment ("" is all), draft version, proposer, bucket of the match length


def match_bucket(match_tokens: int) -> int:
    """Return which of a few classes a match of this length is in; longer matches are better kept."""
    return sum(match_tokens > edge for edge in _BUCKETS)


@dataclass(slots=True)
class Prior:
    """What is known of one kind of request; all sums forget."""

    accepted: float = _START[0] * _START[1]
    examined: float = _START[1]
    changes: int = 0
    recent_accepted: float = 0.0
    recent_examined: float = 0.0
    requests: float = 0.0
    tokens: float = 0.0  # Σ n over finished requests, n tokens examined, x accepted
    tokens_squared: float = 0.0  # Σ n²
    kept: float = 0.0  # Σ x
    spread: float = 0.0  # Σ x²/n

    @property
    def mean(self) -> float:
        """Chance that an examined token was accepted."""
        return min(1.0, self.accepted / self.examined)

    @property
    def hope(self) -> float:
        """The mean and a little more while little was seen: what is switched off too early stays unknown."""
        mean = self.mean
        return min(1.0, mean + _OPTIMISM * math.sqrt(mean * (1 - mean) / (self.examined + 1)))

    @property
    def strength(self) -> float:
        """How many examined tokens this is worth for a request of the kind, by moments.

        Requests that differ more than coin tosses would are worth little to each other.
        Source: Kleinman 1973, the beta-binomial by moments.
        """
        if self.requests < 3 or self.tokens <= 0:
            return _START_STRENGTH
        mean = self.kept / self.tokens
        tossed = mean * (1 - mean)
        room = self.tokens - self.tokens_squared / self.tokens - (self.requests - 1)
        if tossed <= 1e-6 or room <= 0:
            return _STRENGTH[1]
        excess = (self.spread - mean * mean * self.tokens) / tossed - (self.requests - 1)
        correlation = min(1.0, max(1e-3, excess / room))
        return min(_STRENGTH[1], max(_STRENGTH[0], 1 / correlation - 1))

    def tokens_seen(self, accepted: float, examined: float) -> None:
        """Learn from one round; where the last few dozen tokens disagree, only they count from now on."""
        keep, keep_recent = _KIND_FORGETTING**examined, _RECENT_FORGETTING**examined
        self.accepted = self.accepted * keep + accepted
        self.examined = self.examined * keep + examined
        self.recent_accepted = self.recent_accepted * keep_recent + accepted
        self.recent_examined = self.recent_examined * keep_recent + examined
        if self.recent_examined < _RECENT_ENOUGH:
            return
        mean = self.mean
        away = abs(self.recent_accepted / self.recent_examined - mean)
        if away * away > self._surprise * max(0.02, mean * (1 - mean)):
            self.accepted, self.examined = self.recent_accepted, self.recent_examined
            self.changes += 1

    @property
    def _surprise(self) -> float:
        """Squared distance of the recent mean, for a variance of 1, that chance and one odd request do not explain."""
        return _CHANGED**2 * (_RECENT_VARIANCE + 1 / (self.strength + 1))

    def request_seen(self, accepted: float, examined: float) -> None:
        """Learn how much one request differed from the others, when it is over."""
        if examined < 1:
            return
        added = (1.0, examined, examined * examined, accepted, accepted * accepted / examined)
        before = (self.requests, self.tokens, self.tokens_squared, self.kept, self.spread)
        new = [_SPREAD_FORGETTING * old + item for old, item in zip(before, added, strict=True)]
        self.requests, self.tokens, self.tokens_squared, self.kept, self.spread = new

    def heir(self) -> Prior:
        """Return what a new kind that resembles this one starts from."""
        weight = min(_HERITAGE * self.examined, _HERITAGE_TOKENS)
        weight = max(weight, _START[1])
        return Prior(
            accepted=self.mean * weight, examined=weight, requests=self.requests, tokens=self.tokens,
            tokens_squared=self.tokens_squared, kept=self.kept, spread=self.spread,
        )  # fmt: skip


@dataclass(slots=True)
class _Record:
    """One request under one kind: forgetting sums for itself, plain ones of the stretch for the kind's spread."""

    accepted: float = 0.0
    examined: float = 0.0
    all_accepted: float = 0.0
    all_examined: float = 0.0
    changes: int = 0  # of its kind, when it was last looked at


class _Positions:
    """How acceptance at each position compares with the request's own mean, for one proposer."""

    def __init__(self, max_gamma: int) -> None:
        self.factors = [1.0] * max_gamma
        self.exposures = [float(i) for i in range(max_gamma + 1)]  # sums of the first i factors
        self._expected = [0.0] * max_gamma
        self._kept = [0.0] * max_gamma
        self._rounds = 0

    def observe(self, mean: float, num_examined: int, num_accepted: int) -> None:
        """Count a round; factors are renewed now and then, and forget slowly."""
        for position in range(num_examined):
            self._expected[position] += mean
            self._kept[position] += position < num_accepted
        self._rounds += 1
        if self._rounds % _POSITION_EVERY:
            return
        low, high = _POSITION_LIMITS
        overall = (sum(self._kept) + 1.0) / (sum(self._expected) + 1.0)  # wrong means are not the positions' doing
        for position, (kept, expected) in enumerate(zip(self._kept, self._expected, strict=True)):
            factor = (kept / overall + _POSITION_WEIGHT) / (expected + _POSITION_WEIGHT)
            self.factors[position] = min(high, max(low, factor))
            self.exposures[position + 1] = self.exposures[position] + self.factors[position]
            self._kept[position] *= _POSITION_FORGETTING
            self._expected[position] *= _POSITION_FORGETTING


@dataclass(slots=True)
class Beliefs:
    """Acceptance of every running request and of every kind.

    `forgetting` is for an examined token of one request.
    """

    max_gamma: int
    forgetting: float = 0.97
    priors: OrderedDict[Kind, Prior] = field(default_factory=OrderedDict)
    _records: dict[str, dict[Kind, _Record]] = field(default_factory=dict)
    _summaries: dict[Kind, tuple[float, float]] = field(default_factory=dict)
    _latest: dict[tuple[str, str, int], Kind] = field(default_factory=dict)
    _positions: dict[str, _Positions] = field(default_factory=dict)

    def mean(self, request_id: str, kind: Kind) -> float:
        """Chance that an examined token of this request is accepted."""
        hope, strength = self.summary(kind)
        records = self._records.get(request_id)
        record = records.get(kind) if records else None
        if record is None:
            return hope
        return (strength * hope + record.accepted) / (strength + record.examined)

    def summary(self, kind: Kind) -> tuple[float, float]:
        """Return a kind's hope and strength, worked out once between two rounds."""
        found = self._summaries.get(kind)
        if found is None:
            prior = self.prior(kind)
            self._summaries[kind] = found = (prior.hope, prior.strength)
        return found

    def positions(self, proposer: str) -> _Positions:
        """How acceptance changes along this proposer's drafts."""
        if proposer not in self._positions:
            self._positions[proposer] = _Positions(self.max_gamma)
        return self._positions[proposer]

    def survival(self, means: list[float], proposer: str) -> Floats:
        """Return the chance that the first j tokens are all accepted; never rises with j.

        Shapes: result [len(means), max_gamma].
        """
        hazards: Floats = np.minimum(np.array(means)[:, None] * self.positions(proposer).factors, _HIGHEST)
        np.cumprod(hazards, axis=1, out=hazards)
        return hazards

    def front(self, mean: float, proposer: str, length: int) -> list[float]:
        """Return one row of `survival`, its first `length` positions."""
        factors = self.positions(proposer).factors[:length]
        return list(accumulate((min(mean * factor, _HIGHEST) for factor in factors), operator.mul))

    def prior(self, kind: Kind) -> Prior:
        """Return what is known of a kind; a new one starts from its nearest relative."""
        found = self.priors.get(kind)
        if found is not None:
            return found
        segment, _, proposer, bucket = kind
        relative = self.priors.get(self._latest.get((segment, proposer, bucket), kind))
        if relative is None and segment:
            relative = self.prior(("", *kind[1:]))
        self.priors[kind] = new = relative.heir() if relative else Prior()
        self._latest[(segment, proposer, bucket)] = kind
        while len(self.priors) > _KINDS:
            gone, _ = self.priors.popitem(last=False)
            self._latest = {key: value for key, value in self._latest.items() if value != gone}
        return new

    def observe(self, request_id: str, kind: Kind, num_drafted: int, num_accepted: int) -> None:
        """Learn from one round: num_accepted + 1 tokens were examined, or all.  `renew` ends a step's rounds."""
        num_examined = min(num_accepted + 1, num_drafted)
        if num_examined <= 0:
            return
        mean = self.mean(request_id, kind)
        positions = self.positions(kind[2])
        exposure = positions.exposures[num_examined]
        record = self._records.setdefault(request_id, {}).setdefault(kind, _Record())
        keep = self.forgetting**num_examined
        record.accepted = record.accepted * keep + num_accepted
        record.examined = record.examined * keep + exposure
        if record.changes != self.prior(kind).changes:  # what it did before a change of its kind says less now
            record.changes = self.prior(kind).changes
            record.accepted, record.examined = _HERITAGE * record.accepted, _HERITAGE * record.examined
            record.all_accepted = record.all_examined = 0.0
        record.all_accepted += num_accepted
        record.all_examined += num_examined
        for known in (kind, ("", *kind[1:])):
            self.prior(known).tokens_seen(num_accepted, exposure)
            self.priors.move_to_end(known)
        if record.all_examined >= _STRETCH:
            self._stretch_ends(kind, record)
        positions.observe(mean, num_examined, num_accepted)

    def forget(self, request_id: str) -> None:
        """Let a request's kinds hear how it did, and drop it."""
        for kind, record in self._records.pop(request_id, {}).items():
            self._stretch_ends(kind, record)

    def renew(self) -> None:
        """Let what was observed count from now on."""
        self._summaries.clear()

    def fade(self) -> None:
        """Trust what is not observed any more a little less; called now and then while nothing is drafted."""
        for prior in self.priors.values():
            if prior.examined > _FADED_TOKENS:
                prior.examined *= _FADING
                prior.accepted *= _FADING
        for records in self._records.values():
            for record in records.values():
                record.examined *= _FADING
                record.accepted *= _FADING
        self.renew()

    def _stretch_ends(self, kind: Kind, record: _Record) -> None:
        for known in (kind, ("", *kind[1:])):
            self.prior(known).request_seen(record.all_accepted, record.all_examined)
        record.all_accepted = record.all_examined = 0.0

    def explain(self, limit: int = 12) -> dict[str, object]:
        """Return the kinds used last and some running requests, in plain values."""
        kinds = [
            {
                "segment": kind[0] or "(all)", "version": kind[1], "proposer": kind[2], "match": kind[3],
                "acceptance": round(prior.mean, 4), "examined": round(prior.examined, 1),
                "strength": round(prior.strength, 1),
            }
            for kind, prior in list(self.priors.items())[: -limit - 1 : -1]
        ]  # fmt: skip
        requests = [
            {"request": name, "proposer": kind[2], "match": kind[3], "acceptance": round(self.mean(name, kind), 4),
             "examined": round(record.examined, 1)}
            for name, records in list(self._records.items())[:limit] for kind, record in list(records.items())[:2]
        ]  # fmt: skip
        shapes = {name: [round(factor, 3) for factor in item.factors] for name, item in self._positions.items()}
        return {"kinds": kinds, "requests": requests, "positions": shapes}
