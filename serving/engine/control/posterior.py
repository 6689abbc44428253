"""What is believed about acceptance: per request, and per kind of request before it has spoken for itself.

A drafted token is examined only if those before it were accepted, so what is learned is the chance
that an examined token is accepted, by request and mildly by position; a token that was not examined
says nothing.  Knows nothing about cost.  Used by `adaptive`.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from serving.engine.control.cost_table import Floats
from serving.engine.control.priors import FADING, HERITAGE, Positions, Prior

_KINDS = 256  # kinds remembered; the one unused longest goes first
_STRETCH = 48.0  # examined tokens after which a running request says how it did
_HIGHEST = 0.985
_BUCKETS = (0, 2, 4, 8, 16)

Kind = tuple[str, int, str, int]  # segment ("" is all), draft version, proposer, bucket of the match length


def match_bucket(match_tokens: int) -> int:
    """Return which of a few classes a match of this length is in; longer matches are better kept."""
    return sum(match_tokens > edge for edge in _BUCKETS)


def _match_words(bucket: int) -> str:
    """Spell the match lengths of a class: "3-4"; empty for a draft model, which matches nothing."""
    if bucket == 0:
        return ""
    return f"{_BUCKETS[bucket - 1] + 1}-{_BUCKETS[bucket]}" if bucket < len(_BUCKETS) else f"over {_BUCKETS[-1]}"


@dataclass(slots=True)
class _Record:
    """One request under one kind: forgetting sums for itself, plain ones of the stretch for the kind's spread."""

    accepted: float = 0.0
    examined: float = 0.0
    all_accepted: float = 0.0
    all_examined: float = 0.0
    changes: int = 0  # of its kind, when it was last looked at


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
    _positions: dict[str, Positions] = field(default_factory=dict)

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

    def positions(self, proposer: str) -> Positions:
        """How acceptance changes along this proposer's drafts."""
        if proposer not in self._positions:
            self._positions[proposer] = Positions(self.max_gamma)
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
            record.accepted, record.examined = HERITAGE * record.accepted, HERITAGE * record.examined
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

    def fade(self, periods: int) -> None:
        """Trust what is not observed any more a little less; called now and then while nothing is drafted."""
        for prior in self.priors.values():
            prior.fade(periods)
        keep = FADING**periods
        for records in self._records.values():
            for record in records.values():
                record.examined *= keep
                record.accepted *= keep
        self.renew()

    def _stretch_ends(self, kind: Kind, record: _Record) -> None:
        for known in (kind, ("", *kind[1:])):
            self.prior(known).request_seen(record.all_accepted, record.all_examined)
        record.all_accepted = record.all_examined = 0.0

    def explain(self, limit: int = 12) -> dict[str, object]:
        """Return the kinds used last and some running requests, in plain values."""
        kinds = [
            {
                "segment": kind[0] or "(all)", "version": kind[1], "proposer": kind[2],
                "match_tokens": _match_words(kind[3]),
                "acceptance": round(prior.mean, 4), "examined": round(prior.examined, 1),
                "strength": round(prior.strength, 1),
            }
            for kind, prior in list(self.priors.items())[: -limit - 1 : -1]
        ]  # fmt: skip
        requests = [
            {"request": name, "proposer": kind[2], "match_tokens": _match_words(kind[3]),
             "acceptance": round(self.mean(name, kind), 4), "examined": round(record.examined, 1)}
            for name, records in list(self._records.items())[:limit] for kind, record in list(records.items())[:2]
        ]  # fmt: skip
        shapes = {name: [round(factor, 3) for factor in item.factors] for name, item in self._positions.items()}
        return {"kinds": kinds, "requests": requests, "positions": shapes}
