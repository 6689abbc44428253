"""Whether rows of `bench.kernels` reach their gates, and the short table of it.  Pure."""

from __future__ import annotations

from typing import Any


def judge(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Say of a row that has a gate whether it passes, with the figure that was judged."""
    gate = row["gate"]
    if gate is None:
        return
    value = _figure(gate, row, rows)
    passed = None if value is None else value >= gate["bound"] if gate["at_least"] else value <= gate["bound"]
    gate |= {"value": None if value is None else round(value, 4), "passed": passed}


def _figure(gate: dict[str, Any], row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    figure, against = gate["figure"], gate["against"]
    if figure == "vs_row":  # the same kernel at another shape
        other = next((item for item in rows if item["kernel"] == row["kernel"] and item["shape"] == against), None)
        return None if other is None else float(row["ms"] / other["ms"])
    if figure == "vs_peer":
        peer = row["peers"].get(against)
        return float(row["ms"] / peer) if isinstance(peer, float) else None
    return float(row[figure])


def table(result: dict[str, Any]) -> str:
    """Return the gates, and what was left out, as short tables."""
    gates: dict[tuple[str, str], list[bool | None]] = {}
    for row in result["rows"]:
        if row.get("gate"):
            gates.setdefault((row["kernel"], row["gate"]["name"]), []).append(row["gate"]["passed"])
    lines = [f"{'kernel':<16} {'gate':<28} {'passed':>7} of {'judged':>6} {'not judged':>11}"]
    for (kernel, name), found in gates.items():
        judged = [passed for passed in found if passed is not None]
        lines.append(f"{kernel:<16} {name:<28} {sum(judged):>7} of {len(judged):>6} {len(found) - len(judged):>11}")
    late = [item for item in result["left_out"] if not item["failed"]]
    if late:
        lines.append(f"no time was left for {len(late)}:")
        lines += [f"  {subject_of(item)}" for item in late]
    return "\n".join(lines)


def failures(result: dict[str, Any]) -> list[str]:
    """Return what failed, a line each: a kernel that did not run, or a group whose process ended."""
    return [f"{subject_of(item)}: {item['reason']}" for item in result["left_out"] if item["failed"]]


def subject_of(item: dict[str, Any]) -> str:
    """Name a kernel with its shape."""
    return " ".join([item["kernel"], ", ".join(f"{name} {value}" for name, value in item["shape"].items())]).rstrip()
