"""`draftsmith vocab`: the draft's vocabularies on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sqlalchemy import Engine

from adapter.contracts import SettingsError
from adapter.facts import Facts
from adapter.hints import announcer
from adapter.pairs import Pair, pair_from_facts
from adapter.settings import Settings, load_settings
from adapter.token_counts import read_counts
from adapter.vocab_registry import Vocabularies
from adapter.vocab_selection import build_vocab, target_vocab_size
from serving.cli_common import AsJson, DataDir, Expected, Reason, actor, alias_names, open_deployment, say_live

app = typer.Typer(no_args_is_help=True)

Size = Annotated[
    int | None, typer.Option("--size", min=1, help="Tokens it holds; unset: engine.draft_vocab_size of these settings.")
]
Hold = Annotated[bool, typer.Option("--no-promote", help="Store it, and leave the live one live.")]

console = Console()


@app.command("list")
def list_vocabularies(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List every vocabulary, newest first, the full one last."""
    settings, database, pair = _deployment(data_dir)
    registry = Vocabularies(database)
    live = registry.live()
    rows: list[dict[str, Any]] = [msgspec.to_builtins(row) for row in registry.rows()]
    rows.append(
        {"number": 0, "state": "ready", "size": target_vocab_size(pair), "coverage": 1.0, "reason": "all tokens"}
    )
    for row in rows:
        row["alias"] = " ".join(alias_names(row["number"], live))
    if as_json:
        in_use = settings.engine.draft_vocab_size > 0
        typer.echo(json.dumps({"generation": live.generation, "in_use": in_use, "vocabularies": rows}, indent=2))
        return
    table = Table("number", "alias", "state", "size", "coverage", "created by", "reason", box=None, header_style="bold")
    for row in rows:
        covered = "–" if row["coverage"] is None else f"{row['coverage']:.1%}"
        table.add_row(
            str(row["number"]), row["alias"], row["state"], str(row["size"]), covered,
            escape(row.get("created_by", "")), escape(row["reason"]),
        )  # fmt: skip
    console.print(table)


@app.command()
def publish(
    data_dir: DataDir = None, size: Size = None, no_promote: Hold = False,
    reason: Reason = "published on the command line", expected_generation: Expected = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Choose a vocabulary from the latest token counts, store it and make it live."""
    settings, database, pair = _deployment(data_dir)
    wanted = settings.engine.draft_vocab_size if size is None else size
    if not wanted:
        raise SettingsError("engine.draft_vocab_size = 0: this draft scores all tokens; give --size to publish anyway")
    registry = Vocabularies(database, announce=announcer(settings))
    registry.expect(expected_generation)
    manifest = build_vocab(settings.vocabularies_dir, pair, read_counts(settings.vocabularies_dir), wanted)
    row = registry.publish(manifest, actor=actor(), reason=reason)
    if not no_promote:
        registry.promote(row.number, actor=actor(), reason=reason, expected_generation=expected_generation)
    live = registry.live()
    if as_json:
        typer.echo(json.dumps({**msgspec.to_builtins(row), "generation": live.generation, "live": live.live}, indent=2))
        return
    counted = row.counted["tokens"]
    covered = (
        "nothing was counted yet, so by the default ranking alone" if row.coverage is None
        else f"{row.coverage:.2%} of the {counted} counted tokens inside"
    )  # fmt: skip
    console.print(f"vocabulary {row.number}: {row.size} tokens, {covered}", highlight=False)
    say_live(console, registry.noun, live, False)


@app.command()
def promote(
    number: int, data_dir: DataDir = None, reason: Reason = "promoted on the command line",
    expected_generation: Expected = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Make a vocabulary live; 0 is the full one."""
    registry = _registry(data_dir)
    live = registry.promote(number, actor=actor(), reason=reason, expected_generation=expected_generation)
    say_live(console, registry.noun, live, as_json)


@app.command()
def rollback(
    data_dir: DataDir = None, reason: Reason = "rolled back on the command line",
    expected_generation: Expected = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Make the previous vocabulary live again; with no previous one, the full one."""
    registry = _registry(data_dir)
    live = registry.roll_back(actor=actor(), reason=reason, expected_generation=expected_generation)
    say_live(console, registry.noun, live, as_json)


def _registry(data_dir: Path | None) -> Vocabularies:
    settings, database, _ = _deployment(data_dir)
    return Vocabularies(database, announce=announcer(settings))


def _deployment(data_dir: Path | None) -> tuple[Settings, Engine, Pair]:
    """Open a deployment that exists and was started at least once.

    Raises:
        SettingsError: there is none in this folder.
    """
    settings = load_settings(data_dir=data_dir)
    database = open_deployment(settings)
    pair = pair_from_facts(Facts(database))
    if pair is None:
        raise SettingsError(
            f"the engine of {settings.data_dir} never started, so its target is not known; start it once"
        )
    return settings, database, pair
