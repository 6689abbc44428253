"""Choose which draft version drafts for a request: the one that fits traffic like it best at present.

The versions are what is live and its alternates.  Their fit to a segment is the share of examined tokens that was
accepted, of requests they drafted for.  For each new request every version's acceptance is drawn from what is known of
it, and the highest draw wins (Thompson sampling): one that was not tried for long is uncertain and gets its chance, one
that is known to be worse hardly any.  What is known fades, and is dropped at once where acceptance has changed.  All
versions cost the same, so acceptance is the whole difference; the text does not depend on the choice.

Sources: Raj and Kalyani, "Taming non-stationary bandits: a Bayesian approach", arXiv 1707.09727 (fading evidence);
Liu, Lee and Shroff, "A change-detection based framework for piecewise-stationary multi-armed bandit problem",
arXiv 1711.03539 (starting over).  Knows nothing of models.  Called by `serving.engine.engine`.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_SEGMENTS = 64  # the one that was used longest ago makes room
_FADE = 1 - 1 / 128  # of evidence, with every request of the segment
_RECENT = 12  # requests that are compared with those before them
_CHANGED = 2.5  # standard errors between the two that count as another traffic
_SPREAD = 0.05  # standard deviation of versions' acceptances around the segment's, before anything is known
_CLUMPING = 3.0  # how much more requests differ than their tokens would if each was accepted by a coin of its own
_START = (0.3, 20.0)  # acceptance of traffic nobody has seen, and the tokens it is worth
_SHOWN = 8


@dataclass(slots=True)
class _Fit:
    """Faded sums of accepted and examined tokens of one version, and its latest requests, newest last."""

    accepted: float = 0.0
    examined: float = 0.0
    recent: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def changed(self) -> bool:
        """Whether the latest requests certainly differ from what came before them."""
        accepted, examined = _sums(self.recent)
        before = self.examined - examined
        if len(self.recent) < _RECENT or before <= examined:
            return False
        error = math.sqrt(_variance(self.accepted / self.examined) * (1 / examined + 1 / before))
        return abs(accepted / examined - (self.accepted - accepted) / before) > _CHANGED * error


class Router:
    """What is known of each version on each segment.

    Args:
        pick: draws who is tried.
    """

    def __init__(self, pick: random.Random) -> None:
        self._pick = pick
        self._segments: OrderedDict[str, dict[int, _Fit]] = OrderedDict()

    def choose(self, segment: str, live: int, alternates: Sequence[int]) -> int:
        """Return the version that is to draft for a new request."""
        if not alternates:
            return live
        drawn = {version: self._pick.gauss(*law) for version, law in self._laws(segment, (live, *alternates)).items()}
        return max(drawn, key=lambda version: drawn[version])

    def observe(self, segment: str, version: int, accepted: int, examined: int) -> None:
        """Hear what became of a request's tokens that a version drafted."""
        if not examined:
            return
        fits = self._of(segment)
        for number, fit in list(fits.items()):
            fit.accepted *= _FADE
            fit.examined *= _FADE
            if fit.examined < 1:  # a version that has not drafted here for long, and perhaps never will again
                del fits[number]
        own = fits.setdefault(version, _Fit())
        own.accepted += accepted
        own.examined += examined
        own.recent.append((accepted, examined))
        if own.changed():
            fits.clear()
            own.accepted, own.examined = _sums(own.recent)
            own.recent.clear()
            fits[version] = own

    def explain(self, versions: Sequence[int]) -> dict[str, Any]:
        """Return the acceptance each version is believed to have, of the segments that were used last; newest first."""
        found = {}
        for segment in list(reversed(self._segments))[:_SHOWN]:
            laws = self._laws(segment, versions)
            found[segment] = {str(version): round(mean, 3) for version, (mean, _) in laws.items()}
        return found

    def _laws(self, segment: str, versions: Sequence[int]) -> dict[int, tuple[float, float]]:
        """Return mean and standard deviation of what is believed of each version's acceptance."""
        fits = self._segments.get(segment, {})
        value, weight = _START
        accepted = value * weight + sum(fit.accepted for fit in fits.values())
        common = accepted / (weight + sum(fit.examined for fit in fits.values()))
        return {version: _belief(fits.get(version), common) for version in versions}

    def _of(self, segment: str) -> dict[int, _Fit]:
        fits = self._segments.setdefault(segment, {})
        self._segments.move_to_end(segment)
        if len(self._segments) > MAX_SEGMENTS:
            self._segments.popitem(last=False)
        return fits


def _belief(fit: _Fit | None, common: float) -> tuple[float, float]:
    """Weigh a version's own acceptance against that of the segment, as normal laws; return mean and deviation."""
    prior = 1 / _SPREAD**2
    if fit is None or not fit.examined:
        return common, _SPREAD
    own = fit.examined / _variance(common)
    mean = (own * fit.accepted / fit.examined + prior * common) / (own + prior)
    return mean, math.sqrt(1 / (own + prior))


def _variance(share: float) -> float:
    """Return the variance of one token's acceptance, as requests show it."""
    bounded = min(0.99, max(0.01, share))
    return _CLUMPING * bounded * (1 - bounded)


def _sums(requests: Iterable[tuple[int, int]]) -> tuple[float, float]:
    accepted = examined = 0
    for one, two in requests:
        accepted, examined = accepted + one, examined + two
    return float(accepted), float(examined)
