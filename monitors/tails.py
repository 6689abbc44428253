"""Both ends of the scale: requests of which nearly every drafted token was accepted, or nearly none.

A target stuck in a loop is easy to foresee, and a broken draft or cache is never right: either shows
in how many requests lie at an end long before it shows in the mean, or without ever showing there.
Each end has its own sequential test of the same kind as the mean's, on "is this request not at that
end".  Knows no segments and no alerts; the segment book keeps one for each segment.
"""

from __future__ import annotations

from typing import Any

from monitors.drift import NEAR, DriftDetector

NONE_ACCEPTED, ALL_ACCEPTED = "AcceptanceNearZero", "AcceptanceNearOne"
# Sixty requests without one at an end still allow a true share of 5 %; beyond twice that it is another traffic.
_MARGIN = 0.1


class Tails:
    """Two tests, by the name of the alert they raise."""

    def __init__(self, baseline_requests: int) -> None:
        self.tests = {
            name: DriftDetector(baseline_requests=baseline_requests, margin=_MARGIN)
            for name in (NONE_ACCEPTED, ALL_ACCEPTED)
        }

    def update(self, value: float | None) -> None:
        """Add one request's acceptance; None, where nothing was examined, says nothing."""
        if value is not None:
            self.tests[NONE_ACCEPTED].update(float(value > NEAR))
            self.tests[ALL_ACCEPTED].update(float(value < 1 - NEAR))

    def set_threshold(self, threshold: float) -> None:
        """Ask for so much evidence from now on."""
        for test in self.tests.values():
            test.threshold = threshold

    def to_state(self) -> dict[str, Any]:
        """Return everything learnt as plain JSON values."""
        return {name: test.to_state() for name, test in self.tests.items()}

    @classmethod
    def from_state(cls, state: dict[str, Any], *, baseline_requests: int, threshold: float) -> Tails:
        """Rebuild from `to_state`; a test that was not kept starts over."""
        made = cls(baseline_requests)
        made.tests |= {
            name: DriftDetector.from_state(
                state[name], baseline_requests=baseline_requests, margin=_MARGIN, threshold=threshold
            )
            for name in made.tests
            if name in state
        }
        made.set_threshold(threshold)
        return made


def tail_sentence(rule: str, segment: str, test: DriftDetector) -> str:
    """Say what happened at one end of a segment."""
    what, cause = {
        NONE_ACCEPTED: ("nearly no drafted token was accepted", "the draft, its cache or the text is broken"),
        ALL_ACCEPTED: ("nearly every drafted token was accepted", "the target may be repeating itself"),
    }[rule]
    before, now = 1 - (test.baseline_mean or 0.0), 1 - (test.recent_mean or 0.0)
    return (
        f"requests of {segment} of which {what} rose from {before:.0%} to {now:.0%} over the last {test.since}; {cause}"
    )
