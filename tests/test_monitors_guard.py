"""The guard: its interval covers at all sample sizes, and its verdicts follow it."""

from __future__ import annotations

import numpy as np
import pytest

from adapter.sections import MonitorSettings
from monitors.guard import Guard, confidence_sequence

SETTINGS = MonitorSettings(guard_min_requests=20, guard_margin=0.02)


def judged(gain: float, seed: int, requests: int = 200, reference: int = 200) -> tuple[str, int, str]:
    rng = np.random.default_rng(seed)
    old = np.clip(rng.normal(0.40, 0.08, reference), 0, 1)
    guard = Guard(version=2, previous=1, reference={"chat": [float(x) for x in old]})
    for number in range(1, requests + 1):
        guard.observe("chat", float(np.clip(rng.normal(0.40 + gain, 0.08), 0, 1)))
        if number % 10:
            continue
        verdict = guard.judge(SETTINGS)
        if verdict.verdict != "wait":
            return verdict.verdict, number, verdict.reason
    return "wait", requests, ""


def test_the_interval_holds_at_all_sample_sizes_at_once() -> None:
    """The true mean is outside any of four looks in at most 5 % of streams.

    n = 200 streams, seeds 0..199, two-point values with mean 0.45, looks at 20, 50, 100 and 160; the
    bound is 0.05 and three standard errors.
    """
    misses = 0
    for seed in range(200):
        values = np.where(np.random.default_rng(seed).random(160) < 0.45, 1.0, 0.0)
        looks = (confidence_sequence(list(values[:n])) for n in (20, 50, 100, 160))
        misses += any(not low <= 0.45 <= high for low, high in looks)

    assert misses <= 200 * 0.05 + 3 * (200 * 0.05 * 0.95) ** 0.5


def test_a_worse_version_is_rolled_back_with_its_numbers() -> None:
    """A loss of 0.12 is rolled back in each of 20 seeded runs, and the sentence carries the numbers."""
    for seed in range(20):
        verdict, number, reason = judged(-0.12, seed)

        assert "roll_back" == verdict
        assert number >= SETTINGS.guard_min_requests
        assert reason.startswith("rolled back v2: acceptance -0.")
        assert "against v1, limit -0.020, n=" in reason


def test_a_better_version_is_kept() -> None:
    """A gain of 0.08 is kept in each of 20 seeded runs, never rolled back."""
    assert {"keep"} == {judged(0.08, seed)[0] for seed in range(20)}


def test_an_equal_version_is_not_rolled_back() -> None:
    """No difference leads to keep in the end, in each of 40 seeded runs."""
    assert {"keep"} == {judged(0.0, seed)[0] for seed in range(40)}


def test_nothing_is_judged_before_enough_requests() -> None:
    """However bad the start, the guard waits for guard_min_requests comparable requests."""
    assert ("wait", 19, "") == judged(-0.4, 0, requests=19)


def test_too_few_to_compare_with_holds_nothing_up() -> None:
    """A reference that can never be enough: after as many requests as are needed the version is kept, and said so."""
    guard = Guard(version=2, previous=1, reference={"chat": [0.5] * 3})
    settings = MonitorSettings()
    for count in range(1, settings.guard_min_requests + 1):
        guard.observe("chat", 0.5)
        judgement = guard.judge(settings)
        assert judgement.verdict == ("keep" if count == settings.guard_min_requests else "wait")
    assert "only 3 of its 30 requests had a comparable one on v1" in judgement.reason


def test_traffic_without_a_like_reference_ends_in_keep() -> None:
    """Requests of a segment the previous version never served cannot condemn a version."""
    guard = Guard(version=2, previous=1, reference={"chat": [0.5] * 50})
    for _ in range(10 * SETTINGS.guard_min_requests):
        guard.observe("code", 0.0)
    verdict = guard.judge(SETTINGS)

    assert "keep" == verdict.verdict
    assert "only 0 of its 200 requests" in verdict.reason


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_values_give_a_finite_interval_around_them(value: float) -> None:
    """Edges of the range are no special case."""
    low, high = confidence_sequence([value] * 100)

    assert 0.0 <= low <= value <= high <= 1.0
    assert high - low < 0.3
