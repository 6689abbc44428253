"""The file of a result, and the arguments that go with it: refused before anything is measured, written as one.

Knows nothing of what is measured; needs the standard library alone.  Used by `bench.kernels` and `bench.gpu`, which
write what they have while they run: time on a GPU is dear.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXIT_STATUS = """\
exit status:
  0  measured; what no time was left for is listed. A gate that is missed, and another library that does not run
     here, are figures of the result and no failures
  1  something failed, or nothing was measured; what that was is printed last
  2  it could not begin: an argument is wrong, or there is no such device
"""


def parser(module: str, doc: str | None, minutes: float) -> ArgumentParser:
    """Return a parser of the arguments that both programs have; its description is the first line of `doc`."""
    made = ArgumentParser(
        prog=f"python -m {module}", description=(doc or "").splitlines()[0], epilog=EXIT_STATUS,
        formatter_class=RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--json", type=result_file, metavar="FILE", help="file of the result, else printed")
    made.add_argument(
        "--minutes", type=minutes_of, default=minutes, help="when over, nothing more is begun (%(default)g)"
    )
    return made


def result_file(text: str) -> Path:
    """Read the name of a file that can be written.

    Raises:
        ArgumentTypeError: its folder is not there, or nobody may write there.
    """
    path = Path(text)
    if path.is_dir():
        raise ArgumentTypeError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ArgumentTypeError(f"the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ArgumentTypeError(f"the folder {path.parent} cannot be written to")
    return path


def minutes_of(text: str) -> float:
    """Read a time in minutes.

    Raises:
        ArgumentTypeError: it is no positive number.
    """
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ArgumentTypeError(f"{text!r} is no time; expected minutes, a number above 0")
    return found


def device_of(text: str) -> str:
    """Read the name of a device.

    Raises:
        ArgumentTypeError: the engine cannot run on such a device.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise ArgumentTypeError(f"{text!r} is no device; expected cuda, cuda:N or cpu")
    return text


def keeper(path: Path | None, command: str) -> Callable[[dict[str, Any]], None]:
    """Return what writes a result that is still growing, marked `unfinished`; without a file it does nothing."""

    def keep(result: dict[str, Any]) -> None:
        if path is not None:
            write(path, {"command": command} | result | {"unfinished": True})

    return keep


def write(path: Path, result: dict[str, Any]) -> None:
    """Replace the file with this result; whoever reads it meanwhile finds the old one or the new one, whole."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def finish(path: Path | None, result: dict[str, Any], table: str, failures: list[str]) -> int:
    """Write the result, show its table and what failed, and return the exit status."""
    if path is None:
        print(json.dumps(result, indent=1))
        print(table, file=sys.stderr)
    else:
        write(path, result)
        print(table, flush=True)
    if not result["rows"]:
        failures = [*failures, "nothing was measured"]
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(failures))
