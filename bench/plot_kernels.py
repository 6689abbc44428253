"""Draw the GPU kernels over their floor: time against bytes, both on logarithmic scales.

    python -m bench.plot_kernels [--json bench/results/<gpu>-kernels.json] [--out docs/img/roofline.svg]

Hollow marks lie on the floor that memory or the matrix units set; filled ones, where there is a result, are measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import torch
from matplotlib import pyplot

from bench.kernel_subjects import subjects
from bench.roofline import COPY_BYTES_PER_S, GROUPS, floor_us

ROOT = Path(__file__).resolve().parent.parent
IMAGE = ROOT / "docs/img/roofline.svg"
STYLES = {  # distinct without colour too
    "verify sampler": ("#0b6e4f", "o"), "cuts": ("#5b7db1", "s"), "attention": ("#b07d48", "^"),
    "add-norm": ("#8c8c8c", "v"), "silu-mul": ("#8c8c8c", "<"), "rope-and-write": ("#8c8c8c", ">"),
    "sparse loss": ("#7a3b69", "D"), "lora merge": ("#c0392b", "P"),
}  # fmt: skip

Point = tuple[float, float]  # megabytes, microseconds


def floors() -> dict[str, list[Point]]:
    """Return the computed floor of every subject by kernel."""
    found: dict[str, list[Point]] = {}
    for subject in subjects(GROUPS, torch.device("meta")):
        found.setdefault(subject.kernel, []).append((subject.bytes / 1e6, floor_us(subject)))
    return found


def measured(result: dict[str, Any]) -> dict[str, list[Point]]:
    """Return the measured times of a result by kernel."""
    found: dict[str, list[Point]] = {}
    for row in result["rows"]:
        found.setdefault(row["kernel"], []).append((row["bytes"] / 1e6, row["ms"] * 1e3))
    return found


def draw(times: dict[str, list[Point]] | None, out: Path) -> None:
    """Write the picture; the same figures give the same bytes.  `times` None draws floors alone."""
    lower = floors()
    with pyplot.rc_context({"svg.hashsalt": "draftsmith", "font.size": 9, "axes.edgecolor": "#666666"}):
        figure, axis = pyplot.subplots(figsize=(7.2, 4.2), facecolor="white", layout="constrained")
        axis.set_facecolor("white")
        ends = [min(x for points in lower.values() for x, _ in points), max(x for p in lower.values() for x, _ in p)]
        axis.plot(ends, [1e12 * x / COPY_BYTES_PER_S for x in ends], color="#333333", linewidth=0.8, label="4.3 TB/s")
        for kernel, (colour, marker) in STYLES.items():
            x, y = zip(*sorted(set(lower.get(kernel, []))), strict=True)
            name = kernel if times is None else None
            axis.plot(x, y, marker, color=colour, fillstyle="none", markersize=5, linestyle="none", label=name)
            if times is not None and kernel in times:
                axis.plot(*zip(*times[kernel], strict=True), marker, color=colour, markersize=5, label=kernel)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("megabytes read and written")
        axis.set_ylabel("microseconds" if times else "microseconds at the least")
        axis.grid(visible=True, which="major", color="#e3e3e3", linewidth=0.6)
        figure.legend(loc="outside right upper", frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, facecolor="white", metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    """Draw from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="a result of bench.kernels; without it, floors alone")
    parser.add_argument("--out", type=Path, default=IMAGE, help="the picture, .svg")
    arguments = parser.parse_args()
    times = None
    if arguments.json is not None:
        times = measured(json.loads(arguments.json.read_text(encoding="utf-8")))
    draw(times, arguments.out)


if __name__ == "__main__":
    main()
