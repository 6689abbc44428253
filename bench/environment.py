"""Say where a benchmark ran: machine, versions and commit, for every result file."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_WAITING = "OMP_WAIT_POLICY"


def environment() -> dict[str, Any]:
    """Return machine, library versions and commit."""
    return {
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "memory_gib": _memory_gib(), "gpu": _gpu()},
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in ("torch", "triton", "transformers", "draftsmith") if (found := _version(name))},
        },
        "commit": _commit(),
    }


def command(module: str, arguments: list[str]) -> str:
    """Return the command line of a run without the places of one machine.

    How threads wait is part of it where it was asked for: threads that sleep at barriers are slower.
    """
    shown = [f"{_WAITING}={os.environ[_WAITING]}"] if _WAITING in os.environ else []
    shown += ["python", "-m", module]
    for before, word in zip(["", *arguments], arguments, strict=False):
        shown.append(
            {
                "--data": "FOLDER",
                "--keep": "FOLDER",
                "--prompts": "FILE",
                "--vllm-python": "PYTHON",
                "--guidellm": "PATH",
            }.get(before, word)
        )
    return shlex.join(shown)


def _version(name: str) -> str | None:
    """Return an installed version; None where a machine runs without it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
