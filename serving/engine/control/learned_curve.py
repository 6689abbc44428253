"""A measured curve that goes on learning: each measured size is corrected by what forwards about that size took.

Whether a few more rows are worth their time hangs on small differences between neighbouring sizes, and
those a short measurement at start gets wrong by a tenth.  Corrections of sizes are slow and remember
for long; a machine that slows down as a whole is the business of the factor beside them.  Called by
`cost_model`.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from serving.engine.control.cost_table import Curve, Floats

_DENSE = 2048
_ROWS = np.arange(_DENSE)
_DOUBT = 32.0  # forwards of a size that are worth as much as its measurement at start
_SLOWEST = 0.002
_LIMIT = math.log(2.0)
_RENEWED_EVERY = 32  # forwards; corrections are slower than that, and 2048 numbers take a while


class LearnedCurve:
    """Seconds at every whole number of rows, so that pricing a step is looking up, not interpolating."""

    def __init__(self, curve: Curve) -> None:
        self.context_s = curve.context_s
        self._measured: Floats = np.interp(_ROWS, *curve.knots)
        self._sizes = curve.rows
        self._wrong = [0.0] * len(curve.rows)  # log of what is seen over what was measured, by size
        self._seen = [0.0] * len(curve.rows)
        self._waiting = 0
        self._renew()

    def at(self, rows: int) -> float:
        """Seconds for so many rows."""
        return self._list[rows] if rows < _DENSE else self._list[-1] + self._slope * (rows - _DENSE + 1)

    def span(self, first: int, count: int) -> Floats:
        """Seconds for `count` numbers of rows from `first` on."""
        if first + count <= _DENSE:
            return self.array[first : first + count]
        return self.array[-1] + self._slope * (np.arange(first, first + count) - _DENSE + 1.0)

    def pick(self, rows: NDArray[np.int64]) -> Floats:
        """Seconds for every number of rows given; those beyond reach count as the largest."""
        picked: Floats = self.array[np.minimum(rows, _DENSE - 1)]
        return picked

    def observe(self, rows: int, wrong: float) -> None:
        """Hear that a forward of so many rows took exp(wrong) times what `at` and all other factors say."""
        if rows >= _DENSE:
            return
        for index, share in self._neighbours(rows):
            self._seen[index] += share
            rate = share * max(_SLOWEST, 1 / (_DOUBT + self._seen[index]))
            self._wrong[index] = min(_LIMIT, max(-_LIMIT, self._wrong[index] + rate * wrong))
        self._waiting += 1
        if self._waiting >= _RENEWED_EVERY:
            self._renew()

    def corrections(self) -> list[float]:
        """Return the factor of each measured size."""
        return [round(math.exp(item), 4) for item in self._wrong]

    def _neighbours(self, rows: int) -> list[tuple[int, float]]:
        """Return the sizes beside a number of rows, and how near it is to each; shares add up to 1."""
        above = bisect_left(self._sizes, rows)
        if above == 0 or above == len(self._sizes):
            return [(min(above, len(self._sizes) - 1), 1.0)]
        low, high = self._sizes[above - 1], self._sizes[above]
        near = (rows - low) / (high - low)
        return [(index, share) for index, share in ((above - 1, 1 - near), (above, near)) if share]

    def _renew(self) -> None:
        """Apply the corrections; more rows are never believed to be cheaper."""
        self._waiting = 0
        factors = np.interp(_ROWS, self._sizes, np.exp(self._wrong))
        self.array: Floats = np.maximum.accumulate(self._measured * factors)
        self._list: list[float] = self.array.tolist()
        self._slope = self._list[-1] - self._list[-2]
