"""What several commands share: options, opening a deployment, and moving aliases in the name of a person.

Knows nothing of what a registry holds.  Called by the `serving.cli_*` modules.
"""

from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from sqlalchemy import Engine

from adapter.contracts import SettingsError
from adapter.database import migrate, open_database
from adapter.settings import Settings
from adapter.versions import Aliases, Live

DataDir = Annotated[Path | None, typer.Option("--data-dir", help="The deployment's data folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; written to the audit log.")]
Expected = Annotated[
    int | None, typer.Option("--expected-generation", help="Refuse if somebody moved an alias since this generation.")
]


def open_deployment(settings: Settings) -> Engine:
    """Open the database of a deployment that exists.

    Raises:
        SettingsError: there is none in this folder.
    """
    if settings.database_url is None and not (settings.data_dir / "draftsmith.db").exists():
        raise SettingsError(
            f"{settings.data_dir} holds no deployment; name the folder of one with --data-dir or DRAFTSMITH_DATA_DIR, "
            "or start one there with `draftsmith up`"
        )
    database = open_database(settings.database)
    migrate(database)
    return database


def actor() -> str:
    """Name the person at the terminal for the audit log."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return "cli"


def alias_names(number: int, live: Aliases) -> list[str]:
    """Return which aliases point at a row."""
    named = [name for name, at in (("live", live.live), ("previous", live.previous)) if at == number]
    return [*named, "alternate"] if number in _alternates(live) else named


def say_live(console: Console, noun: str, live: Aliases, as_json: bool) -> None:
    """Print where the aliases point after a move; `noun` is what a row is called."""
    beside = _alternates(live)
    if as_json:
        said = {"generation": live.generation, "live": live.live, "previous": live.previous}
        typer.echo(json.dumps(said | ({"alternates": list(beside)} if isinstance(live, Live) else {})))
    else:
        named = f", beside it {', '.join(map(str, beside))}" if beside else ""
        console.print(f"{noun} {live.live} is live (generation {live.generation}, previous {live.previous}{named})")


def _alternates(live: Aliases) -> tuple[int, ...]:
    return live.alternates if isinstance(live, Live) else ()
