"""Judge a freshly promoted version against what was live before it.

Compares like with like: each request of the new version is paired with one request that the
previous version served on the same segment shortly before the promotion, at the drifted level.
The two are not randomised against each other, so a further change of traffic at the very moment of
the promotion would be blamed on the version; that errs to the safe side, because the price of a
wrong roll back is speed.  Knows no registry and no SQL; the loop acts on its verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from adapter.sections import MonitorSettings

ALPHA = 0.05
_GRID = 401  # candidate means on [0, 1]; differences are resolved to 0.005
_BETS = 8
_LIMIT = 10  # times guard_min_requests: after that an open question is answered "keep"


def confidence_sequence(values: Sequence[float], alpha: float = ALPHA) -> tuple[float, float]:
    """Return an interval for the mean of [0, 1] values that holds at all sample sizes at once.

    With probability 1 - alpha the true mean lies in every interval ever computed on a growing
    sample, so one may look after each request.  For every candidate mean m, capital is gathered by
    a mixture of bets that the mean is above m and one that it is below; m is out once the average
    of both reaches 1 / alpha (Ville).

    Source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
    Journal of the Royal Statistical Society B 86(1), 2024 (arXiv 2010.09686), the grid-Kelly bets.
    """
    means: NDArray[np.float64] = np.linspace(0.0, 1.0, _GRID)
    shares = np.geomspace(0.03, 0.95, _BETS)[:, None]
    up = shares / np.maximum(means, 1e-3)
    down = shares / np.maximum(1 - means, 1e-3)
    log_up, log_down = np.zeros_like(up), np.zeros_like(down)
    for value in values:
        log_up += np.log1p(np.maximum(up * (value - means), -0.999))
        log_down += np.log1p(np.maximum(down * (means - value), -0.999))
    capital = np.logaddexp.reduce(np.concatenate([log_up, log_down])) - math.log(2 * _BETS)
    inside = means[capital < math.log(1 / alpha)]
    if not len(inside):  # the sample mean falls between two grid points
        middle = float(np.mean(values))
        return middle, middle
    step = 1 / (_GRID - 1)
    return max(0.0, float(inside[0]) - step), min(1.0, float(inside[-1]) + step)


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict with the sentence and the numbers behind it."""

    verdict: Literal["keep", "roll_back", "wait"]
    reason: str
    pairs: int
    difference: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def evidence(self) -> dict[str, Any]:
        """The numbers as the audit log keeps them."""
        return {"pairs": self.pairs, "difference": self.difference, "interval": self.interval, "confidence": 1 - ALPHA}


class Seen(msgspec.Struct, kw_only=True):
    """One segment of the new version: sums over its requests, and over those that were paired.

    `total` and `paired` sum the new version's acceptances, `gain` new minus previous.
    """

    requests: int = 0
    total: float = 0.0
    pairs: int = 0
    paired: float = 0.0
    gain: float = 0.0


class Guard(msgspec.Struct, kw_only=True):
    """What the new version did so far; plain data, so that it survives a restart.

    `reference` holds, per segment, the previous version's latest acceptances that are not yet
    paired, newest last; `pairs` holds new minus previous, in [-1, 1].  `switch` tells an older
    version that serves again: it was good on other traffic, so a roll back does not forbid it.
    """

    version: int
    previous: int
    reference: dict[str, list[float]]
    pairs: list[float] = msgspec.field(default_factory=list)
    served: int = 0
    seen: dict[str, Seen] = msgspec.field(default_factory=dict)
    switch: bool = False

    def observe(self, segment: str, value: float) -> None:
        """Add one request of the new version, paired with a like one while there are any."""
        self.served += 1
        seen = self.seen.setdefault(segment, Seen())
        seen.requests += 1
        seen.total += value
        waiting = self.reference.get(segment)
        if waiting:
            gain = value - waiting.pop()
            self.pairs.append(gain)
            seen.pairs += 1
            seen.paired += value
            seen.gain += gain

    def judge(self, settings: MonitorSettings) -> Judgement:
        """Say keep, roll back or wait, in one sentence with numbers."""
        need, limit = settings.guard_min_requests, _LIMIT * settings.guard_min_requests
        n, name = len(self.pairs), f"v{self.version}"
        exhausted = self.served >= limit or not any(self.reference.values())
        if n < need:
            reachable = n + sum(len(values) for values in self.reference.values()) >= need
            if self.served < (limit if reachable else need):
                return Judgement(
                    verdict="wait", pairs=n, reason=f"{name} is judged after {need} comparable requests; {n} so far"
                )
            reason = f"kept {name}: only {n} of its {self.served} requests had a comparable one on v{self.previous}"
            return Judgement(verdict="keep", pairs=n, reason=reason)
        low, high = confidence_sequence([(pair + 1) / 2 for pair in self.pairs])
        interval = (2 * low - 1, 2 * high - 1)
        difference = float(np.mean(self.pairs))
        numbers = (
            f"acceptance {difference:+.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}] against v{self.previous}, "
            f"limit {-settings.guard_margin:+.3f}, n={n}"
        )
        verdict: Literal["keep", "roll_back", "wait"]
        if interval[1] < -settings.guard_margin:
            verdict, reason = "roll_back", f"rolled back {name}: {numbers}"
        elif interval[0] > -settings.guard_margin:
            verdict, reason = "keep", f"kept {name}: {numbers}"
        elif exhausted:
            verdict, reason = "keep", f"kept {name}, not proved better or worse: {numbers}"
        else:
            verdict, reason = "wait", f"watching {name}: {numbers}"
        return Judgement(verdict=verdict, reason=reason, pairs=n, difference=difference, interval=interval)
