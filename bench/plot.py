"""Draw speed-up against batch size from results of `bench.engine`.

    python -m bench.plot [--json bench/results/engine.json ...] [--out docs/img/speedup.svg]

One panel a workload and width; a line an arm, each point the median over repeats of its speed divided by
that of no speculation in the same repeat.  The paper is white, so it reads on dark pages as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from bench.runs import kept, merge

ROOT = Path(__file__).resolve().parent.parent
IMAGE = ROOT / "docs/img/speedup.svg"
STYLES = {  # distinct without colour too
    "fixed-1": ("#8c8c8c", ":", "o"), "fixed-3": ("#5b7db1", "--", "s"), "fixed-5": ("#b07d48", "-.", "^"),
    "adaptive": ("#0b6e4f", "-", "D"),
}  # fmt: skip


def speedups(result: dict[str, Any]) -> dict[tuple[int, str], dict[str, list[tuple[int, float]]]]:
    """Return, by (width, workload) and arm, the points (batch, speed-up over no speculation)."""
    rows = [row for row in result["rows"] if row["workload"] != "rag" and row["temperature"] == 0]
    plain = {(row["widen"], row["workload"], row["batch"]): row for row in rows if row["arm"] == "none"}
    panels: dict[tuple[int, str], dict[str, list[tuple[int, float]]]] = {}
    for row in sorted(rows, key=lambda item: item["batch"]):
        base = plain.get((row["widen"], row["workload"], row["batch"]))
        if row["arm"] in STYLES and base is not None:
            pairs = zip(row["tokens_per_s_repeats"], base["tokens_per_s_repeats"], strict=False)
            point = (row["batch"], statistics.median(mine / theirs for mine, theirs in pairs))
            panels.setdefault((row["widen"], row["workload"]), {}).setdefault(row["arm"], []).append(point)
    return panels


def draw(result: dict[str, Any], out: Path) -> None:
    """Write the picture; the same result gives the same bytes."""
    panels = speedups(result)
    widths = sorted({width for width, _ in panels})
    names = [name for name in ("high", "mixed", "low") if any(name == workload for _, workload in panels)]
    with pyplot.rc_context({"svg.hashsalt": "draftsmith", "font.size": 9, "axes.edgecolor": "#666666"}):
        figure, axes = pyplot.subplots(
            len(widths), len(names), figsize=(3.1 * len(names), 2.5 * len(widths)), sharex=True, sharey=True,
            squeeze=False, facecolor="white", layout="constrained",
        )  # fmt: skip
        for line, width in enumerate(widths):
            for column, name in enumerate(names):
                _panel(axes[line][column], panels.get((width, name), {}), f"{name}, target widened {width}x")
        for axis in axes[-1]:
            axis.set_xlabel("requests decoded together")
        for line in axes:
            line[0].set_ylabel("speed, no speculation = 1")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, facecolor="white", metadata={"Date": None})
        pyplot.close(figure)


def _panel(axis: Any, lines: dict[str, list[tuple[int, float]]], title: str) -> None:
    axis.set_facecolor("white")
    axis.set_title(title, fontsize=9)
    axis.set_xscale("log", base=2)
    axis.axhline(1.0, color="#333333", linewidth=0.8)
    axis.grid(visible=True, color="#e3e3e3", linewidth=0.6)
    batches = sorted({batch for points in lines.values() for batch, _ in points})
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.minorticks_off()
    for arm, (colour, dash, marker) in STYLES.items():
        if arm in lines:
            axis.plot(
                *zip(*lines[arm], strict=True), color=colour, linestyle=dash, marker=marker, markersize=4, label=arm
            )


def main() -> None:
    """Draw from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, nargs="+", help="results of bench.engine; unset: all that are kept")
    parser.add_argument("--out", type=Path, default=IMAGE, help="the picture, .svg")
    arguments = parser.parse_args()
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.json] if arguments.json else kept()
    draw(merge(runs), arguments.out)


if __name__ == "__main__":
    main()
