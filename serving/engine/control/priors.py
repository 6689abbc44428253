"""What is known of one kind of request: its acceptance, how sure that is, and how much its requests differ.

Sums that forget, and nothing else.  Used by `posterior`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

START = (0.5, 4.0)  # acceptance nobody measured, and how many examined tokens that is worth
HERITAGE = 0.3  # what is still believed of what was known before a change
_HERITAGE_TOKENS = 24.0
_KIND_FORGETTING, _RECENT_FORGETTING = 0.998, 0.97  # an examined token
_RECENT_VARIANCE = (1 - _RECENT_FORGETTING) / (1 + _RECENT_FORGETTING)  # of a mean that forgets so fast
_CHANGED = 3.0  # deviations between the recent mean and the long one that are taken for a change
_RECENT_ENOUGH = 16.0
_SPREAD_FORGETTING = 0.98  # a request, or a stretch of one
_OPTIMISM = 0.7  # standard deviations a kind is believed to be better than it was seen to be
_STRENGTH = (4.0, 200.0)  # examined tokens a kind's mean is worth for one of its requests
_START_STRENGTH = 10.0
FADING = 0.94  # of what is not observed any more, each time
_FADED_TOKENS = 12.0
_POSITION_WEIGHT = 40.0  # examined tokens before a position may differ from the others
_POSITION_LIMITS = (0.6, 1.4)
_POSITION_EVERY = 32  # rounds
_POSITION_FORGETTING = 0.97


def _surprise(strength: float) -> float:
    """Squared distance of a recent mean, for a variance of 1, that chance and one odd request do not explain."""
    return _CHANGED**2 * (_RECENT_VARIANCE + 1 / (strength + 1))


@dataclass(slots=True)
class Prior:
    """What is known of one kind of request; all sums forget.

    `strength` is how many examined tokens its mean is worth for one of its requests.
    """

    accepted: float = START[0] * START[1]
    examined: float = START[1]
    changes: int = 0
    recent_accepted: float = 0.0
    recent_examined: float = 0.0
    requests: float = 0.0
    tokens: float = 0.0  # Σ n over finished requests, n tokens examined, x accepted
    tokens_squared: float = 0.0  # Σ n²
    kept: float = 0.0  # Σ x
    spread: float = 0.0  # Σ x²/n
    strength: float = _START_STRENGTH
    seen_lately: bool = False  # since it was last asked to fade
    _surprise: float = _surprise(_START_STRENGTH)

    @property
    def mean(self) -> float:
        """Chance that an examined token was accepted."""
        return min(1.0, self.accepted / self.examined)

    @property
    def hope(self) -> float:
        """The mean and a little more while little was seen: what is switched off too early stays unknown."""
        likely = (self.accepted + 0.5) / (self.examined + 1)  # never 0 or 1, where nothing would be uncertain
        return min(1.0, self.mean + _OPTIMISM * math.sqrt(likely * (1 - likely) / (self.examined + 1)))

    def tokens_seen(self, accepted: float, examined: float) -> None:
        """Learn from one round; where the last few dozen tokens disagree, only they count from now on."""
        self.seen_lately = True
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

    def request_seen(self, accepted: float, examined: float) -> None:
        """Learn how much one request differed from the others, when it is over."""
        if examined < 1:
            return
        added = (1.0, examined, examined * examined, accepted, accepted * accepted / examined)
        before = (self.requests, self.tokens, self.tokens_squared, self.kept, self.spread)
        new = [_SPREAD_FORGETTING * old + item for old, item in zip(before, added, strict=True)]
        self.requests, self.tokens, self.tokens_squared, self.kept, self.spread = new
        self.strength = self._moments()
        self._surprise = _surprise(self.strength)

    def _moments(self) -> float:
        """Work out the strength by moments: requests that differ more than coin tosses would are worth little
        to each other.  Source: Kleinman 1973, on the beta-binomial.
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

    def fade(self, periods: int) -> None:
        """Trust what was not observed since the last call a little less, the longer that is ago."""
        if self.seen_lately:
            self.seen_lately = False
        elif self.examined > _FADED_TOKENS:
            keep = max(FADING**periods, _FADED_TOKENS / self.examined)
            self.examined *= keep
            self.accepted *= keep

    def heir(self) -> Prior:
        """Return what a new kind that resembles this one starts from."""
        weight = min(HERITAGE * self.examined, _HERITAGE_TOKENS)
        weight = max(weight, START[1])
        return Prior(
            accepted=self.mean * weight, examined=weight, requests=self.requests, tokens=self.tokens,
            tokens_squared=self.tokens_squared, kept=self.kept, spread=self.spread, strength=self.strength,
            _surprise=self._surprise,
        )  # fmt: skip


class Positions:
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
