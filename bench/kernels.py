"""Measure every Triton kernel against its floor, its plain-torch reference and its peers, on a CUDA device.

The floor of a case is the largest of: its bytes at the bandwidth of a copy, its operations at the speed of a large
matrix product, and its launches at the cost of an empty one; all three are measured by the process that measures
the case.  Times are of captured graphs, over as many copies of the inputs as it takes to leave the caches.
`--compile-only` compiles for compute capability 9.0 instead, on any machine, and notes registers, spills and shared
memory.  CONTRIBUTING.md has the libraries it needs; others are peers where they can be imported.

    python -m bench.kernels [--json FILE] [--minutes 3] [--only sampler,attention] [--compile-only]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from adapter.contracts import DraftsmithError, SettingsError
from bench import result_file
from bench.environment import command, environment
from bench.kernel_clock import Clock, copies_for
from bench.kernel_gates import failures, judge, subject_of, table
from bench.kernel_subjects import subjects
from bench.subject import Subject

GROUPS = ("sampler", "cuts", "attention", "layers", "loss", "merge")
NO_GPU = "bench.kernels needs a CUDA device; PyTorch finds none here (--compile-only works without one)"
_WHAT = "milliseconds of each kernel, its floor on this device, its reference in plain torch and its peers"
_LEAST_SHARE = 0.5  # of an equal share, that a group gets when those before it took too long

Keep = Callable[[dict[str, Any]], None]


def measure(group: str, minutes: float, say: Callable[[str], None], keep: Keep) -> dict[str, Any]:
    """Run every subject of a group while there is time, and return the result; `keep` gets it while it grows.

    Raises:
        SettingsError: there is no CUDA device.
    """
    device = _cuda()
    until_s = time.monotonic() + 60 * minutes
    clock = Clock(device)
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    result = {"what": _WHAT, "ceilings": {group: clock.ceilings()}, "rows": rows, "left_out": left_out} | environment()
    for subject in subjects((group,), device):
        if time.monotonic() > until_s:
            left_out.append(_left_out(subject.kernel, subject.shape, "time", failed=False))
            continue
        try:
            rows.append(row_of(subject, clock))
            say(line_of(rows[-1]))
        except Exception as error:  # one that fails must not take the others' figures with it
            left_out.append(_left_out(subject.kernel, subject.shape, f"{type(error).__name__}: {error!s:.300}"))
            say(f"{subject_of(left_out[-1])}: {left_out[-1]['reason']}")
        subject.free()
        torch.cuda.empty_cache()
        for row in rows:
            judge(row, rows)
        keep(result)
    return result


def apart(only: tuple[str, ...], minutes: float, keep: Keep) -> dict[str, Any]:
    """Measure each group in a process of its own: a kernel that breaks the device's context ends one group only.

    Raises:
        SettingsError: there is no CUDA device.
    """
    _cuda()
    return merged(only, minutes, keep, _in_a_process)


Runner = Callable[[str, float], tuple[int, dict[str, Any] | None]]


def merged(only: tuple[str, ...], minutes: float, keep: Keep, run: Runner) -> dict[str, Any]:
    """Run the groups one after the other and put their results together.

    Args:
        run: measures a group for so many minutes; returns its exit status and its result, None without one.
    """
    begin_s = time.monotonic()
    whole: dict[str, Any] = {"what": _WHAT, "ceilings": {}, "rows": [], "left_out": []}
    for number, group in enumerate(only):
        left = minutes - (time.monotonic() - begin_s) / 60
        status, found = run(group, max(left / (len(only) - number), _LEAST_SHARE * minutes / len(only)))
        if found is None or "unfinished" in found:  # what it had measured until then is kept
            reason = f"its process ended with {status} before it was done; run it with --only {group} to see why"
            whole["left_out"].append(_left_out(f"group {group}", {}, reason))
        if found is not None:
            whole |= {name: found[name] for name in ("machine", "versions", "commit")}
            whole["ceilings"] |= found["ceilings"]  # floors of a group were computed from its own
            whole["rows"] += found["rows"]
            whole["left_out"] += found["left_out"]
        keep(whole)
    return environment() | whole  # asked last: it opens the device, which some let one process do at a time


def _in_a_process(group: str, minutes: float) -> tuple[int, dict[str, Any] | None]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        run = [sys.executable, "-m", "bench.kernels", "--only", group, "--minutes", str(minutes), "--json", str(path)]
        status = subprocess.run(run, check=False, stdout=subprocess.DEVNULL).returncode
        return status, json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _cuda() -> torch.device:
    if not torch.cuda.is_available():
        raise SettingsError(NO_GPU)
    return torch.device("cuda", torch.cuda.current_device())


def _left_out(kernel: str, shape: dict[str, Any], reason: str, *, failed: bool = True) -> dict[str, Any]:
    return {"kernel": kernel, "shape": shape, "reason": reason, "failed": failed}


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


def compiled() -> dict[str, Any]:
    """Compile every case of every kernel for compute capability 9.0 and note what it takes.

    Raises:
        SettingsError: Triton is not here, or is told to interpret.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SettingsError("--compile-only compiles nothing while TRITON_INTERPRET is 1; unset it")
    try:
        from kernels.gpu import aot, catalog
    except ImportError as error:
        raise SettingsError(f"--compile-only needs Triton: {error}; `pip install triton` brings it on Linux") from error
    rows, left_out = [], []
    for module, case in catalog.cases():
        try:
            found = aot.compile_case(case)
            rows.append({"module": module, "case": case.name, "warps": case.warps} | asdict(found))
        except Exception as error:  # the others are compiled all the same
            left_out.append(_left_out(module, {"case": case.name}, f"{type(error).__name__}: {error!s:.300}"))
    return {
        "what": "what each kernel takes when it is compiled for compute capability 9.0: registers a thread, bytes "
        "spilled a thread, shared bytes a program",
        "capability": aot.HOPPER, "rows": rows, "left_out": left_out,
    } | environment()  # fmt: skip


def line_of(row: dict[str, Any]) -> str:
    """Return a row as one line for a terminal."""
    shape = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
    peers = ", ".join(f"{name} {value}" for name, value in row["peers"].items() if isinstance(value, float))
    return (
        f"{row['kernel']:<16} {shape:<52} {row['ms']:>8.4f} ms, {row['fraction_of_floor']:>5.0%} of its floor; "
        f"reference {row['reference_ms']}; {peers}"
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 5)


def _groups(text: str) -> tuple[str, ...]:
    only = tuple(dict.fromkeys(text.split(",")))
    if unknown := sorted(set(only) - set(GROUPS)):
        raise argparse.ArgumentTypeError(f"{','.join(unknown)!r}: there are {', '.join(GROUPS)}")
    return only


def main() -> int:
    """Measure from the command line; the status is 0, 1 where something failed, 2 where nothing could begin."""
    parser = result_file.parser("bench.kernels", __doc__, 3.0)
    parser.add_argument("--only", type=_groups, default=GROUPS, help="groups of kernels, of " + ",".join(GROUPS))
    parser.add_argument("--compile-only", action="store_true", help="compile for a GPU that is not here")
    given = parser.parse_args()
    line = command("bench.kernels", sys.argv[1:])
    keep = result_file.keeper(given.json, line)
    try:
        with redirect_stdout(sys.stderr):  # what libraries print; the result may go to standard output
            if given.compile_only:
                result = compiled()
            elif len(given.only) > 1:
                result = apart(given.only, given.minutes, keep)
            else:
                result = measure(given.only[0], given.minutes, _say, keep)
    except DraftsmithError as error:
        print(error, file=sys.stderr)
        return 2
    shown = f"{len(result['rows'])} cases compiled" if given.compile_only else table(result)
    return result_file.finish(given.json, {"command": line} | result, shown, failures(result))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
