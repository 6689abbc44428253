"""`draftsmith explain`: what the controller knows and why it chose last, asked of the running API."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapter.contracts import SettingsError
from adapter.facts import SERVING, Facts
from adapter.settings import Settings
from serving.cli_common import open_deployment

console = Console()
_TIMEOUT_S = 5.0


def show_explanation(settings: Settings, as_json: bool) -> None:
    """Print the controller's state.

    Raises:
        SettingsError: no API of this deployment answers, or its engine has said nothing yet.
    """
    told = _ask(settings)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    if told.get("controller") != "adaptive":
        console.print(
            f"the draft length is fixed: {_count(told.get('gamma', 0), 'token')} a round (engine.controller = fixed)"
            if told.get("drafts", True)
            else "nothing is drafted: no proposer is there (engine.proposers) or engine.gamma_max is 0"
        )
        return
    _print_decision(told["decision"])
    _print_costs(told["costs"])
    _print_beliefs(told["beliefs"])
    _print_routing(told.get("routing") or {})
    _print_measured(told)


def _ask(settings: Settings) -> dict[str, Any]:
    url = (Facts(open_deployment(settings)).get(SERVING) or {}).get("url")
    if not url:
        raise SettingsError(f"no API of {settings.data_dir} has started yet; start one with `draftsmith up`")
    headers = {"Authorization": f"Bearer {settings.api.keys[0]}"} if settings.api.keys else {}
    question = urllib.request.Request(f"{url}/debug/controller", headers=headers)
    try:
        with urllib.request.urlopen(question, timeout=_TIMEOUT_S) as response:
            told = json.load(response)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise SettingsError(f"the API at {url} does not answer: {error}; see `draftsmith status`") from None
    if not told:
        raise SettingsError(f"the API at {url} has heard nothing from its engine yet; try again in a moment")
    return dict(told)


def _print_decision(decision: dict[str, Any]) -> None:
    console.print(
        f"[bold]last choice[/] for {_count(decision['batch'], 'request')}: {escape(decision['sentence'])}",
        highlight=False,
    )
    if not decision["alternatives"]:
        return
    table = Table("gamma", "tokens/s", "against none", "drafted in the step", box=None, header_style="bold")
    plain = decision["plain_tokens_per_s"]
    for item in decision["alternatives"]:
        mark = " ←" if item["gamma"] == decision["gamma"] else ""
        rate = item["tokens_per_s"]  # 0 where nobody can draft so deep, or has to read too much first
        ratio = f"{rate / plain:.3f}" if plain and rate else "–"
        table.add_row(f"{item['gamma']}{mark}", f"{rate:.1f}" if rate else "–", ratio, str(item["drafted"]))
    console.print(table, highlight=False)


def _print_costs(costs: dict[str, Any]) -> None:
    table = Table("forward", "corrected by", "milliseconds by rows", box=None, header_style="bold")
    for name, curve in costs["table"].items():
        factor = costs["corrections"][name]
        cells = "  ".join(f"{rows}: {ms:.2f}" for rows, ms in zip(curve["rows"], curve["ms"], strict=True))
        table.add_row(name, f"{factor['factor']:.3f}{' !' if factor['alarm'] else ''}", cells)
    console.print(table, highlight=False)
    if any(factor["alarm"] for factor in costs["corrections"].values()):
        console.print("!: steps cost something else than was measured at start; the correction is in use", style="dim")
    console.print(
        f"a step costs {costs['overhead_ms']:.2f} ms besides, looking for matches {costs['propose_ms']:.2f} ms",
        highlight=False,
    )


def _print_beliefs(beliefs: dict[str, Any]) -> None:
    table = Table("segment", "draft", "acceptance", "tokens it rests on", box=None, header_style="bold")
    for kind in beliefs["kinds"]:
        match = f"{kind['proposer']}, {kind.get('match_tokens', '?')} tokens match"
        name = f"version {kind['version']}" if kind["proposer"] == "draft" else match
        table.add_row(escape(kind["segment"]), name, f"{kind['acceptance']:.3f}", f"{kind['examined']:.0f}")
    console.print(table if beliefs["kinds"] else "nothing was drafted yet", highlight=False)
    if any(kind["proposer"] != "draft" for kind in beliefs["kinds"]):
        console.print(
            "ngram: the text repeats itself; past: it repeats an earlier output", style="dim", highlight=False
        )  # fmt: skip


def _print_routing(routing: dict[str, dict[str, float]]) -> None:
    """Say which version a new request would most likely draft with, where versions draft side by side."""
    for segment, versions in routing.items():
        best = max(versions, key=lambda version: versions[version])
        words = ", ".join(f"version {version} {value:.3f}" for version, value in versions.items())
        console.print(f"routing of {escape(segment)}: version {best} fits best ({words})", highlight=False)


def _print_measured(told: dict[str, Any]) -> None:
    switchback = told["switchback"]
    speedup = switchback["speedup"]
    words = "not measured yet" if speedup is None else (
        f"{speedup['ratio']:.3f} [{speedup['low']:.3f}, {speedup['high']:.3f}]"
    )  # fmt: skip
    console.print(
        f"measured speed-up: {words}, from {switchback['pairs']} of {_count(switchback['windows'], 'plain window')}"
        + ("; speculation is bypassed" if switchback["bypass"] else ""),
        highlight=False,
    )
    reasons = ", ".join(f"{name} {count}" for name, count in sorted(told["reasons"].items(), key=lambda item: -item[1]))
    console.print(
        f"{_count(told['steps'], 'step')}, {_count(told['changes'], 'change')} of length: {reasons}", highlight=False
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
