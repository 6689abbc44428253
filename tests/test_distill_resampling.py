"""Intervals over requests: they hold their level where requests are few and of very unequal length."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from distill.resampling import ratio_interval, sum_by, t_quantile


def requests(draw: np.random.Generator, count: int, effects: str) -> tuple[np.ndarray, np.ndarray]:
    """Gains and weights of requests without a true gain: lengths log-normal, tokens of a request hang together."""
    lengths = np.clip(draw.lognormal(4, 1, count), 4, 1500)
    own = draw.standard_t(3, count) * 0.03 if effects == "heavy" else draw.normal(0, 0.05, count)
    return lengths * own + draw.normal(0, 0.15, count) * np.sqrt(lengths), lengths


@pytest.mark.parametrize("probability", [0.9, 0.975, 0.99875])
@pytest.mark.parametrize("freedom", [1.0, 1.2, 2.0, 3.5, 9.0, 60.0, 1000.0])
def test_t_quantiles_are_those_of_scipy(probability, freedom):
    """Also for degrees of freedom that are not whole."""
    assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-3)


@pytest.mark.parametrize("effects", ["normal", "heavy"])
@pytest.mark.parametrize("count", [10, 20, 60])
def test_no_more_than_its_share_of_true_nothings_looks_like_a_gain(count, effects):
    """n = 400 sets of 10, 20 and 60 requests, seed 1: lower bounds above zero at most 17 times, the level of 2.5 %
    and 2.2 standard errors of it.  A percentile bootstrap has 5 to 8 % at 10 requests."""
    draw = np.random.default_rng(1)
    trials = [requests(draw, count, effects) for _ in range(400)]
    wrong = sum(ratio_interval(*item, confidence=0.95, seed=i)[0] > 0 for i, item in enumerate(trials))
    assert wrong <= 17


def test_true_gains_are_found():
    """n = 200 sets of 30 requests that gain 0.06, seed 2: the lower bound is above zero in at least 85 %."""
    draw = np.random.default_rng(2)
    found = 0
    for i in range(200):
        gains, weights = requests(draw, 30, "normal")
        found += ratio_interval(gains + 0.06 * weights, weights, confidence=0.95, seed=i)[0] > 0
    assert found >= 170


def test_more_confidence_is_wider_and_the_same_seed_is_the_same():
    """Bonferroni's levels widen the interval; nothing depends on what was drawn before."""
    gains, weights = requests(np.random.default_rng(3), 20, "normal")
    plain, strict = (ratio_interval(gains, weights, confidence=level, seed=5) for level in (0.95, 0.999))
    assert strict[0] < plain[0] < gains.sum() / weights.sum() < plain[1] < strict[1]
    assert plain == ratio_interval(gains, weights, confidence=0.95, seed=5)


def test_one_long_request_makes_the_interval_wide():
    """Twenty requests of which one carries nearly all the weight say hardly more than that one."""
    weights = np.array([1e6, *[10.0] * 19])
    gains = weights * np.linspace(0.01, 0.05, 20)
    low, high = ratio_interval(gains, weights, confidence=0.95, seed=0)
    assert low < 0 < 0.01 < high


def test_four_long_requests_among_twenty_are_hardly_more_than_four():
    """The interval is no narrower than Student's t for the effective number of requests on the jackknife's error."""
    weights = np.array([100.0] * 4 + [1.0] * 16)
    gains = weights * np.random.default_rng(0).normal(0, 0.1, 20)
    left_out = np.array([np.delete(gains, i).sum() / np.delete(weights, i).sum() for i in range(20)])
    ratio = gains.sum() / weights.sum()
    error = np.sqrt(19 / 20 * np.square(left_out - ratio).sum())
    reach = stats.t.ppf(0.975, weights.sum() ** 2 / np.square(weights).sum() - 1)
    assert reach > 2.9
    low, high = ratio_interval(gains, weights, confidence=0.95, seed=0)
    assert min(ratio - low, high - ratio) >= 0.999 * reach * error


def test_a_few_great_losses_are_seen_behind_many_small_gains():
    """Fifty-four requests gain 0.03 and six lose 0.23: Student's t alone would promote a true gain of nothing."""
    gains = np.array([0.03] * 54 + [-0.18] * 6)
    weights = np.ones(60)
    low, _ = ratio_interval(gains, weights, confidence=0.95, seed=0)
    plain = gains.mean() - stats.t.ppf(0.975, 59) * gains.std(ddof=1) / math.sqrt(60)
    assert low < plain - 0.005


def test_what_can_be_known_from_next_to_nothing():
    """One request says nothing, none neither; without any spread the ratio is certain."""
    assert ratio_interval(np.ones(1), np.ones(1), confidence=0.95, seed=0) == (-math.inf, math.inf)
    assert ratio_interval(np.empty(0), np.empty(0), confidence=0.95, seed=0) == (-math.inf, math.inf)
    assert ratio_interval(np.full(5, 0.5), np.full(5, 2.0), confidence=0.95, seed=0) == (0.25, 0.25)
    low, high = ratio_interval(np.array([1.0, 3.0]), np.ones(2), confidence=0.95, seed=0)
    assert low < -8 and high > 12  # noqa: PT018 - one statement about one interval


def test_sums_by_key():
    """Values with the same key are added up, in order of first use."""
    assert sum_by("abac", [1, 2, 3, 4], [0, 0, 1, 1]).tolist() == [[4, 1], [2, 0], [4, 1]]
    assert sum_by([], [], []).shape == (0, 2)
