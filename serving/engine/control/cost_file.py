"""Keep what a pair was measured to cost on a machine on disk, so that the next start need not measure again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from serving.engine.control.cost_table import FORMAT, CostTable

log = structlog.get_logger(__name__)


def fingerprint_of(facts: dict[str, object]) -> str:
    """Return a hash of everything a table depends on; another hash, another table."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def load_or_measure(
    folder: Path, fingerprint: str, measure: Callable[[], CostTable], outdated: Callable[[CostTable], bool]
) -> CostTable:
    """Return the table kept under `folder` unless it is outdated, or measure it and keep it.

    A file that cannot be read or says nonsense is measured again, and a folder that cannot be written
    costs only the next start its seconds: neither may keep the engine from serving.
    """
    path = folder / f"{fingerprint[:32]}.json"
    try:
        table = msgspec.json.decode(path.read_bytes(), type=CostTable)
        if table.fingerprint != fingerprint or table.format != FORMAT:
            log.warning("cost_table_of_another_pair", path=str(path), action="measured again")
        elif outdated(table):
            log.info("cost_table_outdated", path=str(path), reason="forwards are faster now", action="measured again")
        else:
            return table
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        log.warning("cost_table_unreadable", path=str(path), error=str(error), action="measured again")
    table = measure()
    if not table.settled:
        log.warning("cost_table_noisy", action="used now, measured again at the next start")
        return table
    try:
        _write(path, msgspec.json.format(msgspec.json.encode(table)))
    except OSError as error:
        log.warning("cost_table_not_kept", path=str(path), error=str(error))
    return table


def _write(path: Path, data: bytes) -> None:
    """Put a whole file in place, so that a reader never meets half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
