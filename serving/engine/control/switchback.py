"""Measure what speculation brings: short windows without it, at random times, against the steps around them.

Requests of one batch share its steps, so only turning speculation off for all of them shows what it
is worth.  A window of 8 plain steps is long enough that the first step after a change weighs little,
and short enough that reading 8 tokens a request afterwards costs the draft about one forward; up to
32 steps on each side are free, as they run as they would anyway.  Batch and context differ between
the sides: both are divided by what the cost table expects of a plain step there.

The catching-up step after a window belongs to the switch and is on neither side.

What a step is, is settled when it is chosen (`begin_step`) and travels with it as a `Mark`: on a device the
next step is chosen before this one is heard of.  Must not know how choices are made.  Used by `adaptive`.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass
from statistics import fmean, stdev

WINDOW_STEPS = 8
SIDE_STEPS = 32
_MIN_PAIRS = 5
_KEEP_PAIRS = 64
_MIN_SIDE = 8  # steps a side needs to be counted at all
_LEAST_WINDOW = 4  # steps of a window that are heard of; of a step whose requests had all ended nobody hears
_SUSPECT_GAP = 2 * SIDE_STEPS + 8  # steps between windows while speculation looks bad
_VERDICT_PAIRS = 8
_LOST_IN_A_ROW = 3
_HOLD_STEPS = 2048
_HOLD_DOUBLINGS = 6
_NORMAL_95 = 1.959964


@dataclass(frozen=True, slots=True)
class Step:
    """One step: seconds it took, and what the table says plain decoding takes.

    `plain_s` is a plain step of its batch without prefill, `prefill_s` what its prefill adds,
    `tokens_each` the tokens a request gained on average, `drafted` whether any had a draft.
    """

    seconds: float
    plain_s: float
    prefill_s: float
    tokens_each: float
    drafted: bool


@dataclass(frozen=True, slots=True)
class Mark:
    """What a step was chosen to be.

    `phase` is "between" comparisons, in a plain "window", "settling" or "after" one, or in a "bypass";
    `comparison` is the number of the one it belongs to; `era` counts how often measuring began anew.
    """

    phase: str
    comparison: int
    era: int

    @property
    def plain(self) -> str | None:
        """Why the step must be plain, "window" or "bypass"; None where it need not be."""
        return self.phase if self.phase in ("window", "bypass") else None


@dataclass(frozen=True, slots=True)
class Speedup:
    """Tokens per second with speculation over those without, and its 95 % interval; 1 is no difference."""

    ratio: float
    low: float
    high: float
    pairs: int


class Switchback:
    """Decides when a window runs, and turns windows into a speed-up.

    Args:
        share: share of steps spent in windows; 0 never runs one.
    """

    def __init__(self, share: float, rng: random.Random) -> None:
        self._share = share
        self._rng = rng
        self._on: deque[Step] = deque(maxlen=SIDE_STEPS)
        self._before: list[Step] = []
        self._off: list[Step] = []
        self._after: list[Step] = []
        self._phase = "between"  # of the step chosen last; see Mark
        self._chosen = 0  # steps of the window chosen so far
        self._comparison = 0
        self._era = 0
        self._pairs: deque[float] = deque(maxlen=_KEEP_PAIRS)
        self.num_windows = 0
        self.window_steps = 0
        self.bypass = Bypass()
        self._wait = self._gap()

    def forget(self) -> None:
        """Start over: another draft is served, and what was measured was not about it."""
        self._pairs.clear()
        self._begin_era()
        self._phase = "between"
        self.bypass = Bypass()
        self._wait = self._gap()

    def begin_step(self, blocked: bool) -> Mark:
        """Say what the coming step is to be; hand the answer back to `observe` when its outcome is known.

        `blocked` means that it cannot be plain: a running request named its own draft length.
        """
        if self.bypass.holds():
            return Mark("bypass", self._comparison, self._era)
        if self._share and blocked:
            self._abandon()
        elif self._share:
            self._advance()
        return Mark(self._phase, self._comparison, self._era)

    def observe(self, step: Step, mark: Mark) -> None:
        """Hear of a step in which at least one request decoded, and what it was chosen to be."""
        self.window_steps += mark.phase == "window"
        if mark.phase == "bypass" or mark.era != self._era:
            return
        current = mark.comparison == self._comparison
        if mark.phase == "window" and current:
            if not self._off:
                self._before = list(self._on)
            self._off.append(step)
        elif mark.phase == "settling":
            self._on.clear()
        elif mark.phase in ("between", "after"):
            self._on.append(step)
            if mark.phase == "after" and current and self._phase == "after":
                self._after.append(step)
                if len(self._after) >= SIDE_STEPS:
                    self._close()

    def estimate(self) -> Speedup | None:
        """Return the speed-up over the last windows, or None before there are enough."""
        if len(self._pairs) < _MIN_PAIRS:
            return None
        mean, half = fmean(self._pairs), _half_width(self._pairs)
        return Speedup(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(self._pairs))

    def explain(self) -> dict[str, object]:
        """Return the estimate and the state, in plain values."""
        found = self.estimate()
        measured = None
        if found:
            measured = {"ratio": round(found.ratio, 4), "low": round(found.low, 4), "high": round(found.high, 4)}
        return {
            "speedup": measured, "pairs": len(self._pairs), "windows": self.num_windows,
            "window_steps": self.window_steps, "phase": self._phase, "bypass": self.bypass.active,
            "bypass_steps_left": self.bypass.steps_left, "bypasses": self.bypass.num_bypasses,
        }  # fmt: skip

    # -- windows -----------------------------------------------------------------------------

    def _advance(self) -> None:
        """Go from the phase of the step before to that of the coming one; hearing of enough steps after ends it."""
        if self._phase == "between":
            self._wait -= 1
            if self._wait <= 0 and self._speculates():
                self._before, self._off, self._after = [], [], []
                self._phase, self._chosen = "window", 1
                self._comparison += 1
                self.num_windows += 1
        elif self._phase == "window" and self._chosen < WINDOW_STEPS:
            self._chosen += 1
        else:
            self._phase = "settling" if self._phase == "window" else "after"

    def _close(self) -> None:
        """Make a pair of the window and its sides, and look whether speculation still pays."""
        self._phase = "between"
        on = [*self._before, *self._after]
        on_plain_s = sum(step.prefill_s + step.plain_s * step.tokens_each for step in on)
        off_plain_s = sum(step.prefill_s + step.plain_s for step in self._off)
        on_s, off_s = sum(step.seconds for step in on), sum(step.seconds for step in self._off)
        if len(self._off) >= _LEAST_WINDOW and min(on_plain_s, off_plain_s, on_s, off_s) > 0:
            self._pairs.append(math.log(on_plain_s / on_s) + math.log(off_s / off_plain_s))
            if self.bypass.judge(self.estimate()):
                self._pairs.clear()
                self._begin_era()
        self._wait = self._gap()

    def _begin_era(self) -> None:
        """Let no step that was chosen until now be counted any more."""
        self._on.clear()
        self._era += 1

    def _abandon(self) -> None:
        if self._phase != "between":
            self._phase = "between"
            self._comparison += 1
            self._wait = self._gap()

    def _gap(self) -> int:
        """Draw the steps until the next window: any moment as likely as any other, sides apart."""
        if not self._share:
            return 0
        if self._suspect():
            return _SUSPECT_GAP
        mean = WINDOW_STEPS * (1 - self._share) / self._share
        return int(2 * SIDE_STEPS + self._rng.expovariate(1.0) * max(1.0, mean - 2 * SIDE_STEPS))

    def _suspect(self) -> bool:
        """Whether plain windows are likely the faster ones, so that more of them cost nothing."""
        return not self.bypass.cleared or (len(self._pairs) >= 3 and fmean(self._pairs) < 0)

    def _speculates(self) -> bool:
        """Whether the steps before were mostly speculative; a window among plain ones would compare nothing."""
        return len(self._on) >= _MIN_SIDE and sum(step.drafted for step in self._on) > len(self._on) // 2


class Bypass:
    """Turn speculation off when it is measured to lose, and try again later, ever more rarely."""

    def __init__(self) -> None:
        self.steps_left = 0
        self.num_bypasses = 0
        self.cleared = True
        self._lost = 0

    @property
    def active(self) -> bool:
        """Whether speculation is off now."""
        return self.steps_left > 0

    def holds(self) -> bool:
        """Count a step and say whether it must be plain."""
        if not self.steps_left:
            return False
        self.steps_left -= 1
        return True

    def judge(self, found: Speedup | None) -> bool:
        """Hear of a new estimate; True when it starts a bypass."""
        if found is None or found.pairs < _VERDICT_PAIRS:
            return False
        if found.high >= 1:
            self._lost = 0
            if found.low > 1 or found.pairs >= 2 * _VERDICT_PAIRS:
                self.cleared, self.num_bypasses = True, 0
            return False
        self._lost += 1
        if self._lost < _LOST_IN_A_ROW:
            return False
        self.steps_left = _HOLD_STEPS << min(self.num_bypasses, _HOLD_DOUBLINGS)
        self.num_bypasses += 1
        self.cleared, self._lost = False, 0
        return True


def _half_width(values: deque[float]) -> float:
    """Return half of the t interval at 95 %; the quantile by Cornish-Fisher, good to 0.3 % from 4 degrees on."""
    freedom = len(values) - 1
    z = _NORMAL_95
    first = (z**3 + z) / (4 * freedom)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return (z + first + second + third) * stdev(values) / math.sqrt(len(values))
