"""How many threads the engine computes with: all it was given, less the cores a training on this machine uses.

OpenMP's number of threads belongs to the thread that asks for it, so the decoding loop itself calls
`follow`: before the pair is timed, and between two steps.  Called by `build` and by `serving.engine.server`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import structlog
import torch

from adapter.cores import taken

log = structlog.get_logger(__name__)

_EVERY_S = 0.5


class Threads:
    """Keeps the engine and a training off each other's cores.

    Args:
        run_dir: where a training says what it uses.
        cores: of this machine, that this process may run on.
        clock: monotonic seconds.
    """

    def __init__(self, run_dir: Path, *, cores: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir = run_dir
        self._cores = cores or len(os.sched_getaffinity(0))
        self._most = torch.get_num_threads()
        self._clock = clock
        self._looked_s = float("-inf")

    def follow(self) -> None:
        """Look now and then whether a training runs, and take or give back its cores."""
        now = self._clock()
        if now - self._looked_s < _EVERY_S:
            return
        self._looked_s = now
        used = taken(self._run_dir)
        wanted = max(1, min(self._most, self._cores - used)) if used else self._most
        if wanted != torch.get_num_threads():
            torch.set_num_threads(wanted)
            log.info("threads_changed", threads=wanted, of=self._most)
