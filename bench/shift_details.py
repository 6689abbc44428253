"""What single scenarios ask beyond the common figures: returns of a known segment, tenants, versions one by one.

Pure; called by `bench.shift_figures`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench import shift_stats as stats
from bench.shift_arms import Run
from bench.shift_client import Seen
from bench.shift_schedule import MALLORY, OTHERS, A, B

if TYPE_CHECKING:
    from bench.shift_figures import Stretch

SOON = 50  # requests within which a known segment should have its acceptance back
BYPASSED = 0.05  # drafted tokens a round, below which a tenant is not drafted for


def by_version(look: Stretch, run: Run, other: Run | None) -> list[dict[str, Any]]:
    """Return every version with the acceptance it had, and its difference to another arm on the same requests.

    `harmful` says that the difference is certainly below zero.  A version that never drafted has no acceptance.
    """
    versions = {item["version"]: item for item in run.marks.versions}
    rows = []
    for version in sorted({run.marks.starts_with, *versions}):
        mine = [
            seen for seen in look.measuring(run)
            if run.marks.version_at(seen.started_s) == run.marks.version_at(seen.finished_s) == version
        ]  # fmt: skip
        found = stats.difference(stats.paired(mine, look.measuring(other) if other else []))
        known = versions.get(version, {"version": version, "parent": None, "state": "ready", "at_s": None})
        rows.append(known | {
            "acceptance": stats.acceptance(mine), "against_other_arm": found,
            "harmful": None if found["value"] is None else found["interval"][1] < 0,
        })  # fmt: skip
    return rows


def returns(look: Stretch, run: Run, static: Run | None) -> list[dict[str, Any]]:
    """Return for every period whose segment was there before: how soon, and how fully, its acceptance was back.

    `change` compares with the second half of the period before of the same segment, whose prompts were others;
    `against_static` compares the same requests with a draft that never changed, and `change_beyond_static` is how
    that lead changed, which is free of what prompts were asked.
    """
    edges, rows = look.edges, []
    for number in range(2, len(edges) - 1):
        part = B if look.scenario.periods[number].b_from else A
        begin, end, old = edges[number], edges[number + 1], (edges[number - 2], edges[number - 1])
        now = _measured(run, part, begin, end)
        soon = _first(run, begin, end)
        half = (old[0] + old[1]) / 2
        before = _measured(run, part, half, old[1])
        theirs = _measured(static, part, half, end) if static else []
        rows.append({
            "segment": part, "from_s": round(begin, 1), "before": stats.acceptance(before),
            f"first_{SOON}_requests": stats.acceptance([seen for seen in now if seen.arrival.at_s < soon]),
            "after_that": stats.acceptance([seen for seen in now if seen.arrival.at_s >= soon]),
            "change": stats.change(before, now), "change_after_that": stats.change(before, [
                seen for seen in now if seen.arrival.at_s >= soon]),
            "against_static": stats.difference(stats.paired(now, theirs)),
            "change_beyond_static": stats.change_beyond(stats.paired(before, theirs), stats.paired(now, theirs)),
            "requests_to_first_swap": _requests_to_swap(run, begin, end),
            "trainings_begun": sum(begin <= item["from_s"] < end for item in run.marks.trainings),
            "swaps": [swap for swap in run.marks.swaps if begin <= swap["at_s"] < end],
        })  # fmt: skip
    return rows


def tenants(look: Stretch, run: Run, static: Run | None) -> dict[str, Any]:
    """Return for everybody else and for Mallory: acceptance, speed and drafting before and after her change."""
    found = {}
    for tenant in (OTHERS, MALLORY):
        mine = [seen for seen in run.seen if seen.ok and seen.arrival.tenant == tenant]
        theirs = [seen for seen in static.seen if seen.ok] if static else []
        before = [seen for seen in mine if seen.arrival.at_s < look.shift_s]
        after = [seen for seen in mine if seen.arrival.at_s >= look.shift_s]
        late = [seen for seen in mine if seen.arrival.at_s >= look.final_s]
        drafted = _drafted_a_round(late)
        found[tenant] = {
            "acceptance_before": stats.acceptance(_of(before, measuring=True)),
            "acceptance_after": stats.acceptance(_of(after, measuring=True)),
            "acceptance_against_static": stats.difference(
                stats.paired(_of(after, measuring=True), _of(theirs, measuring=True))),
            "tokens_per_s_before": stats.speed(_of(before, measuring=False)),
            "tokens_per_s_after": stats.speed(_of(after, measuring=False)),
            "speed_against_static": stats.speed_ratio(
                stats.paired(_of(after, measuring=False), _of(theirs, measuring=False)), whole=True),
            "drafted_a_round_before": _drafted_a_round(before), "drafted_a_round_after": _drafted_a_round(after),
            "drafted_a_round_at_the_end": drafted, "bypassed": None if drafted is None else drafted < BYPASSED,
        }  # fmt: skip
    return found


def _of(items: list[Seen], *, measuring: bool) -> list[Seen]:
    return [seen for seen in items if seen.arrival.measuring == measuring and (seen.examined or not measuring)]


def _drafted_a_round(items: list[Seen]) -> float | None:
    """Return tokens drafted a round for ordinary requests, whose draft length the controller chose."""
    chosen = _of(items, measuring=False)
    rounds = sum(seen.rounds + seen.plain_rounds for seen in chosen)
    return round(sum(seen.drafted for seen in chosen) / rounds, 4) if rounds else None


def _measured(run: Run, part: str, begin_s: float, end_s: float) -> list[Seen]:
    return [
        seen for seen in run.seen
        if seen.ok and seen.arrival.measuring and seen.examined and seen.arrival.part == part
        and begin_s <= seen.arrival.at_s < end_s
    ]  # fmt: skip


def _first(run: Run, begin_s: float, end_s: float) -> float:
    """Return when the first few requests of a period have arrived."""
    times = [seen.arrival.at_s for seen in run.seen if begin_s <= seen.arrival.at_s < end_s]
    return times[SOON] if len(times) > SOON else end_s


def _requests_to_swap(run: Run, begin_s: float, end_s: float) -> int | None:
    swaps = [swap["at_s"] for swap in run.marks.swaps if begin_s <= swap["at_s"] < end_s]
    return sum(begin_s <= seen.arrival.at_s < swaps[0] for seen in run.seen) if swaps else None
