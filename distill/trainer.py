"""The trainer's process: `python -m distill.trainer --job ID --epoch N`, exec'd by the worker.

Its stdin is a pipe and it exits when that closes; run by hand it needs a terminal there.  It reads settings from
the environment, prints JSON lines to stdout (progress, at last {"result": …}) and words to stderr.  Exit status:
0 done, 2 it would fail again, 1 anything else.  What a job does is in `distill.job`.

With `distill.processes` above one, torchrun starts as many of these, each with that stdin; rank 0 alone prints.
torchrun ends with 1 whatever its processes ended with, so rank 0 also prints {"failure": {"status": …, "error": …}}.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import traceback
from typing import Any

import msgspec
import structlog
import torch
from transformers.utils import logging as transformers_logging

from adapter.contracts import DraftsmithError
from adapter.cores import step_aside, taking
from adapter.database import open_database
from adapter.settings import Settings, load_settings
from adapter.turns import takes_turns
from distill.assignment import follow
from distill.energy import Energy
from distill.job import run_job
from distill.ranks import Ranks, launched
from distill.replay import ReplayError

FINAL_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    """Run one job; see the module docstring for streams and exit status."""
    parser = argparse.ArgumentParser(prog="python -m distill.trainer", description="Train one draft version.")
    parser.add_argument("--job", required=True, help="id of a job this process's parent has claimed")
    parser.add_argument("--epoch", required=True, type=int, help="fencing epoch of that claim")
    arguments = parser.parse_args(argv)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    transformers_logging.disable_progress_bar()
    threading.Thread(target=_exit_with_parent, name="parent-watch", daemon=True).start()
    try:
        settings = load_settings()
        processes = settings.distill.processes
        ranks = Ranks.alone() if processes == 1 else Ranks.join(processes)
        work(settings, ranks, arguments.job, arguments.epoch)
    except ReplayError as error:
        return _failed(str(error), 1)
    except DraftsmithError as error:
        return _failed(str(error), FINAL_ERROR)
    except Exception:
        if not launched():
            raise
        return _failed(traceback.format_exc(), 1)
    return 0


def work(settings: Settings, ranks: Ranks, job_id: str, epoch: int) -> None:
    """Do the job, or help the process that does; leave the others then."""
    energy, distill = Energy(), settings.distill
    step_aside(distill.nice)
    threads = _threads(settings)
    torch.set_num_threads(threads)
    if not ranks.first:
        follow(distill, ranks)
        ranks.leave()
        return
    engine = open_database(settings.database)
    try:
        with contextlib.ExitStack() as apart:
            if not takes_turns(settings):
                apart.enter_context(taking(settings.run_dir, distill.processes * threads))
            result = run_job(settings, engine, job_id, epoch, _print_line, ranks=ranks)
    finally:
        ranks.dismiss()
    _print_line({"result": result | {"joules": energy.joules()}})
    ranks.leave()


def _threads(settings: Settings) -> int:
    """Return how many threads this process computes with."""
    return settings.distill.threads or (len(os.sched_getaffinity(0)) if takes_turns(settings) else 1)


def _failed(words: str, status: int) -> int:
    """Say how this ends; return the exit status."""
    sys.stderr.write(f"{words}\n")
    if launched() and os.environ.get("RANK") == "0":
        _print_line({"failure": {"status": status, "error": words}})
    return status


def _exit_with_parent() -> None:
    """Leave at once when stdin ends: the worker that holds the other end is gone."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def _print_line(message: dict[str, Any]) -> None:
    sys.stdout.write(msgspec.json.encode(message).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
