"""The drift detector: its false-alarm bound, its delay, and that a restart changes nothing."""

from __future__ import annotations

import doctest
import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray

import monitors.drift
from monitors.drift import DriftDetector, DropEvidence, alarm_threshold


def beta(rng: np.random.Generator, mean: float, deviation: float, n: int) -> NDArray[np.float64]:
    size = mean * (1 - mean) / deviation**2 - 1
    return rng.beta(mean * size, (1 - mean) * size, n)


def test_the_example_in_the_docstring_is_true() -> None:
    """The printed answer of the class's example is what the code prints."""
    results = doctest.testmod(monitors.drift)

    assert 0 == results.failed
    assert results.attempted >= 4


@pytest.mark.parametrize("kind", ["beta", "bernoulli", "bursts"])
def test_false_alarms_stay_under_the_bound(kind: str) -> None:
    """With the mean exactly at the level, P(evidence reaches A within N) <= N / A.

    n = 600 streams, seeds 0..599, N = 200, A = 1000, so the bound is 0.2 and three standard errors
    of the count are added.  `bursts` is dependent: eight requests in a row share how far they stray,
    and only the side is a fair coin, so the conditional mean stays at the level.
    """
    level, steps, streams, threshold = 0.6, 200, 600, 1000.0
    alarms = 0
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        if kind == "beta":
            stream = beta(rng, level, 0.2, steps)
        elif kind == "bernoulli":
            stream = (rng.random(steps) < level).astype(float)
        else:
            spread = np.repeat(rng.uniform(0.0, 0.4, steps // 8), 8)
            stream = level + spread * rng.choice([-1.0, 1.0], steps)
        process = DropEvidence(level, 10)
        for x in stream:
            process.update(float(x))
            if process.log10 >= math.log10(threshold):
                alarms += 1
                break
    bound = steps / threshold
    assert alarms <= streams * bound + 3 * math.sqrt(streams * bound * (1 - bound))


def test_a_learnt_baseline_keeps_the_bound_with_its_margin() -> None:
    """On steady traffic the whole detector, baseline included, alarms no more often than N / A.

    n = 500 streams, seeds 0..499, 100 requests of baseline and N = 300 more, A = 3000, margin 0.02.
    """
    alarms = 0
    for seed in range(500):
        detector = DriftDetector(baseline_requests=100, margin=0.02, threshold=3000.0)
        for x in beta(np.random.default_rng(seed), 0.45, 0.15, 400):
            if detector.update(float(x)).drift_detected:
                alarms += 1
                break
    assert alarms <= 500 * 300 / 3000


def test_a_drop_of_a_tenth_is_seen_within_about_200_requests() -> None:
    """A fall from 0.42 to 0.32 is seen in every stream, in a median of at most 250 requests, and dated.

    n = 60 streams, seeds 0..59, sd 0.08 a request, baseline of 200; A for one false alarm in 30 days
    at one request a second over three segments.
    """
    threshold = alarm_threshold(false_alarms_per_30_days=1, requests_per_s=1, segments=3)
    delays, errors = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        detector = DriftDetector(baseline_requests=200, threshold=threshold)
        for x in beta(rng, 0.42, 0.08, 400):
            assert not detector.update(float(x)).drift_detected
        for index, x in enumerate(beta(rng, 0.32, 0.08, 1500)):
            if detector.update(float(x)).drift_detected:
                delays.append(index + 1)
                errors.append(abs(detector.since - (index + 1)))
                break

    assert 60 == len(delays)
    assert np.median(delays) <= 250
    assert np.median(errors) <= 25


def test_recovery_is_called_once_and_watching_starts_again() -> None:
    """After the drop ends the mirrored detector fires, and a second drop is found again."""
    rng = np.random.default_rng(3)
    detector = DriftDetector(baseline_requests=100, threshold=1e5)
    events = []
    for mean in (0.5, 0.3, 0.5, 0.3):
        for x in beta(rng, mean, 0.08, 500):
            detector.update(float(x))
            events += ["drift"] * detector.drift_detected + ["recovered"] * detector.recovered

    assert ["drift", "recovered", "drift"] == events


def test_what_is_no_number_between_0_and_1_is_skipped_and_counted() -> None:
    """None, NaN and impossible values touch nothing but the counter; the tails are counted apart."""
    detector = DriftDetector(baseline_requests=10)
    for x in (None, math.nan, -0.1, 1.1, math.inf):
        detector.update(x)
    for x in (0.0, 0.01, 0.5, 0.99, 1.0):
        detector.update(x)

    assert (5, 5) == (detector.skipped, detector.requests)
    assert (2, 1, 2) == (detector.near_zero, detector.exact_zero, detector.near_one)


@pytest.mark.parametrize("cut", [0, 37, 100, 350, 620, 900])
def test_state_survives_a_restart_at_any_point(cut: int) -> None:
    """Writing the state as JSON and reading it back changes no later answer (seed 5, six cuts)."""
    rng = np.random.default_rng(5)
    stream = np.concatenate([beta(rng, 0.5, 0.1, 400), beta(rng, 0.35, 0.1, 300), beta(rng, 0.5, 0.1, 300)])
    straight = DriftDetector(baseline_requests=100, threshold=1e4)
    restarted = DriftDetector(baseline_requests=100, threshold=1e4)
    seen = []
    for index, x in enumerate(stream):
        if index == cut:
            state = json.loads(json.dumps(restarted.to_state()))
            restarted = DriftDetector.from_state(state, baseline_requests=100, margin=0.02, threshold=1e4)
        straight.update(float(x))
        restarted.update(float(x))
        assert (straight.drift_detected, straight.recovered) == (restarted.drift_detected, restarted.recovered)
        assert straight.evidence == pytest.approx(restarted.evidence, abs=1e-12)
        seen.append(straight.drifting)

    assert any(seen)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_degenerate_baselines_neither_crash_nor_alarm(value: float) -> None:
    """A draft that is always wrong, or always right, has no variance and no drift."""
    detector = DriftDetector(baseline_requests=10, threshold=1e3)
    for _ in range(500):
        assert not detector.update(value).drift_detected
    assert math.isfinite(detector.evidence)


def test_the_threshold_follows_the_settings() -> None:
    """A is segments times the requests of 30 days, divided by the false alarms allowed in them."""
    assert 2_592_000 == alarm_threshold(false_alarms_per_30_days=1, requests_per_s=1, segments=1)
    assert 20 * 2_592_000 == alarm_threshold(false_alarms_per_30_days=1, requests_per_s=1, segments=20)
    assert 1_296_000 == alarm_threshold(false_alarms_per_30_days=2, requests_per_s=1, segments=1)
