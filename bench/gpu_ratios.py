"""What the rows of `bench.gpu` say of each other: ratios of the arms, repeat by repeat, and the short table.  Pure."""

from __future__ import annotations

import statistics
from typing import Any

from bench.gpu_library import LIBRARY_ARMS

ARMS = ("none", "fixed-1", "fixed-3", "fixed-5", "adaptive")


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the arms of every target and batch size: medians of the repeats they all took part in."""
    made = []
    groups: dict[tuple[str, float | None, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["synthetic_acceptance"], row["batch"]), {})[row["arm"]] = row
    for (target, acceptance, batch), arms in groups.items():
        engine = [arms[name] for name in ARMS if name in arms and name != "adaptive"]
        adaptive, none = arms["adaptive"], arms["none"]
        best = max(engine, key=lambda row: row["tokens_per_s"])
        entry = {
            "target": target, "synthetic_acceptance": acceptance, "batch": batch, "best": best["arm"],
            "adaptive_vs_best": _ratio(adaptive, best), "adaptive_vs_none": _ratio(adaptive, none),
            **{f"none_vs_{name}": _ratio(none, arms[name]) for name in LIBRARY_ARMS if name in arms},
        }  # fmt: skip
        made.append(entry)
    return made


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Median, smallest and largest over the repeats that both took part in."""
    pairs = zip(one["tokens_per_s_repeats"], other["tokens_per_s_repeats"], strict=False)
    each = sorted(a / b for a, b in pairs)
    return {"median": round(statistics.median(each), 4), "low": round(each[0], 4), "high": round(each[-1], 4)}


def table(result: dict[str, Any]) -> str:
    """Return the ratios as a short table for a terminal."""
    lines = [f"{'target':<44} {'accept':>6} {'batch':>5} {'best':>8} {'adaptive/best':>13} {'adaptive/none':>13}"]
    for item in result["ratios"]:
        accept = "" if item["synthetic_acceptance"] is None else f"{item['synthetic_acceptance']:g}"
        lines.append(
            f"{item['target']:<44} {accept:>6} {item['batch']:>5} {item['best']:>8} "
            f"{item['adaptive_vs_best']['median']:>13.2f} {item['adaptive_vs_none']['median']:>13.2f}"
        )
    for name, found in result["effects"].items():
        lines += [f"{name}: {what} left out: {reason}" for what, reason in found.get("left_out", {}).items()]
    return "\n".join(lines)


def failures(result: dict[str, Any]) -> list[str]:
    """Return the targets that failed, a line each."""
    return [f"{name}: {found['failed']}" for name, found in result["effects"].items() if "failed" in found]
