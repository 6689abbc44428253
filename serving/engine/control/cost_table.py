"""What a forward costs, by how many tokens it processes: measured at start, read by the controller.

Knows no model and no clock: it is given a callable that runs a forward and returns its seconds.  What
the machine does later that it did not do at start is `cost_model`'s business.  Called by `timing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Measure = Callable[[int, int], float]  # (rows, context tokens) -> seconds of one forward
Floats = NDArray[np.float64]

FORMAT = 2  # and of how it is measured
_FAR = 1_000_000  # rows no step reaches: the last slope goes on up to there
_SMALL = (1, 2, 3, 4, 6, 8)
_TURNS = 3  # of a size, for which there must be time
_AGREEMENT = 1.3
_BEATEN = 0.85


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of a forward: `seconds[i]` for `rows[i]` tokens, plus `context_s` a token of context.

    Rows rise strictly and seconds never fall, so more work is never believed to be cheaper.
    """

    rows: list[int]
    seconds: list[float]
    context_s: float

    def __post_init__(self) -> None:
        """Refuse what is no curve.

        Raises:
            ValueError: the numbers are not finite, not positive or in the wrong order.
        """
        numbers = [*self.seconds, self.context_s]
        if len(self.rows) < 2 or len(self.rows) != len(self.seconds):
            raise ValueError(f"{len(self.rows)} sizes and {len(self.seconds)} times: two or more pairs are needed")
        if not all(math.isfinite(number) for number in numbers) or self.seconds[0] <= 0 or self.context_s < 0:
            raise ValueError(f"times must be finite and positive, not {numbers}")
        if self.rows[0] < 1 or any(a >= b for a, b in zip(self.rows, self.rows[1:], strict=False)):
            raise ValueError(f"sizes must rise from 1 or more, not {self.rows}")
        if any(a > b for a, b in zip(self.seconds, self.seconds[1:], strict=False)):
            raise ValueError(f"times must not fall, not {self.seconds}")

    def at(self, rows: int) -> float:
        """Seconds of so many rows at short context."""
        return float(np.interp(rows, *self.knots))

    @property
    def knots(self) -> tuple[Floats, Floats]:
        """Rows and seconds with one far knot more, so that interpolation extrapolates linearly.

        The slope beyond the last size is taken over the upper half of the sizes: the last two alone
        may lie on one stair.
        """
        half = next(i for i, rows in enumerate(self.rows) if 2 * rows >= self.rows[-1])
        half = min(half, len(self.rows) - 2)
        slope = (self.seconds[-1] - self.seconds[half]) / (self.rows[-1] - self.rows[half])
        far = self.seconds[-1] + slope * (_FAR - self.rows[-1])
        return np.array([*self.rows, _FAR], dtype=float), np.array([*self.seconds, far])


@dataclass(frozen=True, slots=True)
class CostTable:
    """The curves of one pair on one machine; `draft` is None where there is no draft model.

    The target's curve has greedy rows; drawing from one at a temperature costs `sample_s` more.  Rows of
    the draft's curve are scored ones, one a request; a token it only reads costs `read_s`.
    """

    fingerprint: str
    target: Curve
    draft: Curve | None
    read_s: float
    sample_s: float
    spent_s: float  # how long measuring took
    settled: bool = True  # measured on a machine quiet enough to rely on it next time
    format: int = FORMAT


def curve_from(measured: dict[int, float], context_s: float) -> Curve:
    """Make a curve of the fastest measurement of every size.

    Noise only ever adds.  Fewer rows never cost more, and many rows never more than a few forwards of
    fewer: so a size costs at most what it took itself, and at most what those bounds say.
    """
    rows = sorted(measured)
    seconds = np.minimum.accumulate([measured[size] for size in reversed(rows)])[::-1]
    split = [min(-(-size // part) * cost for part, cost in zip(rows, seconds, strict=True)) for size in rows]
    return Curve(rows, [float(item) for item in np.maximum.accumulate(split)], context_s)


def sizes_up_to(max_rows: int) -> list[int]:
    """Return the sizes worth measuring, small ones densely: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, … max_rows."""
    sizes, size = list(_SMALL), 8
    while size < max_rows:
        sizes += [size * 3 // 2, size * 2]
        size *= 2
    last = max(2, max_rows)
    return [item for item in sizes if item < last] + [last]


def measure_curve(
    measure: Measure, max_rows: int, *, budget_s: float, long_context: int, turns: int = 5
) -> tuple[Curve, bool]:
    """Time forwards of several sizes, coarse to fine, and stop when `budget_s` of forwards are spent.

    Sizes take turns and the fastest turn counts: a machine that does something else for a moment then
    slows one turn, not one size.  A size is only begun if there is time for three turns of it; two are
    always measured.  Also says whether the turns agree well enough to rely on the curve next time.
    """
    measure(1, 0)  # the first forward also pays for what every later one finds warm
    taken: dict[int, list[float]] = {}
    spent = 0.0
    for turn in range(turns):
        for rows in _coarse_to_fine(sizes_up_to(max_rows)) if turn == 0 else sorted(taken):
            guess = min(taken[rows]) if turn else _guess(taken, rows)
            if len(taken) >= 2 and (spent + guess) * (_TURNS if turn == 0 else 1) > budget_s:
                continue
            seconds = measure(rows, 0)
            spent += seconds
            taken.setdefault(rows, []).append(seconds)
    context_s = 0.0
    if spent < budget_s:
        far = min(measure(1, long_context) for _ in range(turns))
        context_s = max(0.0, far - min(taken[1])) / long_context
    return curve_from({rows: min(items) for rows, items in taken.items()}, context_s), _settled(taken)


def _guess(taken: dict[int, list[float]], rows: int) -> float:
    """Guess what a size not measured yet takes, rather too much than too little."""
    largest = max(taken, default=0)
    return min(taken[largest]) * max(1.0, rows / largest) if largest else 0.0


def _settled(taken: dict[int, list[float]]) -> bool:
    """Whether the two fastest turns of most sizes tell the same."""
    pairs = [sorted(items)[:2] for items in taken.values()]
    agree = sum(len(pair) == 2 and pair[1] <= _AGREEMENT * pair[0] for pair in pairs)
    return agree >= 0.8 * len(pairs)


def _coarse_to_fine(sizes: list[int]) -> list[int]:
    """Order sizes so that every prefix covers the range: 1, then about 8, then ever finer halves."""
    first = [sizes[0], min(sizes, key=lambda size: abs(size - 8))]
    rest = [size for size in sizes if size not in first]
    order: list[int] = []
    step = len(rest)
    while step:
        order += [size for size in rest[::-1][::step] if size not in order]
        step //= 2
    return [*dict.fromkeys(first), *order]


def beaten(curve: Curve, measure: Measure, sizes: tuple[int, ...] = (1, 8), turns: int = 3) -> bool:
    """Whether forwards are clearly faster now than the curve says: then it was measured on a busy machine.

    Slower forwards prove nothing, as noise only ever adds.
    """
    measure(1, 0)
    return any(
        min(measure(rows, 0) for _ in range(turns)) < _BEATEN * curve.at(rows)
        for rows in sizes
        if rows <= curve.rows[-1]
    )
