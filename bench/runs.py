"""Several kept results of `bench.engine` as one: of a group measured more than once, the fullest, then the longest.

A group is what its arms are compared in: width, workload, batch, temperature and coupling.  It is taken whole
from one run, so that no two arms of a row were measured on different days.  Used by `bench.plot` and docs/generate.py.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
_GROUP = ("widen", "workload", "batch", "temperature", "coupling")


def kept(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Read engine.json and every engine-*.json of a folder, in this order."""
    first = folder / "engine.json"
    paths = ([first] if first.exists() else []) + sorted(folder.glob("engine-*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def merge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return {"runs", "rows", "ratios"}: each group from the run with most arms in it, then most repeats."""
    best: dict[tuple[Any, ...], tuple[int, int, int]] = {}
    for number, run in enumerate(runs):
        arms = Counter(map(_group, run["rows"]))
        for row in run["rows"]:
            group = _group(row)
            best[group] = max(best.get(group, (0, 0, 0)), (arms[group], row["repeats"], number))

    def of_best(items: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
        return [item for item in items if best[_group(item)][2] == number]

    ratios: dict[str, list[dict[str, Any]]] = {}
    for number, run in enumerate(runs):
        for name, items in run["ratios"].items():
            ratios.setdefault(name, []).extend(of_best(items, number))
    rows = [row for number, run in enumerate(runs) for row in of_best(run["rows"], number)]
    return {"runs": runs, "rows": rows, "ratios": ratios}


def _group(item: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(item[name] for name in _GROUP)
