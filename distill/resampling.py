"""How certain a mean over requests is: an interval for a ratio of sums, from few requests of very unequal length.

The tokens of a request hang together, so whole requests are what is drawn.  A percentile bootstrap is too narrow
for ten to thirty of them: it promotes about twice as many candidates without an improvement as its level allows.
Two intervals are made instead, and the wider side of each counts:

- Student's t on the standard error of the leave-one-request-out jackknife (Efron and Stein, 1981; Cochran,
  Sampling Techniques, 1977, chapter 6), with the degrees of freedom of Kish's effective number of requests,
  (Σw)² / Σw² - 1 (Survey Sampling, 1965).  It holds its level where a few long requests carry most of the weight.
- Bootstrap-t (Hall, 1988; Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 12).  It sees when
  many requests gain a little and a few lose much, which the first one does not.

No interval made from the data alone can know of a loss that only requests not drawn would show.  Knows nothing
about drafts or blocks.  Called by `distill.verdict` and `distill.goodput`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_RESAMPLES = 2000
_BEYOND = 25  # resamples that must lie beyond the quantile that is asked for
_MOST_RESAMPLES = 20_000
_GRID = 1 << 16
_CELLS = 1 << 20  # of the [resamples, requests] intermediate held at the same time


def sum_by(keys: Iterable[Hashable], *values: Iterable[float]) -> Floats:
    """Add up values that have the same key.

    Shapes: as many keys as there are entries in each of v `values`; result [distinct keys, v], in order of first use.
    """
    places: dict[Hashable, int] = {}
    index = [places.setdefault(key, len(places)) for key in keys]
    columns = [np.bincount(index, weights=list(value), minlength=len(places)) for value in values]
    return np.stack(columns, 1) if index else np.empty((0, len(columns)))


def ratio_interval(gains: Floats, weights: Floats, *, confidence: float, seed: int) -> tuple[float, float]:
    """Return a two-sided interval for Σ gains / Σ weights, each side beyond it with (1 - confidence) / 2.

    Shapes: gains and weights [requests], weights positive.  With fewer than two requests nothing is known, and
    the interval is (-inf, inf).
    """
    if len(gains) < 2:
        return -math.inf, math.inf
    ratio, error = float(gains.sum() / weights.sum()), float(_error(gains[None], weights[None])[0])
    if error == 0.0:
        return ratio, ratio
    tail = (1 - confidence) / 2
    effective = float(weights.sum() ** 2 / np.square(weights).sum())
    reach = t_quantile(1 - tail, max(1.0, effective - 1))
    low, high = np.quantile(_studentised(gains, weights, tail, seed), [tail, 1 - tail])
    return ratio - error * max(reach, float(high)), ratio + error * max(reach, -float(low))


def t_quantile(probability: float, freedom: float) -> float:
    """Return a quantile, of at least a half, of Student's t with any real number of degrees of freedom from 1 on.

    With T = √freedom · tan θ the density of θ is cos(θ)^(freedom - 1), which is summed up on a fine grid.
    """
    angle = np.linspace(0.0, math.pi / 2, _GRID)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    return float(math.sqrt(freedom) * math.tan(np.interp((2 * probability - 1) * mass[-1], mass, angle)))


def _error(gains: Floats, weights: Floats) -> Floats:
    """Return the jackknife's standard error of Σ gains / Σ weights.  Shapes: [rows, requests] to [rows]."""
    total = weights.sum(1, keepdims=True)
    others = np.maximum(total - weights, np.finfo(np.float64).tiny)
    moved = (gains - gains.sum(1, keepdims=True) / total * weights) / others
    count = gains.shape[1]
    error: Floats = np.sqrt((count - 1) / count * np.square(moved).sum(1))
    return error


def _studentised(gains: Floats, weights: Floats, tail: float, seed: int) -> Floats:
    """Return (ratio of a resample - ratio) / its standard error, for resamples of whole requests.

    Resamples of one request over and over have no error of their own and say nothing; they are left out.
    """
    count = len(gains)
    ratio = gains.sum() / weights.sum()
    resamples = min(_MOST_RESAMPLES, max(_RESAMPLES, math.ceil(_BEYOND / tail)))
    draw, found = np.random.default_rng(seed), []
    rows = max(1, _CELLS // count)
    for at in range(0, resamples, rows):
        chosen = draw.integers(count, size=(min(rows, resamples - at), count))
        own, weight = gains[chosen], weights[chosen]
        error = _error(own, weight)
        usable = error > 1e-9 * np.abs(ratio) + np.finfo(np.float64).tiny
        drawn = own.sum(1) / weight.sum(1)
        found.append((drawn[usable] - ratio) / error[usable])
    values = np.concatenate(found)
    return values if len(values) else np.zeros(1)
