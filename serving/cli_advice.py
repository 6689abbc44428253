"""`draftsmith advise`: what the watcher makes of the traffic, in the terminal."""

from __future__ import annotations

import json
import time
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapter.contracts import SettingsError
from adapter.facts import ADVICE, Facts
from adapter.settings import Settings
from serving.cli_common import open_deployment

console = Console()
_STALE_S = 60.0
_LEANING = {"for": "[green]for[/]", "against": "[red]against[/]", "neutral": "–"}


def show_advice(settings: Settings, as_json: bool) -> None:
    """Print the newest advice.

    Raises:
        SettingsError: there is no deployment, or nobody watched it yet.
    """
    advice = Facts(open_deployment(settings)).get(ADVICE)
    if advice is None:
        raise SettingsError(
            f"nobody watched the traffic of {settings.data_dir} yet; `draftsmith up` and `draftsmith watch` do"
        )
    if as_json:
        typer.echo(json.dumps(advice, indent=2))
        return
    _print(advice, time.time())


def _print(advice: dict[str, Any], now_s: float) -> None:
    console.print(f"[bold]{advice['verdict']}[/]  over {advice['requests']} requests", highlight=False)
    console.print(escape(advice["sentence"]), highlight=False)
    age_s = now_s - advice["at_s"]
    if age_s > _STALE_S:
        console.print(f"[yellow]This is {age_s / 60:.0f} minutes old: the watcher is not running.[/]", highlight=False)
    if advice["signals"]:
        table = Table("sign", "speaks", "in numbers", box=None, header_style="bold")
        for signal in advice["signals"]:
            table.add_row(escape(signal["name"]), _LEANING[signal["leaning"]], escape(signal["sentence"]))
        console.print(table, highlight=False)
    for line in advice["instead"]:
        console.print(f"would pay: {escape(line)}", highlight=False)
