"""A short table of a result of `bench.shift` for the terminal.  Pure."""

from __future__ import annotations

from typing import Any

_HEAD = ("scenario", "arm", "at shift", "recovered", "oracle", "won back", "requests", "s to 80 %", "x static",
         "trained s", "failed")  # fmt: skip
_MARK = {True: "met   ", False: "missed", None: "?     "}


def table(result: dict[str, Any]) -> str:
    """Return one line an arm and one a target; `x static` is end-to-end speed over the static arm's, recovered."""
    rows = [_HEAD]
    lines = []
    for name, scenario in result["scenarios"].items():
        for arm, item in scenario.items():
            against = (item["against_static"] or {}).get("recovered", {}).get("end_to_end", {})
            rows.append((
                name, arm, _share(item["at_shift"]), _share(item["recovered"]), _share(item["oracle"]),
                _share(item["recovered_fraction"]), _count(item["requests_to_80_percent"]),
                _count(item["seconds_to_80_percent"]), _share(against) if against else "–",
                _count(item["training_seconds"] or None), str(item["failed"]),
            ))  # fmt: skip
        rows += [(name, arm, reason[:60]) for arm, reason in result["arms_failed"][name].items()]  # type: ignore[misc]
        lines += [f"{_MARK[item['met']]} {name}: {item['target']}: {item['value']}" for item in result["targets"][name]]
    widths = [max(len(row[i]) for row in rows if len(row) == len(_HEAD)) for i in range(len(_HEAD))]
    shown = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join(shown + lines)


def _share(item: dict[str, Any]) -> str:
    if item.get("value") is None:
        return "–"
    low, high = item["interval"]
    return f"{item['value']:.3f} [{low:.3f}, {high:.3f}]"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
