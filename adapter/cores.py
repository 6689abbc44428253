"""A training tells the engine of its machine how many cores it computes on, so that the two share none.

Threads that wait for each other at every barrier must not share a core with somebody who does not wait: a
step then takes as long as the other's turns.  A lock on a file in the run folder carries the message, as it
ends with the process that holds it, however that ends.  Called by the trainer and by the engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

CORES_FILE = "training.cores"


@contextlib.contextmanager
def taking(run_dir: Path, threads: int) -> Iterator[None]:
    """Say that this process computes with so many threads, as long as the context lasts."""
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = run_dir / CORES_FILE
    with path.open("a+") as file:
        with contextlib.suppress(OSError):  # another training says the same already
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(str(threads))
            file.flush()
        yield


def taken(run_dir: Path) -> int:
    """Return on how many cores a training computes now; 0 when there is none."""
    try:
        with (run_dir / CORES_FILE).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return int(file.read() or 1)
    except (OSError, ValueError):
        pass
    return 0


def step_aside(nice: int) -> None:
    """Lower this process's priority, and that of its session where the kernel weighs sessions against each other.

    With autogroups on, as most distributions have them, niceness alone counts only inside a session.
    """
    os.nice(nice)
    with contextlib.suppress(OSError):  # no autogroups here
        Path("/proc/self/autogroup").write_text(str(min(19, os.getpriority(os.PRIO_PROCESS, 0))))
