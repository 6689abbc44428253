"""A training tells the engine of its machine how many cores it computes on, so that the two share none.

Threads that wait for each other at every barrier must not share a core with somebody who does not wait: a
step then takes as long as the other's turns.  A lock on a file in the run folder carries the message, as it
ends with the process that holds it, however that ends.  Called by the trainer and by the engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

CORES_FILE = "training.cores"
_TRIES = 20
_PAUSE_S = 0.01


@contextlib.contextmanager
def taking(run_dir: Path, threads: int) -> Iterator[None]:
    """Say that this process computes with so many threads, as long as the context lasts."""
    file = _announce(run_dir / CORES_FILE, threads)
    try:
        yield
    finally:
        if file is not None:
            os.close(file)


def _announce(path: Path, threads: int) -> int | None:
    """Return the locked file; None where it cannot be had, since training matters more than saying so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        log.warning("cores_not_announced", path=str(path), error=str(error))
        return None
    for _ in range(_TRIES):  # whoever looks holds the lock for a moment, too
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(file, 0)
            os.pwrite(file, str(threads).encode(), 0)
            return file
        time.sleep(_PAUSE_S)
    log.info("cores_not_announced", path=str(path), error="another training holds the file")
    os.close(file)
    return None


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
