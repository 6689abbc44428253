"""Whether the promises about shifting traffic hold, each as one line with its figure: met, missed or unknown.

Pure; called by `bench.shift`.
"""

from __future__ import annotations

from typing import Any

from bench.shift_details import SOON
from bench.shift_schedule import MALLORY, OTHERS

FRACTION = 0.8
MOST_REQUESTS = 2000
KNOWN_LOSS = 0.02
OTHERS_LOSS = 0.01
CYCLES = 20

Target = dict[str, Any]


def targets(scenario: str, arms: dict[str, Any]) -> list[Target]:
    """Return the promises of a scenario, judged on its adaptive arm; none where that arm has not run."""
    judges = {"abrupt": _abrupt, "recurring": _recurring, "adversarial": _adversarial, "mixed": _mixed}
    if "adaptive" not in arms or scenario not in judges:
        return []
    return judges[scenario](arms["adaptive"])


def _abrupt(arm: dict[str, Any]) -> list[Target]:
    won, soon = arm["recovered_fraction"]["value"], arm["requests_to_80_percent"]
    won = arm["recovered_fraction_paired"]["value"] if won is None else won
    speed = (arm["against_static"] or {}).get("recovered", {}).get("end_to_end", {"interval": None, "value": None})
    return [
        _target(f"recovered_fraction at least {FRACTION}", won, None if won is None else won >= FRACTION),
        _target(f"requests_to_80_percent under {MOST_REQUESTS}", soon,
                None if won is None else soon is not None and soon < MOST_REQUESTS),
        _target("end-to-end tokens/s above static, its interval above 1", speed["value"],
                None if speed["interval"] is None else speed["interval"][0] > 1),
    ]  # fmt: skip


def _recurring(arm: dict[str, Any]) -> list[Target]:
    found = []
    for back in arm["returns"] or ():
        name = f"return of {back['segment']} after {back['from_s']:.0f} s"
        lost = back["change_beyond_static"]["value"]
        lost = back["change"]["value"] if lost is None else lost
        found += [
            _target(f"{name}: no training", back["trainings_begun"], back["trainings_begun"] == 0),
            _target(f"{name}: a switch within {SOON} requests, or none needed", back["requests_to_first_swap"],
                    None if lost is None else lost >= -KNOWN_LOSS and (back["requests_to_first_swap"] or 0) <= SOON),
            _target(f"{name}: acceptance not more than {KNOWN_LOSS} below what it was", lost,
                    None if lost is None else lost >= -KNOWN_LOSS),
        ]  # fmt: skip
    return found


def _adversarial(arm: dict[str, Any]) -> list[Target]:
    others, mallory = arm["tenants"][OTHERS], arm["tenants"][MALLORY]
    speed, kept = others["speed_against_static"]["value"], others["acceptance_against_static"]["value"]
    return [
        _target("only the tenant who misbehaves is bypassed (tokens drafted a round)",
                mallory["drafted_a_round_at_the_end"],
                None if mallory["bypassed"] is None else mallory["bypassed"] and not others["bypassed"]),
        _target(f"others' speed at least {1 - OTHERS_LOSS} of the static arm's", speed,
                None if speed is None else speed >= 1 - OTHERS_LOSS),
        _target(f"others' acceptance not more than {OTHERS_LOSS} below the static arm's", kept,
                None if kept is None else kept >= -OTHERS_LOSS),
    ]  # fmt: skip


def _mixed(arm: dict[str, Any]) -> list[Target]:
    judged = [row for row in arm["versions"] if row["harmful"] is not None]
    harmful = [row["version"] for row in judged if row["harmful"]]
    cycles = len(arm["trainings"])
    return [
        _target("no deployed version is worse than the draft it began with (versions that are)", harmful,
                not harmful if cycles and judged else None),
        _target(f"{CYCLES} cycles of training", cycles, cycles >= CYCLES),
    ]  # fmt: skip


def _target(words: str, value: Any, met: bool | None) -> Target:
    return {"target": words, "value": value, "met": met}
