"""Run groups of measurements in turn, over and over, within a time that was given.

Cells of a group follow each other in every repeat, in an order that rotates, so that a slow minute of the
machine hits all that will be compared and none is always first.  After the first repeat only those go on
that a promise still depends on: an arm far behind needs no second figure.  Called by `bench.engine`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.driver import Window
from bench.rows import Key, Row, contenders

_EVERYBODY = 1  # repeats that every cell takes part in


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm at one point; `run` gets the number of the repeat."""

    key: Key
    run: Callable[[int], Window]


@dataclass(slots=True)
class Budget:
    """Seconds for everything, divided by weight among the phases that are still to come."""

    seconds: float
    weights: dict[str, float]
    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    _begin_s: float | None = None

    def share(self, phase: str) -> float:
        """Return the clock's time at which a phase should be over; called when the phase begins."""
        now = self.clock()
        if self._begin_s is None:
            self._begin_s = now
        left = max(0.0, self.seconds - (now - self._begin_s))
        open_weights = sum(weight for name, weight in self.weights.items() if name not in self.phases)
        return now + left * self.weights[phase] / open_weights

    def run(self, phase: str, groups: list[list[Cell]], repeats: int, until_s: float) -> list[Row]:
        """Run the cells `repeats` times, or as often as the time allows, but once at least.

        All of them take part in the first repeat, and in later ones those that may be a group's best.
        """
        rows = {cell.key: Row(cell.key) for group in groups for cell in group}
        took_s: dict[Key, float] = {}
        racing, done, next_s = groups, 0, 0.0
        begin_s = self.clock()
        while done < repeats and (not done or self.clock() + next_s <= until_s):
            for number, group in enumerate(racing):
                turn = (done + number) % len(group)
                for cell in group[turn:] + group[:turn]:
                    before_s = self.clock()
                    rows[cell.key].windows.append(cell.run(done))
                    took_s[cell.key] = self.clock() - before_s
                where = f"repeat {done + 1} of {repeats}, group {number + 1} of {len(racing)}"
                self.say(f"{phase}: {where}, {self.clock() - begin_s:.0f} s")
            done += 1
            if done >= _EVERYBODY:  # whoever is out stays out: repeats are compared by their numbers
                racing = [_rivals(group, rows) for group in racing]
            next_s = sum(took_s[cell.key] for group in racing for cell in group)
        self.phases[phase] = {"repeats": done, "seconds": round(self.clock() - begin_s, 1)}
        if done < repeats:
            self.phases[phase]["reduced"] = (
                f"{repeats} repeats of {next_s:.0f} s each did not fit into the time left; {done} were run"
            )
            self.say(f"{phase}: {self.phases[phase]['reduced']}")
        return list(rows.values())


def _rivals(group: list[Cell], rows: dict[Key, Row]) -> list[Cell]:
    going_on = contenders([rows[cell.key] for cell in group])
    return [cell for cell in group if cell.key in going_on]
