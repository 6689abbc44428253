"""Run a command that dies with who started it, even while it is stopped: `python -m distill.leash COMMAND`.

A trainer notices that its worker is gone when its stdin ends.  One that is stopped, because serving goes first,
notices nothing; the kernel does.  Where it cannot be asked (not Linux), the command runs all the same.  Exec'd by the
worker's task, so it stays one process and imports next to nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> None:
    """Replace this process by the command."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
