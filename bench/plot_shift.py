"""Draw how acceptance and speed go over time in a scenario of `bench.shift`, with drift, training and swap.

    python -m bench.plot_shift --json FILE [--out FOLDER]

Above, acceptance of measuring requests by arm with 95 % intervals; below, tokens a second of ordinary ones.  The
marks are those of the adaptive arm.  The paper is white, so it reads on dark pages as well.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

STYLES = {  # distinct without colour too
    "none": ("#333333", ":", "x"), "static": ("#8c8c8c", "--", "o"), "suffix": ("#b07d48", "-.", "^"),
    "oracle": ("#5b7db1", "--", "s"), "adaptive": ("#0b6e4f", "-", "D"),
}  # fmt: skip
_DRIFT, _SWAP, _SHIFT, _TRAINING = "#c0392b", "#7a3b69", "#333333", "#f1e3b8"


def picture(json_file: Path, scenario: str, folder: Path | None = None) -> Path:
    """Return where the picture of a scenario lies: beside its result, unless a folder is given."""
    return (folder or json_file.parent) / f"{json_file.stem}-{scenario}.svg"


def draw(result: dict[str, Any], name: str, out: Path) -> None:
    """Write the picture of one scenario; the same result gives the same bytes."""
    arms, line = result["scenarios"][name], result["timelines"][name]
    with pyplot.rc_context({"svg.hashsalt": "draftsmith", "font.size": 9, "axes.edgecolor": "#666666"}):
        figure, (above, below) = pyplot.subplots(
            2, 1, figsize=(7.6, 5.2), sharex=True, facecolor="white", layout="constrained", height_ratios=(1.4, 1)
        )
        figure.suptitle(f"{name}: {line['about']}", fontsize=10)
        _lines(above, arms, "acceptance")
        _lines(above, arms, "acceptance_elsewhere", faint=True)
        _lines(below, arms, "tokens_per_s")
        above.set_ylabel(f"acceptance on {' and '.join(line['judged']).upper()}" + _elsewhere(arms))
        below.set_ylabel("tokens a second, decoding")
        below.set_xlabel("seconds")
        below.set_ylim(bottom=0)
        below.set_xlim(0, line["seconds"])
        for axis in (above, below):
            _marks(axis, line["shifts_s"], arms.get("adaptive"))
        _versions(above, arms.get("adaptive"))
        handles, labels = below.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, facecolor="white", metadata={"Date": None} if out.suffix == ".svg" else None, dpi=110)
        pyplot.close(figure)


def _elsewhere(arms: dict[str, Any]) -> str:
    return "\n(hollow: on other text)" if any(arm["acceptance_elsewhere"] for arm in arms.values()) else ""


def _lines(axis: Any, arms: dict[str, Any], what: str, *, faint: bool = False) -> None:
    axis.set_facecolor("white")
    axis.grid(visible=True, color="#e3e3e3", linewidth=0.6)
    for arm, (colour, dash, marker) in STYLES.items():
        points = [item for item in arms.get(arm, {}).get(what) or () if item["value"] is not None]
        if not points:
            continue
        points = _with_gaps(points)
        x, y = [item["at_s"] for item in points], [item["value"] for item in points]
        main = arm == "adaptive" and not faint
        axis.plot(
            x, y, color=colour, linestyle="none" if faint else dash, marker=marker, markersize=3.5, label=arm,
            linewidth=1.8 if main else 1.1, fillstyle="none" if faint else "full", zorder=4 if main else 3,
        )  # fmt: skip
        if main and any(item.get("interval") for item in points):
            low, high = zip(*(item.get("interval") or (math.nan, math.nan) for item in points), strict=True)
            axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def _with_gaps(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Break the line where nothing was seen for more than two slices of time: nobody knows what was between."""
    width = min((b["at_s"] - a["at_s"] for a, b in pairwise(points)), default=0.0)
    found = points[:1]
    for before, point in pairwise(points):
        if point["at_s"] - before["at_s"] > 2.5 * width:
            found.append({"at_s": (before["at_s"] + point["at_s"]) / 2, "value": math.nan})
        found.append(point)
    return found


def _marks(axis: Any, shifts_s: list[float], arm: dict[str, Any] | None) -> None:
    """Draw lines where traffic changes, and the adaptive arm's trainings, drift and swaps."""
    marks = [(at_s, _SHIFT, "-", "traffic changes") for at_s in shifts_s]
    if arm is not None:
        for number, item in enumerate(arm["trainings"]):
            axis.axvspan(max(0, item["from_s"]), item["until_s"], color=_TRAINING, zorder=0, linewidth=0,
                         label=None if number else "training")  # fmt: skip
        marks += [(item["at_s"], _DRIFT, ":", "drift noticed") for item in arm["drift"] if item["at_s"] >= 0]
        marks += [(item["at_s"], _SWAP, "-.", "swap") for item in arm["swaps"]]
    named = set()
    for at_s, colour, dash, words in marks:
        axis.axvline(at_s, color=colour, linewidth=1.2, linestyle=dash, label=None if words in named else words)
        named.add(words)


def _versions(axis: Any, arm: dict[str, Any] | None) -> None:
    for item in arm["swaps"] if arm is not None else ():
        axis.annotate(f"v{item['version']}", (item["at_s"], 1), xycoords=("data", "axes fraction"), fontsize=8,
                      xytext=(0, 2), textcoords="offset points", ha="center", color=_SWAP)  # fmt: skip


def main() -> None:
    """Draw from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="a result of bench.shift")
    parser.add_argument("--out", type=Path, help="folder of the pictures; unset: beside the result")
    arguments = parser.parse_args()
    result = json.loads(arguments.json.read_text(encoding="utf-8"))
    for name, arms in result["scenarios"].items():
        if arms:
            draw(result, name, picture(arguments.json, name, arguments.out))


if __name__ == "__main__":
    main()
