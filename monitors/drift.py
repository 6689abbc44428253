"""A sequential test for a drop of acceptance, with a false-alarm rate that is stated and kept.

Knows numbers in [0, 1] and nothing else: no segments, no versions, no Redis, no SQL.  The watcher
feeds it one number a request.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

SECONDS_OF_30_DAYS = 30 * 86400.0
NEAR = 0.02  # a request this close to 0 or 1 is in a tail: corruption, or a repetition loop

_Z95_ONE_SIDED = 1.6448536269514722
_SMALLEST_BET = 1 / 16  # smaller bets only help for drops far inside the margin
_LARGEST_BET = 0.95  # of the largest legal bet: at 1.0 a single request could erase all evidence
_EDGE = 1e-3


def alarm_threshold(*, false_alarms_per_30_days: float, requests_per_s: float, segments: int) -> float:
    """Return A, such that all segments together raise at most so many false alarms in 30 days.

    Each segment may see up to `requests_per_s`.  A segment's average run length is at least A of
    its own requests, so A = segments x requests in 30 days / false alarms: e-detector Bonferroni
    (Dandapanthula and Ramdas, arXiv 2501.04130), valid under any dependence between segments.
    """
    requests = max(1.0, requests_per_s * SECONDS_OF_30_DAYS)
    return max(2.0, max(1, segments) * requests / false_alarms_per_30_days)


class DropEvidence:
    """A mixture e-SR process against "the conditional mean is at least `level`".

    M_k <- (M_k + 1) (1 + lambda_k (level - x)), averaged over bets lambda_k in (0, 1/(1 - level)].
    While the mean stays at or above `level`, P(evidence reaches A within n requests) <= n / A, with
    no assumption but x in [0, 1].  Feed 1 - x and 1 - level to test for a rise instead.
    """

    def __init__(self, level: float, bets: int) -> None:
        self.level = min(1 - _EDGE, max(_EDGE, level))
        largest = _LARGEST_BET / (1 - self.level)
        self._bets: NDArray[np.float64] = np.geomspace(largest * _SMALLEST_BET, largest, bets)
        self.log_m: NDArray[np.float64] = np.full(bets, -np.inf)

    def update(self, x: float) -> None:
        """Add one request."""
        self.log_m = np.logaddexp(0.0, self.log_m) + np.log1p(self._bets * (self.level - x))

    @property
    def log10(self) -> float:
        """log10 of the mean over bets; 0 before the first request."""
        if self.log_m[0] == -np.inf:
            return 0.0
        return float(np.logaddexp.reduce(self.log_m) - math.log(len(self._bets))) / math.log(10)


class DriftDetector:
    """Tell when per-request acceptance fell below a frozen baseline, and when it came back.

    Idea: the first requests set m0, a lower confidence bound of their mean; the bound and not the
    mean, because a baseline from few requests is itself uncertain and an over-estimate would alarm
    for ever.  Then evidence for "the mean is below m0 - margin" grows by betting against it, and the
    alarm is raised at `threshold`.  After an alarm the same process, mirrored, gathers evidence for
    "the mean is above m0 - margin again".  The tokens of one request go together, so an observation
    is one request's accepted / examined; None and NaN (nothing examined) are skipped and counted.

    Args:
        baseline_requests: requests that set the baseline.
        margin: fall below the baseline that is not yet drift.
        threshold: A; see `alarm_threshold`.  May be raised later as segments appear.
        bets: size of the mixture.

    >>> rng = np.random.default_rng(7)
    >>> stream = np.concatenate([rng.beta(12, 8, 400), rng.beta(10, 10, 400)])  # mean 0.6, then 0.5
    >>> detector = DriftDetector(baseline_requests=100, margin=0.02, threshold=1e6)
    >>> for index, x in enumerate(stream):
    ...     if detector.update(x).drift_detected:
    ...         print(f"drift at {index}, evidence 10^{detector.evidence:.1f}, began about {index - detector.since}")
    drift at 526, evidence 10^6.1, began about 381

    Source: Shin, Ramdas, Rinaldo, "E-detectors: a nonparametric framework for sequential change
    detection", New England Journal of Statistics in Data Science 2(2), 2024 (arXiv 2203.03532).
    """

    def __init__(
        self, *, baseline_requests: int = 60, margin: float = 0.02, threshold: float = 1e6, bets: int = 10
    ) -> None:
        self.baseline_requests = baseline_requests
        self.margin = margin
        self.threshold = threshold
        self.bets = bets
        self.requests = self.skipped = 0
        self.near_zero = self.exact_zero = self.near_one = 0
        self.baseline: float | None = None  # m0, once frozen
        self.baseline_mean: float | None = None
        self.drifting = False
        self.drift_detected = self.recovered = False  # what the last update said
        self.since = 0  # requests since the drop began, as far as can be told
        self._since_sum = 0.0
        self._cusum = 0.0
        self._mean = self._squares = 0.0  # Welford's running mean and sum of squared deviations
        self._down: DropEvidence | None = None
        self._up: DropEvidence | None = None

    def update(self, x: float | None) -> DriftDetector:
        """Add one request's acceptance and return the detector itself."""
        self.drift_detected = self.recovered = False
        if x is None or not 0.0 <= x <= 1.0:  # NaN compares false
            self.skipped += 1
            return self
        self.requests += 1
        self.near_zero += x <= NEAR
        self.exact_zero += x == 0.0
        self.near_one += x >= 1 - NEAR
        if self._down is None or self._up is None:
            self._learn(x)
        elif self.drifting:
            self._look_for_recovery(self._up, x)
        else:
            self._look_for_drop(self._down, x)
        return self

    @property
    def evidence(self) -> float:
        """log10 of the evidence for a drop; while drifting, for the recovery; at a change, what decided it."""
        decided_by_up = self.recovered or (self.drifting and not self.drift_detected)
        process = self._up if decided_by_up else self._down
        return 0.0 if process is None else process.log10

    @property
    def needed(self) -> float:
        """The evidence at which the state changes, log10."""
        return math.log10(self.threshold)

    @property
    def recent_mean(self) -> float | None:
        """Mean acceptance of the requests since the drop began."""
        return self._since_sum / self.since if self.since else None

    def _learn(self, x: float) -> None:
        delta = x - self._mean
        self._mean += delta / self.requests
        self._squares += delta * (x - self._mean)
        if self.requests >= self.baseline_requests:
            deviation = math.sqrt(self._squares / max(1, self.requests - 1))
            self._freeze(self._mean, self._mean - _Z95_ONE_SIDED * deviation / math.sqrt(self.requests))

    def _freeze(self, mean: float, bound: float) -> None:
        self.baseline_mean, self.baseline = mean, max(0.0, bound)
        level = self.baseline - self.margin
        self._down = DropEvidence(level, self.bets)
        self._up = DropEvidence(1 - self._down.level, self.bets)

    def _look_for_drop(self, process: DropEvidence, x: float) -> None:
        process.update(x)
        # A CUSUM of one middling bet dates the change: it began after the sum last touched zero.
        bet = 0.5 / (1 - process.level)
        self._cusum = max(0.0, self._cusum) + math.log1p(bet * (process.level - x))
        if self._cusum <= 0:
            self.since, self._since_sum = 0, 0.0
        else:
            self._count_since(x)
        if process.log10 >= self.needed:
            self.drifting = self.drift_detected = True
            self._up = DropEvidence(1 - process.level, self.bets)

    def _look_for_recovery(self, process: DropEvidence, x: float) -> None:
        process.update(1 - x)
        self._count_since(x)
        if process.log10 >= self.needed:
            self.recovered = True
            self.look_again()

    def look_again(self) -> None:
        """End a drift and gather evidence for the next one from nothing, against the same baseline."""
        if self.drifting and self._up is not None:
            self.drifting = False
            self._down = DropEvidence(1 - self._up.level, self.bets)
            self.since, self._since_sum, self._cusum = 0, 0.0, 0.0

    def _count_since(self, x: float) -> None:
        self.since += 1
        self._since_sum += x

    def to_state(self) -> dict[str, Any]:
        """Return everything learnt as plain JSON values."""
        state: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        for name, process in (("down", self._down), ("up", self._up)):
            state[name] = None if process is None else [_finite(value) for value in process.log_m]
        return state

    @classmethod
    def from_state(
        cls, state: dict[str, Any], *, baseline_requests: int, margin: float, threshold: float
    ) -> DriftDetector:
        """Rebuild a detector from `to_state`; a changed margin applies from now on."""
        bets = len(state["down"]) if state["down"] else 10
        detector = cls(baseline_requests=baseline_requests, margin=margin, threshold=threshold, bets=bets)
        if state["baseline"] is not None:
            detector._freeze(state["baseline_mean"], state["baseline"])
        for name in _PLAIN:
            setattr(detector, name, state[name])
        for process, values in ((detector._down, state["down"]), (detector._up, state["up"])):
            if process is not None and values:
                process.log_m = np.array([-np.inf if value is None else value for value in values], dtype=np.float64)
        return detector


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


_PLAIN = (
    "requests",
    "skipped",
    "near_zero",
    "exact_zero",
    "near_one",
    "baseline",
    "baseline_mean",
    "drifting",
    "since",
    "_since_sum",
    "_cusum",
    "_mean",
    "_squares",
)
