"""The report: a chart of acceptance over time and the figures, on a terminal; and where they were measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapter.pairs import Pair, load_draft_manifest

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_ROWS = 8
_BAR = 22
_MARKS = {"shift": ("S", "yellow"), "promotion": ("P", "green"), "rollback": ("R", "red")}
_PHASES = (
    ("before_shift", "before the shift"), ("at_shift", "after the shift"), ("after_adaptation", "with the new version"),
    ("after_rollback", "after the roll back"),
)  # fmt: skip
_SPEEDS = (
    ("no_speculation", "no speculation"), ("before_shift", "before the shift"),
    ("no_speculation_after", "no speculation, shifted"), ("at_shift", "after the shift"),
    ("after_adaptation", "with the new version"),
)  # fmt: skip
PLAIN_OF = {  # which speed without speculation is of the same traffic
    "before_shift": "no_speculation", "at_shift": "no_speculation_after", "after_adaptation": "no_speculation_after",
}  # fmt: skip


def surroundings() -> dict[str, Any]:
    """Return machine, library versions, and the commit where the code is a git checkout."""
    found: dict[str, Any] = {
        "machine": {
            "cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform(terse=True),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        },
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("draftsmith", "torch", "transformers", "peft", "redis", "celery")},
    }  # fmt: skip
    commit = _commit(Path(__file__).resolve().parents[2])
    return found | ({"commit": commit} if commit else {})


def describe_draft(pair: Pair) -> str:
    """Name a draft by what it is, without its path."""
    what: str = pair.draft_kind
    if pair.draft_kind == "pruned" and pair.draft_path is not None:
        layers = load_draft_manifest(Path(pair.draft_path)).layers
        what = f"pruned to layers {' '.join(map(str, layers))}"
    return f"{what}, {pair.base_fingerprint[:12]}"


def print_report(console: Console, result: dict[str, Any]) -> None:
    """Print what is known of a result."""
    console.print()
    if result["timeline"] is not None:
        console.print(Text("acceptance over time", style="bold"))
        for line in chart(result["timeline"]["acceptance"], result["timeline"]["seconds"], result["marks"]):
            console.print(line, no_wrap=True, crop=True)
        console.print()
    if any(result["acceptance"].values()):
        console.print(_acceptance_table(result["acceptance"]))
        console.print()
    if any(value is not None for value in result["tokens_per_second"].values()):
        console.print(_speed_table(result["tokens_per_second"]))
        console.print()
    for sentence in sentences(result):
        console.print(sentence, highlight=False, soft_wrap=True)


def chart(values: list[float | None], seconds: float, marks: dict[str, float]) -> list[Text]:
    """Draw a bar chart with a column a value, a line of marks and a time axis."""
    top = max([value for value in values if value is not None], default=0.0) or 1.0
    places = {name: _column(marks[name], seconds, len(values)) for name in _MARKS if name in marks}
    lines = []
    for row in range(_ROWS, 0, -1):
        label = f"{top * row / _ROWS:5.2f} ┤" if row in (_ROWS, _ROWS // 2) else "      │"
        line = Text(label, style="dim")
        for column, value in enumerate(values):
            eighths = 0 if value is None else round(value / top * _ROWS * 8) - (row - 1) * 8
            line.append(_EIGHTHS[max(0, min(8, eighths))], style=_colour(column, places))
        lines.append(line)
    axis = Text("      └" + "─" * len(values), style="dim")
    under = [" "] * len(values)
    for name, column in places.items():
        under[column] = _MARKS[name][0]
    marked = Text("       ")
    for letter in under:
        style = next((colour for mark, colour in _MARKS.values() if mark == letter), "")
        marked.append(letter, style=f"bold {style}".strip())
    end = f"{seconds:.0f} s"
    legend = Text(f"       0 s{end:>{max(1, len(values) - 3)}}", style="dim")
    words = Text("       ")
    for name in places:
        letter, colour = _MARKS[name]
        words.append(letter, style=f"bold {colour}")
        words.append(f" {name} at {marks[name]:.0f} s   ")
    return [*lines, axis, marked, legend, words]


def sentences(result: dict[str, Any]) -> list[str]:
    """Return the rest of the figures, a sentence each."""
    lines = [*_exact_words(result["exact"]), *_training_words(result["training"])]
    if result["swap_pause_ms"] is not None:
        step = "" if result["median_step_ms"] is None else f"; a decode step takes {result['median_step_ms']:.0f} ms"
        lines.append(f"Longest pause for a swap: {result['swap_pause_ms']:.3f} ms{step}.")
    if result["rollback_s"] is not None:
        swap = result["rollback_swap_s"]
        first = "" if swap is None else f"drafted again after {swap:.2f} s and "
        lines.append(f"Roll back: the old version {first}was reported by the API after {result['rollback_s']:.2f} s.")
    requests, log = result["requests"], result["log"]
    lines.append(f"Requests: {requests['sent']} sent, {requests['failed']} failed, {requests['truncated']} truncated.")
    if log is not None:
        lines.append(f"Log: {log['entries']} entries written, {log['dropped']} dropped.")
    if result["wall_seconds"] is not None:
        lines.append(f"{result['wall_seconds']:.0f} s in all on {result['machine']['cores']} cores.")
    if result["failed"] is not None:
        failed = result["failed"]
        lines.append(f"[bold red]Not finished:[/] {failed['reason']} (stage '{failed['stage']}').")
    return lines


def _exact_words(exact: dict[str, Any] | None) -> list[str]:
    if exact is None:
        return []
    ties = "no ties" if not exact["ties"] else f"{exact['ties']} ties of equal tokens, counted apart"
    return [f"Same text: {exact['differing_tokens']} of {exact['tokens']} tokens differ in {exact['prompts']} answers, "
            f"{ties}."]  # fmt: skip


def _training_words(training: dict[str, Any] | None) -> list[str]:
    if training is None or training["seconds"] is None:
        return []
    verdict = (training["gate"] or {}).get("verdict", "no verdict")
    return [f"Training: {training['seconds']:.0f} s on {training['blocks']} logged blocks. Gate: {verdict}"]


def _acceptance_table(acceptance: dict[str, Any]) -> Table:
    known = [item for item in acceptance.values() if item and item["value"] is not None]
    top = max((item["interval"][1] for item in known), default=1.0) or 1.0
    table = Table("acceptance", "", "", "95 % interval", "requests", box=None, header_style="bold")
    for name, words in _PHASES:
        item = acceptance[name]
        if not item or item["value"] is None:
            table.add_row(words, "–", "", "", "")
            continue
        low, high = item["interval"]
        bar = "█" * round(item["value"] / top * _BAR)
        table.add_row(words, f"{item['value']:.3f}", bar, f"[{low:.3f}, {high:.3f}]", str(item["n"]))
    return table


def _speed_table(speeds: dict[str, float | None]) -> Table:
    top = max((value for value in speeds.values() if value is not None), default=1.0) or 1.0
    table = Table("tokens a second", "", "", "against no speculation", box=None, header_style="bold")
    for name, words in _SPEEDS:
        value, plain = speeds[name], speeds[PLAIN_OF.get(name, name)]
        ratio = "" if value is None or not plain else f"{value / plain:.2f}x"
        table.add_row(words, "–" if value is None else f"{value:.1f}", "█" * round((value or 0) / top * _BAR), ratio)
    return table


def _column(at_s: float, seconds: float, columns: int) -> int:
    return max(0, min(columns - 1, int(at_s / max(seconds, 1e-9) * columns)))


def _colour(column: int, places: dict[str, int]) -> str:
    passed = [name for name, place in places.items() if column >= place]
    return {"shift": "yellow", "promotion": "green", "rollback": "yellow"}.get(passed[-1] if passed else "", "cyan")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None
