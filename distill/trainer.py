"""The trainer's process: `python -m distill.trainer --job ID --epoch N`, exec'd by the worker.

Its stdin is a pipe and it exits when that closes; run by hand it needs a terminal there.  It reads settings from
the environment, prints JSON lines to stdout (progress, at last {"result": …}) and words to stderr.  Exit status:
0 done, 2 it would fail again, 1 anything else.  What a job does is in `distill.job`.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from typing import Any

import msgspec
import structlog
import torch
from transformers.utils import logging as transformers_logging

from adapter.contracts import DraftsmithError
from adapter.cores import step_aside, taking
from adapter.database import open_database
from adapter.settings import load_settings
from distill.energy import Energy
from distill.job import run_job
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
        settings, energy = load_settings(), Energy()
        step_aside(settings.distill.nice)
        torch.set_num_threads(settings.distill.threads)
        engine = open_database(settings.database)
        with taking(settings.run_dir, settings.distill.threads):
            result = run_job(settings, engine, arguments.job, arguments.epoch, _print_line)
        _print_line({"result": result | {"joules": energy.joules()}})
    except ReplayError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except DraftsmithError as error:
        sys.stderr.write(f"{error}\n")
        return FINAL_ERROR
    return 0


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
