"""The figures of a scenario's arms: acceptance and speed over time, what was won back, how soon, at what price.

All acceptances come from measuring requests of the judged segment, all speeds from ordinary ones, none from a
tenant who misbehaves.  Figures that compare arms are None until the other arm has run.  Pure; called by
`bench.shift`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bench import shift_stats as stats
from bench.shift_arms import Run
from bench.shift_client import Seen
from bench.shift_details import by_version, returns, tenants
from bench.shift_schedule import OTHERS, A, B, Scenario

COLUMNS = 24  # of what is shown over time
GOAL = 0.8
_AT_ONCE = 8  # measuring requests whose acceptance must have reached the goal


class Stretch:
    """Where in a scenario what is looked at, in seconds of the run."""

    def __init__(self, scenario: Scenario, seconds: float) -> None:
        edges = scenario.edges(seconds)
        self.scenario, self.edges = scenario, edges
        self.shift_s, self.end_s = edges[1], edges[-1]
        self.final_s = max(edges[-2], self.end_s - (self.end_s - self.shift_s) / 3)

    def measuring(self, run: Run, begin_s: float = 0.0, end_s: float = float("inf")) -> list[Seen]:
        """Return the judged segment's measuring requests that arrived in a stretch."""
        return [seen for seen in self._judged(run, begin_s, end_s) if seen.arrival.measuring and seen.examined]

    def ordinary(self, run: Run, begin_s: float = 0.0, end_s: float = float("inf")) -> list[Seen]:
        """Return the judged segment's ordinary requests that arrived in a stretch."""
        return [seen for seen in self._judged(run, begin_s, end_s) if not seen.arrival.measuring]

    def at_shift(self, run: Run) -> list[Seen]:
        """Return measuring requests after the shift, before another version drafts, or of the first third."""
        swaps = [swap["at_s"] for swap in run.marks.swaps if swap["at_s"] > self.shift_s]
        third = self.shift_s + (self.end_s - self.shift_s) / 3
        until = min([*swaps, third])
        return [seen for seen in self.measuring(run, self.shift_s, until) if seen.finished_s <= until]

    def elsewhere(self, run: Run) -> list[Seen]:
        """Return measuring requests of text that is not judged, and nobody's who misbehaves."""
        others = {A, B} - set(self.scenario.judged)
        return [
            seen for seen in run.seen
            if seen.ok and seen.arrival.measuring and seen.examined and seen.arrival.part in others
        ]  # fmt: skip

    def everybodys(self, run: Run) -> list[Seen]:
        """Return ordinary requests of all text, but for a tenant who misbehaves."""
        return [seen for seen in run.seen if seen.ok and not seen.arrival.measuring and seen.arrival.tenant == OTHERS]

    def _judged(self, run: Run, begin_s: float, end_s: float) -> list[Seen]:
        return [
            seen for seen in run.seen
            if seen.ok and begin_s <= seen.arrival.at_s < end_s
            and seen.arrival.part in self.scenario.judged and seen.arrival.tenant == OTHERS
        ]  # fmt: skip


def figures(scenario: Scenario, runs: dict[str, Run], seconds: float) -> dict[str, Any]:
    """Return the figures of every arm of a scenario that has run."""
    look = Stretch(scenario, seconds)
    return {arm: arm_figures(look, runs, arm) for arm in runs}


def timeline(scenario: Scenario, seconds: float) -> dict[str, Any]:
    """Return what holds for all arms of a scenario: when traffic changes, and which requests are recovered ones."""
    look = Stretch(scenario, seconds)
    edges = [] if scenario.cycles else look.edges[1:-1]  # there the mixture stays as it is
    return {
        "about": scenario.about, "seconds": round(seconds, 1), "judged": list(scenario.judged),
        "shifts_s": [round(edge, 1) for edge in edges], "recovered_from_s": round(look.final_s, 1),
    }  # fmt: skip


def arm_figures(look: Stretch, runs: dict[str, Run], arm: str) -> dict[str, Any]:
    """Return the figures of one arm."""
    run, static, oracle = runs[arm], runs.get("static"), runs.get("oracle")
    at_shift, recovered = look.at_shift(run), look.measuring(run, look.final_s)
    best = look.measuring(oracle, look.final_s) if oracle else []
    before = look.measuring(static, look.final_s) if static else []
    bad = [seen for seen in run.seen if not seen.ok]
    won, won_paired = stats.fraction(at_shift, recovered, best), stats.fraction_paired(before, recovered, best)
    low = at_shift if won["value"] is not None else before if won_paired["value"] is not None else None
    return {
        "acceptance": acceptance_over_time(look.measuring(run), look.end_s),
        "acceptance_elsewhere": acceptance_over_time(look.elsewhere(run), look.end_s),
        "tokens_per_s": speed_over_time(look.everybodys(run), look.end_s),
        "at_shift": stats.acceptance(at_shift), "recovered": stats.acceptance(recovered),
        "oracle": stats.acceptance(best),
        "recovered_fraction": won, "recovered_fraction_paired": won_paired,
        "oracle_gain": stats.difference(stats.paired(best, before)),
        **reached(look, run, low, best),
        "against_static": against(look, run, static), "against_none": against(look, run, runs.get("none")),
        "training_seconds": round(sum(item["until_s"] - item["from_s"] for item in run.marks.trainings), 1),
        "serving_slowdown_while_training": training_price(look, run, static),
        "versions": by_version(look, run, oracle if look.scenario.cycles else static),
        "gates": run.marks.gates, "drift": run.marks.drift, "trainings": run.marks.trainings,
        "swaps": run.marks.swaps, "moves": run.marks.moves,
        "returns": returns(look, run, static) if look.scenario.name == "recurring" else None,
        "tenants": tenants(look, run, static) if look.scenario.noise_share else None,
        "requests": len(run.seen), "measuring": sum(seen.arrival.measuring for seen in run.seen),
        "ended_late": sum(seen.finished_s > look.end_s for seen in run.seen),  # many: the service was overloaded
        "other_texts_than_static": other_texts(run, static),
        "failed": len(bad), "first_failure": bad[0].error if bad else None,
    }  # fmt: skip


def acceptance_over_time(items: Sequence[Seen], seconds: float) -> list[dict[str, Any]] | None:
    """Return acceptance in equal slices of time; those in which nothing arrived are left out."""
    rows = []
    for at_s, part in _slices(items, seconds):
        rows.append({"at_s": at_s, **stats.acceptance(part), "value": round(_mean(part), 4)})
    return rows or None


def speed_over_time(items: Sequence[Seen], seconds: float) -> list[dict[str, Any]]:
    """Return tokens a second of decoding in equal slices of time."""
    return [{"at_s": at_s, "value": stats.speed(part), "n": len(part)} for at_s, part in _slices(items, seconds)]


def _slices(items: Sequence[Seen], seconds: float) -> list[tuple[float, list[Seen]]]:
    width, found = seconds / COLUMNS, defaultdict(list)
    for seen in items:
        found[int(seen.arrival.at_s / width)].append(seen)
    return [(round((column + 0.5) * width, 2), found[column]) for column in sorted(found)]


def reached(look: Stretch, run: Run, low: Sequence[Seen] | None, best: Sequence[Seen]) -> dict[str, Any]:
    """Return after how many requests and seconds since the shift the goal was reached for good.

    It is reached at the first measuring request from which both the next few and all the rest together are at
    low + 0.8 (best − low) or above.  None: not reached, or there was nothing to win back.

    Args:
        low: answers of the draft as it was; None where the oracle is not certainly better.
        best: the oracle's answers.
    """
    nothing = {"requests_to_80_percent": None, "seconds_to_80_percent": None}
    if low is None:
        return nothing
    begin, top = _mean(low), _mean(best)
    place = first_above(look.measuring(run, look.shift_s), begin + GOAL * (top - begin), _AT_ONCE)
    if place is None:
        return nothing
    arrived = place.arrival.at_s
    served = [seen for seen in run.seen if look.shift_s <= seen.arrival.at_s < arrived]
    return {"requests_to_80_percent": len(served), "seconds_to_80_percent": round(arrived - look.shift_s, 1)}


def first_above(items: Sequence[Seen], goal: float, at_once: int) -> Seen | None:
    """Return the first request from which the next `at_once` and all the rest have an acceptance above `goal`."""
    for i in range(len(items) - at_once + 1):
        if _mean(items[i : i + at_once]) >= goal and _mean(items[i:]) >= goal:
            return items[i]
    return None


def _mean(items: Sequence[Seen]) -> float:
    return sum(seen.accepted for seen in items) / sum(seen.examined for seen in items)


def against(look: Stretch, run: Run, other: Run | None) -> dict[str, Any] | None:
    """Return how many times faster an arm served the same ordinary requests than another, end to end and decoding."""
    if other is None or other is run:
        return None
    found = {}
    for name, begin in (("recovered", look.final_s), ("since_shift", look.shift_s)):
        pairs = stats.paired(look.ordinary(run, begin), look.ordinary(other, begin))
        found[name] = {"end_to_end": stats.speed_ratio(pairs, whole=True), "decoding": stats.speed_ratio(pairs)}
    return found


def training_price(look: Stretch, run: Run, static: Run | None) -> dict[str, Any]:
    """Return the share of decoding speed lost while a training ran: to the arm's other times, and to the static arm."""
    items = look.ordinary(run, look.shift_s)
    during = [seen for seen in items if run.marks.training_at(seen.started_s, seen.finished_s)]
    outside = [seen for seen in items if not run.marks.training_at(seen.started_s, seen.finished_s)]
    found = stats.slowdown(during, outside)
    same = stats.speed_ratio(stats.paired(during, static.seen if static else []))
    lost = same | {"value": None if same["value"] is None else round(1 - same["value"], 4)}
    if same["interval"] is not None:
        lost["interval"] = [round(1 - edge, 4) for edge in reversed(same["interval"])]
    return found | {"against_static": lost}


def other_texts(run: Run, static: Run | None) -> int | None:
    """Return how many answers differ from the static arm's; they are the same but for ties of rounding."""
    pairs = [] if static is None else stats.paired(run.seen, static.seen)
    return None if static is None else sum(a.ok and b.ok and a.text != b.text for a, b in pairs)
