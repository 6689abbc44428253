"""Measure every Triton kernel against its floor, its plain-torch reference and its peers, on a CUDA device.

The floor of a case is the largest of: its bytes at the bandwidth of a copy, its operations at the speed of a large
matrix product, and its launches at the cost of an empty one; all three are measured in the same run.  Times are of
captured graphs, over as many copies of the inputs as it takes to leave the caches.  `--compile-only` compiles for
compute capability 9.0 instead, on any machine, and notes registers, spills and shared memory.  Needs torch, triton
and numpy alone; other libraries are peers where they can be imported.

    python -m bench.kernels --json FILE [--minutes 3] [--only sampler,attention] [--compile-only]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from adapter.contracts import DraftsmithError, SettingsError
from bench.environment import command, environment
from bench.kernel_subjects import subjects
from bench.subject import Subject

GROUPS = ("sampler", "cuts", "attention", "layers", "loss", "merge")
_CACHE_BYTES = 256 << 20  # inputs of consecutive runs together: several times the second-level cache
_MOST_COPIES = 24
_RUNS = 24  # in one captured graph
_REPLAYS = 5
NO_GPU = "bench.kernels needs a CUDA device; PyTorch finds none here (--compile-only works without one)"


class Clock:
    """Times callables on the device, and knows what the device can do at best."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        source = torch.empty(1 << 29, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.numel() / self._seconds(lambda _: target.copy_(source), 1)
        a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
        self.flops = 2 * 8192**3 / self._seconds(lambda _: torch.mm(a, b), 1)
        one = torch.zeros(1, device=device)
        self.launch_s = self._seconds(lambda _: one.add_(1), 1)

    def ceilings(self) -> dict[str, float]:
        """What floors are made of."""
        return {
            "copy_tb_per_s": round(self.bandwidth / 1e12, 3), "matmul_tflop_per_s": round(self.flops / 1e12, 1),
            "launch_us": round(self.launch_s * 1e6, 3),
        }  # fmt: skip

    def floor_s(self, subject: Subject) -> float:
        """The least time the device could need."""
        return max(
            subject.bytes / self.bandwidth, subject.flops / self.flops, subject.launches * self.launch_s
        )  # fmt: skip

    def seconds(self, run: Callable[[int], object], inputs_bytes: int) -> float:
        """Median seconds of one run; `run` gets the number of the copy of its inputs to work on."""
        return self._seconds(run, copies_for(inputs_bytes))

    def _seconds(self, run: Callable[[int], object], copies: int) -> float:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))  # which may still be making the inputs
        with torch.cuda.stream(side):
            for number in range(min(3, copies)):
                run(number)
        side.synchronize()
        times = []
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for number in range(_RUNS):
                    run(number % copies)
            begin_all: Callable[[], None] = graph.replay
        except RuntimeError:  # a peer that asks the host something cannot be captured
            torch.cuda.synchronize()

            def begin_all() -> None:
                for number in range(_RUNS):
                    run(number % copies)

        for _ in range(_REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            begin_all()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / _RUNS)
        return statistics.median(times)


def copies_for(inputs_bytes: int) -> int:
    """How many copies of the inputs take turns."""
    return max(1, min(_MOST_COPIES, -(-_CACHE_BYTES // max(1, inputs_bytes))))


def measure(only: tuple[str, ...], minutes: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Run every subject while there is time, and return the result.

    Raises:
        SettingsError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise SettingsError(NO_GPU)
    device = torch.device("cuda", torch.cuda.current_device())
    where, until_s = environment(), time.monotonic() + 60 * minutes
    clock = Clock(device)
    rows, left_out = [], []
    for subject in subjects(only, device):
        if time.monotonic() > until_s:
            left_out.append({"kernel": subject.kernel, "shape": subject.shape, "reason": "time"})
            continue
        try:
            rows.append(row_of(subject, clock))
            say(line_of(rows[-1]))
        except Exception as error:  # one that fails must not take the others' figures with it
            left_out.append({"kernel": subject.kernel, "shape": subject.shape, "reason": f"{error!s:.300}"})
            say(f"{subject.kernel} {subject.shape}: {type(error).__name__}: {error!s:.300}")
        subject.free()
        torch.cuda.empty_cache()
    for row in rows:
        judge(row, rows)
    return {
        "what": "milliseconds of each kernel, its floor on this device, its reference in plain torch and its peers",
        "ceilings": clock.ceilings(), "rows": rows, "left_out": left_out,
    } | where  # fmt: skip


def apart(only: tuple[str, ...], minutes: float) -> dict[str, Any]:
    """Measure each group in a process of its own: a kernel that breaks the device's context ends one group only.

    Raises:
        SettingsError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise SettingsError(NO_GPU)
    results, lost = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, group in enumerate(only):
            path = Path(folder) / f"{number}.json"
            share = str(minutes / len(only))
            run = [sys.executable, "-m", "bench.kernels", "--only", group, "--minutes", share, "--json", str(path)]
            done = subprocess.run(run, check=False, stdout=subprocess.DEVNULL)
            if path.exists():
                results.append(json.loads(path.read_text(encoding="utf-8")))
            else:
                lost.append({"kernel": group, "shape": {}, "reason": f"its process ended with {done.returncode}"})
    if not results:
        raise SettingsError("no group of kernels could be measured; run one alone with --only to see why")
    whole = results[0]
    whole["rows"] = [row for result in results for row in result["rows"]]
    whole["left_out"] = lost + [item for result in results for item in result["left_out"]]
    return whole


def row_of(subject: Subject, clock: Clock) -> dict[str, Any]:
    """Measure one subject with its reference and its peers."""
    copies = copies_for(subject.inputs_bytes)
    subject.build(copies)
    floor_s = clock.floor_s(subject)
    seconds = clock.seconds(subject.run, subject.inputs_bytes)
    row: dict[str, Any] = {
        "kernel": subject.kernel, "shape": subject.shape, "ms": _ms(seconds), "floor_ms": _ms(floor_s),
        "fraction_of_floor": round(floor_s / seconds, 4), "bytes": subject.bytes, "flops": subject.flops,
        "reference_ms": None, "peers": {}, "gate": None,
    }  # fmt: skip
    if subject.reference is not None:
        row["reference_ms"] = _ms(clock.seconds(subject.reference, subject.inputs_bytes))
    for name, peer in subject.peers.items():
        try:
            row["peers"][name] = _ms(clock.seconds(peer, subject.inputs_bytes))
        except Exception as error:  # a peer that does not run here is named, not hidden
            row["peers"][name] = f"{type(error).__name__}: {str(error)[:120]}"
            torch.cuda.synchronize()
    if subject.gate is not None:
        row["gate"] = asdict(subject.gate)
    return row


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


def compiled() -> dict[str, Any]:
    """Compile every case of every kernel for compute capability 9.0 and note what it takes."""
    from kernels.gpu import aot, catalog

    rows = []
    for module, case in catalog.cases():
        found = aot.compile_case(case)
        rows.append({"module": module, "case": case.name, "warps": case.warps} | asdict(found))
    return {
        "what": "what each kernel takes when it is compiled for compute capability 9.0: registers a thread, bytes "
        "spilled a thread, shared bytes a program",
        "capability": aot.HOPPER, "rows": rows,
    } | environment()  # fmt: skip


def line_of(row: dict[str, Any]) -> str:
    """Return a row as one line for a terminal."""
    shape = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
    peers = ", ".join(f"{name} {value}" for name, value in row["peers"].items() if isinstance(value, float))
    return (
        f"{row['kernel']:<16} {shape:<52} {row['ms']:>8.4f} ms, {row['fraction_of_floor']:>5.0%} of its floor; "
        f"reference {row['reference_ms']}; {peers}"
    )


def table(result: dict[str, Any]) -> str:
    """Return the gates as a short table."""
    lines = [f"{'kernel':<16} {'gate':<28} {'passed':>7} of {'judged':>6}"]
    gates: dict[tuple[str, str], list[bool]] = {}
    for row in result["rows"]:
        if row.get("gate") and row["gate"]["passed"] is not None:
            gates.setdefault((row["kernel"], row["gate"]["name"]), []).append(row["gate"]["passed"])
    lines += [f"{kernel:<16} {name:<28} {sum(found):>7} of {len(found):>6}" for (kernel, name), found in gates.items()]
    return "\n".join(lines)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 5)


def main() -> int:
    """Measure from the command line; 2 where that cannot be done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file of the result")
    parser.add_argument("--minutes", type=float, default=3.0, help="time for everything, about")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups of kernels, of " + ",".join(GROUPS))
    parser.add_argument("--compile-only", action="store_true", help="compile for a GPU that is not here")
    arguments = parser.parse_args()
    only = tuple(arguments.only.split(","))
    if unknown := sorted(set(only) - set(GROUPS)):
        print(f"--only {','.join(unknown)}: there are {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    try:
        if arguments.compile_only:
            result = compiled()
        elif len(only) > 1:
            result = apart(only, arguments.minutes)
        else:
            result = measure(only, arguments.minutes, _say)
    except DraftsmithError as error:
        print(error, file=sys.stderr)
        return 2
    result = {"command": command("bench.kernels", sys.argv[1:])} | result
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{len(result['rows'])} rows in {arguments.json}" if arguments.compile_only else table(result))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
