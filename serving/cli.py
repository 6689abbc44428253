"""The `draftsmith` command.  Roles of other packages are exec'd, never imported: see ADR 0007."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from sqlalchemy.exc import SQLAlchemyError

from adapter.contracts import DraftsmithError
from adapter.settings import Settings, child_environment, load_settings
from serving import cli_advice, cli_drafts, cli_explain, cli_views, cli_vocab
from serving.cli_common import AsJson

app = typer.Typer(
    name="draftsmith", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Serve a language model with speculative decoding, and keep its draft tuned to the traffic it sees.",
)  # fmt: skip
app.add_typer(cli_drafts.app, name="drafts", help="List, show, promote and roll back draft versions.")
app.add_typer(cli_vocab.app, name="vocab", help="List, publish, promote and roll back what a draft may say.")

DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Database, artifacts, logs and sockets.")]
Target = Annotated[str | None, typer.Option("--target", help="Hugging Face name or path of the target model.")]
Draft = Annotated[str | None, typer.Option("--draft", help="Name or path of the draft; `auto` or `none`.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32 or bfloat16, for the target.")]
Port = Annotated[int | None, typer.Option("--port", help="Port of the API; 0 takes a free one.")]
DashboardPort = Annotated[
    int | None, typer.Option("--dashboard-port", help="Port of the dashboard; 0 takes a free one.")
]
Host = Annotated[str | None, typer.Option("--host", help="Address the API listens on.")]
DashboardHost = Annotated[
    str | None, typer.Option("--dashboard-host", help="Address the dashboard listens on; it asks for no login.")
]

console = Console(stderr=True)


@app.command()
def up(
    port: Port = None, dashboard_port: DashboardPort = None, data_dir: DataDir = None, target: Target = None,
    draft: Draft = None, dtype: Dtype = None, host: Host = None, dashboard_host: DashboardHost = None,
) -> None:  # fmt: skip
    """Run everything on this machine: API, engine, worker, watcher, dashboard, and Valkey if needed."""
    settings = load_settings(
        port=port, dashboard_port=dashboard_port, data_dir=data_dir, target=target, draft=draft, dtype=dtype, host=host,
        dashboard_host=dashboard_host,
    )  # fmt: skip
    cli_views.supervise(settings, ["engine", "api", "worker", "watcher"])


@app.command()
def serve(
    port: Port = None, data_dir: DataDir = None, target: Target = None, draft: Draft = None, dtype: Dtype = None,
    host: Host = None,
) -> None:  # fmt: skip
    """Serve only: the API and the engine, without training, watching or a dashboard."""
    settings = load_settings(port=port, data_dir=data_dir, target=target, draft=draft, dtype=dtype, host=host)
    cli_views.supervise(settings, ["engine", "api"])


@app.command()
def engine(data_dir: DataDir = None, target: Target = None, draft: Draft = None, dtype: Dtype = None) -> None:
    """Run the engine process alone, as a container does."""
    _exec("serving.engine", load_settings(data_dir=data_dir, target=target, draft=draft, dtype=dtype))


@app.command()
def api(port: Port = None, data_dir: DataDir = None, host: Host = None) -> None:
    """Run the API process alone; it waits for the engine of the same data folder."""
    _exec("serving.api", load_settings(port=port, data_dir=data_dir, host=host))


@app.command()
def worker(data_dir: DataDir = None) -> None:
    """Run the training worker alone."""
    _exec("distill", load_settings(data_dir=data_dir))


@app.command()
def watch(
    dashboard_port: DashboardPort = None, data_dir: DataDir = None, dashboard_host: DashboardHost = None
) -> None:  # fmt: skip
    """Run the watcher and the dashboard alone."""
    _exec("monitors", load_settings(dashboard_port=dashboard_port, data_dir=data_dir, dashboard_host=dashboard_host))


@app.command()
def status(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show what is served, how well the draft does, and which processes run."""
    cli_views.show_status(load_settings(data_dir=data_dir), as_json)


@app.command()
def explain(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show why the engine drafts as many tokens as it does: costs, beliefs, alternatives, measured speed-up."""
    cli_explain.show_explanation(load_settings(data_dir=data_dir), as_json)


@app.command()
def advise(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Say whether this traffic should be speculated on, with the numbers, and what would pay instead."""
    cli_advice.show_advice(load_settings(data_dir=data_dir), as_json)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bootstrap(context: typer.Context) -> None:
    """Make a day-0 draft for a Llama-shaped target, from text the target writes itself."""
    _exec("distill.bootstrap_cli", load_settings(), context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def demo(context: typer.Context) -> None:
    """Watch the whole loop: traffic changes, a draft is trained, gated, swapped in, rolled back."""
    _exec("serving.demo", load_settings(), context.args)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    typer.echo(installed("draftsmith"))


def _exec(module: str, settings: Settings, arguments: list[str] | None = None) -> None:
    """Become another module's process, with exactly these settings."""
    env: dict[str, Any] = child_environment(settings)
    os.execve(sys.executable, [sys.executable, "-m", module, *(arguments or [])], env)


def main() -> None:
    """Run the command; errors made on purpose end it with one message and status 2."""
    try:
        app()
        return
    except DraftsmithError as error:
        _say(str(error))
    except SQLAlchemyError as error:
        _say(f"the database cannot be used: {str(error).splitlines()[0]}; is it there, is its disk full, is it locked?")
    sys.exit(2)


def _say(reason: str) -> None:
    console.print(f"[bold red]error:[/] {escape(reason)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
