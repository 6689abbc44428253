"""Several kept results of `bench.engine` as one: where a group was measured more than once, the longest.

A group is what its arms are compared in: width, workload, batch, temperature and coupling.  It is taken whole
from one run, so that no two arms of a row were measured on different days.  Used by `bench.plot` and docs/generate.py.
"""

from __future__ import annotations

import json
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
    """Return {"runs", "rows", "ratios"}: each group from the run that repeated it most, the last one of equals."""
    best: dict[tuple[Any, ...], tuple[int, int]] = {}
    for number, run in enumerate(runs):
        for row in run["rows"]:
            best[_group(row)] = max(best.get(_group(row), (0, 0)), (row["repeats"], number))

    def of_best(items: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
        return [item for item in items if best[_group(item)][1] == number]

    ratios: dict[str, list[dict[str, Any]]] = {}
    for number, run in enumerate(runs):
        for name, items in run["ratios"].items():
            ratios.setdefault(name, []).extend(of_best(items, number))
    rows = [row for number, run in enumerate(runs) for row in of_best(run["rows"], number)]
    return {"runs": runs, "rows": rows, "ratios": ratios}


def _group(item: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(item[name] for name in _GROUP)
