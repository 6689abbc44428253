"""`draftsmith drafts`: the registry's verbs on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapter.contracts import RegistryError
from adapter.facts import PAYOFF, Facts
from adapter.hints import announcer
from adapter.jobs import Jobs
from adapter.registry import Registry
from adapter.settings import load_settings
from adapter.versions import Draft, Live
from serving.cli_common import AsJson, DataDir, Expected, Reason, actor, alias_names, open_deployment, say_live

app = typer.Typer(no_args_is_help=True)

console = Console()


@app.command("list")
def list_drafts(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List every version, newest first."""
    engine = open_deployment(load_settings(data_dir=data_dir))
    registry, accounts = Registry(engine), Facts(engine).get(PAYOFF) or {}
    live, drafts = registry.live(), registry.drafts()
    if as_json:
        rows = [
            {**_plain(draft), "alias": _alias(draft.version, live), "payoff": accounts.get(str(draft.version))}
            for draft in drafts
        ]
        typer.echo(json.dumps({"generation": live.generation, "drafts": rows}, indent=2))
        return
    columns = ("version", "alias", "state", "parent", "size", "created by", "training for saved", "verdict")
    table = Table(*columns, box=None, header_style="bold")
    for draft in drafts:
        size = f"{draft.artifact_bytes / 1e6:.1f} MB" if draft.artifact_bytes else "–"
        parent = "–" if draft.parent is None else str(draft.parent)
        table.add_row(
            str(draft.version), _alias(draft.version, live), draft.state, parent, size, escape(draft.created_by),
            _price(accounts.get(str(draft.version))), escape(draft.reason),
        )  # fmt: skip
    console.print(table)


@app.command()
def show(version: int, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show one version with its gate, its data and its artifact."""
    registry = open_registry(data_dir)
    draft = registry.draft(version)
    if as_json:
        typer.echo(json.dumps({**_plain(draft), "alias": _alias(version, registry.live())}, indent=2))
        return
    for name, value in _plain(draft).items():
        words = json.dumps(value) if isinstance(value, dict) else "–" if value is None else str(value)
        console.print(f"[bold]{name}[/]: {escape(words)}", highlight=False)


@app.command()
def promote(
    version: int, data_dir: DataDir = None, reason: Reason = "promoted on the command line",
    expected_generation: Expected = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Make a version live."""
    live = open_registry(data_dir).promote(
        version, actor=actor(), reason=reason, expected_generation=expected_generation
    )
    say_live(console, Registry.noun, live, as_json)


@app.command()
def rollback(
    data_dir: DataDir = None, reason: Reason = "rolled back on the command line",
    expected_generation: Expected = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Make the previous version live again; what was live becomes previous, so a second call undoes the first."""
    live = open_registry(data_dir).roll_back(actor=actor(), reason=reason, expected_generation=expected_generation)
    say_live(console, Registry.noun, live, as_json)


@app.command()
def admit(
    version: int, data_dir: DataDir = None, reason: Reason = "admitted on the command line",
    expected_generation: Expected = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Let a version draft beside the live one, for requests that it fits better."""
    most = load_settings(data_dir=data_dir).engine.alternates
    live = open_registry(data_dir).admit(
        version, most=most, actor=actor(), reason=reason, expected_generation=expected_generation
    )
    say_live(console, Registry.noun, live, as_json)


@app.command()
def dismiss(
    version: int, data_dir: DataDir = None, reason: Reason = "dismissed on the command line",
    expected_generation: Expected = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Let an alternate draft no longer; it is kept and can be admitted or promoted again."""
    live = open_registry(data_dir).dismiss(
        version, actor=actor(), reason=reason, expected_generation=expected_generation
    )
    say_live(console, Registry.noun, live, as_json)


@app.command()
def train(data_dir: DataDir = None, reason: Reason = "asked for on the command line", as_json: AsJson = False) -> None:
    """Ask for a training now; this also resumes an adaptation that has stopped itself."""
    job = Jobs(open_deployment(load_settings(data_dir=data_dir))).request(reason=reason, requested_by=actor())
    if job is None:
        raise RegistryError("a training is open already; `draftsmith status` shows it")
    if as_json:
        typer.echo(json.dumps({"job": job.id}))
    else:
        console.print(f"training {job.id} waits for a worker; `draftsmith status` shows how it goes")


def open_registry(data_dir: Path | None) -> Registry:
    """Open the registry of a deployment that exists.

    Raises:
        SettingsError: there is none in this folder.
    """
    settings = load_settings(data_dir=data_dir)
    return Registry(open_deployment(settings), announce=announcer(settings))


def _alias(version: int, live: Live) -> str:
    names = alias_names(version, live)
    return " ".join([*names, "floor"] if version == 0 else names)


def _price(account: dict[str, Any] | None) -> str:
    """Say what a version's trainings took and what it saved; a dash where it was never live."""
    if account is None:
        return "–"
    saved = "unknown" if account["saved_s"] is None else f"{account['saved_s']:,.0f} s"
    return f"{account['training_s']:,.0f} s for {saved}"


def _plain(draft: Draft) -> dict[str, Any]:
    return dict(msgspec.to_builtins(draft))
