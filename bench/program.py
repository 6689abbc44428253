"""What the measuring programs share on the command line: arguments, quiet libraries, the file of the result.

Knows nothing of what is measured.  Used by `bench.engine`, `bench.record` and `bench.load`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from adapter.contracts import DraftsmithError
from adapter.logs import configure_logging
from bench.environment import command
from bench.options import PairOptions


def parser(doc: str | None, default: PairOptions) -> argparse.ArgumentParser:
    """Return a parser of the arguments that every program has; its description is the first line of `doc`."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--json", type=Path, required=True, help="file of the result")
    made.add_argument("--target", help="a folder or a name; the default target where left out")
    made.add_argument("--draft", help="a folder or a name; the shipped draft where left out")
    made.add_argument("--dtype", default=default.dtype, choices=("float32", "bfloat16"))
    return made


def run(module: str, arguments: argparse.ArgumentParser, measure: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Measure what the command line asks for and write the result; 2 where that cannot be measured.

    Args:
        module: the program's own name, for the command noted in the result.
        measure: gets the parsed arguments and returns the result with its `rows`.
    """
    given = vars(arguments.parse_args())
    path = given.pop("json")
    configure_logging(logging.WARNING)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        result = measure(given)
    except DraftsmithError as error:
        print(error, file=sys.stderr)
        return 2
    result = {"command": command(module, sys.argv[1:])} | result
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(f"{len(result['rows'])} rows in {path}")
    return 0


def say(line: str) -> None:
    """Tell the progress."""
    print(line, file=sys.stderr, flush=True)


def numbers(text: str) -> tuple[int, ...]:
    """Read an argument like `1,2,4`."""
    return tuple(int(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Read an argument like `high,low`."""
    return tuple(text.split(","))
