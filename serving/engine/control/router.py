"""Choose which draft version drafts for a request: the one that fits traffic like it best at present.

The versions are what is live and its alternates.  Their fit to a segment is the share of examined tokens that was
accepted, of requests they drafted for.  For each new request every version's acceptance is drawn from what is known of
it, and the highest draw wins (Thompson sampling): one that was not tried for long is uncertain and gets its chance, one
that is known to be worse hardly any.  What is known fades, and is dropped at once where acceptance has changed; what
the gate forecast of a new version is believed until then.  All versions cost the same, so acceptance is the whole
difference; the text does not depend on the choice.

Sources: Raj and Kalyani, "Taming non-stationary bandits: a Bayesian approach", arXiv 1707.09727 (fading evidence);
Liu, Lee and Shroff, "A change-detection based framework for piecewise-stationary multi-armed bandit problem",
arXiv 1711.03539 (starting over).  Knows nothing of models.  Called by `serving.engine.engine`.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_SEGMENTS = 64  # the one that was used longest ago makes room
_FADE = 1 - 1 / 128  # of evidence, with every request of the segment
_RECENT = 12  # requests that are compared with those before them
_CHANGED = 2.5  # standard errors between the two that count as another traffic
_SPREAD = 0.05  # standard deviation of versions' acceptances around the segment's, before anything is known
# How much more requests differ than their tokens would if each was accepted by a coin of its own: 2.6 to 3.5 on the
# default pair, 5 where the draft was trained on some of the prompts.
_CLUMPING = 3.0
_MOST_GAIN = 0.1  # of what the gate forecast; it saw the prompts that people repeat, too
_START = (0.3, 20.0)  # acceptance of traffic nobody has seen, and the tokens it is worth
_SHOWN = 8
_NOTHING: Mapping[str, float] = {}


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


@dataclass(slots=True)
class _Segment:
    """What is known of each version; whether acceptance has changed since `live` is live."""

    fits: dict[int, _Fit] = field(default_factory=dict)
    live: int | None = None
    changed: bool = False


class Router:
    """What is known of each version on each segment.

    Args:
        pick: draws who is tried.
    """

    def __init__(self, pick: random.Random) -> None:
        self._pick = pick
        self._segments: OrderedDict[str, _Segment] = OrderedDict()

    def choose(self, segment: str, live: int, alternates: Sequence[int], gain: Mapping[str, float] = _NOTHING) -> int:
        """Return the version that is to draft for a new request.

        Args:
            gain: acceptance that the live version's gate forecast it to win, by segment; "" stands for all others.
        """
        if not alternates:
            return live
        known = self._of(segment)
        if known.live != live:
            known.live, known.changed = live, False
        laws = self._laws(segment, live, alternates, gain)
        drawn = {version: self._pick.gauss(*law) for version, law in laws.items()}
        return max(drawn, key=lambda version: drawn[version])

    def observe(self, segment: str, version: int, accepted: int, examined: int) -> None:
        """Hear what became of a request's tokens that a version drafted."""
        if not examined:
            return
        known = self._of(segment)
        fits = known.fits
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
            known.changed = True
            own.accepted, own.examined = _sums(own.recent)
            own.recent.clear()
            fits[version] = own

    def explain(self, live: int, alternates: Sequence[int], gain: Mapping[str, float] = _NOTHING) -> dict[str, Any]:
        """Return the acceptance each version is believed to have, of the segments that were used last; newest first."""
        found = {}
        for segment in list(reversed(self._segments))[:_SHOWN]:
            laws = self._laws(segment, live, alternates, gain)
            found[segment] = {str(version): round(mean, 3) for version, (mean, _) in laws.items()}
        return found

    def _laws(
        self, segment: str, live: int, alternates: Sequence[int], gain: Mapping[str, float]
    ) -> dict[int, tuple[float, float]]:  # fmt: skip
        """Return mean and standard deviation of what is believed of each version's acceptance."""
        known = self._segments.get(segment, _Segment())
        fits = known.fits
        value, weight = _START
        accepted = value * weight + sum(fit.accepted for fit in fits.values())
        common = accepted / (weight + sum(fit.examined for fit in fits.values()))
        won = 0.0 if known.changed else gain.get(segment, gain.get("", 0.0))
        forecast = common + min(_MOST_GAIN, max(-_MOST_GAIN, won))
        return {
            version: _belief(fits.get(version), forecast if version == live else common)
            for version in (live, *alternates)
        }

    def _of(self, segment: str) -> _Segment:
        found = self._segments.setdefault(segment, _Segment())
        self._segments.move_to_end(segment)
        if len(self._segments) > MAX_SEGMENTS:
            self._segments.popitem(last=False)
        return found


def _belief(fit: _Fit | None, expected: float) -> tuple[float, float]:
    """Weigh a version's own acceptance against what is expected of it, as normal laws; return mean and deviation."""
    prior = 1 / _SPREAD**2
    if fit is None or not fit.examined:
        return expected, _SPREAD
    own = fit.examined / _variance(expected)
    mean = (own * fit.accepted / fit.examined + prior * expected) / (own + prior)
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
