"""Keep beliefs alive: now and then one request drafts although it does not pay, on a budget of time.

What is believed to be bad is never tried, and so would be believed for ever.  A share of all time is
put aside; a probe starts when its rounds are affordable and its whole cost is taken off, so the share
holds in the long run whatever a probe costs.  Probes that change nothing become rarer.  Used by `adaptive`.
"""

from __future__ import annotations

import random

BURST_ROUNDS = 8  # rounds a probed draft goes on, so that what it had to read first serves several
_MAX_DOUBLINGS = 3
_DRAWN = 3  # candidates drawn, of which the cheapest is probed: a long backlog is a dear question
_CREDIT_STEPS = 0.5  # what may be spent at once on something new, in steps


class Explorer:
    """Grants probes of single requests.

    Args:
        share: share of time that probes may cost; 0 never probes.
    """

    def __init__(self, share: float, rng: random.Random) -> None:
        self._share = share
        self._rng = rng
        self._failures = 0
        self._drafting_steps = 0  # in a row
        self._budget_s = 0.0
        self._credit_s = 0.0  # of the budget, what was granted for something new
        self._new = True
        self._current: tuple[str, str] | None = None  # request and proposer
        self._rounds_left = 0
        self._cap_s = 0.0
        self.num_probes = 0
        self.spent_s = 0.0

    @property
    def rate(self) -> float:
        """Share of time put aside now, after back-off."""
        return self._share / (1 << min(self._failures, _MAX_DOUBLINGS))

    def elapsed(self, seconds: float) -> None:
        """Put the share of a step's time aside; no more piles up than two probes cost, or half a step."""
        if self._new and self._share:
            self._new = False
            self._credit_s = _CREDIT_STEPS * seconds
            self._budget_s += self._credit_s
        if self._budget_s < max(self._cap_s, _CREDIT_STEPS * seconds):
            self._budget_s += self.rate * seconds

    def renew(self) -> None:
        """Forget failures: there is something new to learn about, and it may cost a few steps at once."""
        self._failures = 0
        self._new = True

    def decided(self, *, drafting: bool) -> None:
        """Hear whether a step drafts because it pays; if enough in a row do, probes have not been in vain.

        One such step says nothing: with few requests for a moment, any draft is cheap.
        """
        self._drafting_steps = self._drafting_steps + 1 if drafting else 0
        if self._drafting_steps >= BURST_ROUNDS:
            self._failures = 0

    def forget(self, request: str) -> None:
        """End the probe of a request that ended, so that a later one of its name does not inherit it."""
        if self._current and self._current[0] == request:
            self._current = None

    def pick(self, candidates: list[tuple[str, str, float, float]]) -> tuple[str, str] | None:
        """Choose a request and a proposer to try in this round, or None.

        Candidates are (request, proposer, seconds once, seconds a round).  A draft begun goes on for
        a few rounds while it is still among them.
        """
        if not self._share or not candidates:
            return None
        if self._current and self._rounds_left:
            for request, proposer, _, _ in candidates:
                if (request, proposer) == self._current:
                    self._rounds_left -= 1
                    return self._current
            self._current = None
        if self._budget_s <= 0:
            return None
        drawn = self._rng.sample(candidates, min(_DRAWN, len(candidates)))
        request, proposer, once_s, round_s = min(drawn, key=lambda item: item[2] + BURST_ROUNDS * item[3])
        rounds_s = BURST_ROUNDS * round_s
        cost_s = once_s + rounds_s
        # What must be read first may be paid off later: it can grow faster than the budget does.
        needed_s = rounds_s + min(once_s, rounds_s)
        self._cap_s = 2 * needed_s
        if needed_s > self._budget_s:
            return None
        self._budget_s -= cost_s
        self.spent_s += cost_s
        self.num_probes += 1
        if self._credit_s > 0:
            self._credit_s -= cost_s
        else:
            self._failures += 1
        self._current, self._rounds_left = (request, proposer), BURST_ROUNDS - 1
        return self._current

    def explain(self) -> dict[str, object]:
        """Return the state in plain values."""
        return {
            "share": self._share, "share_now": round(self.rate, 6), "probes": self.num_probes,
            "spent_s": round(self.spent_s, 4), "without_effect": self._failures,
        }  # fmt: skip
