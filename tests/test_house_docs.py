"""Documentation that cannot rot: generated tables, links, commands and words are checked against the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapter.settings import Settings
from docs.hazards import HAZARDS, OUT_OF_REACH, covering

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CLI = ROOT / "serving/cli.py"


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_generated_tables_are_current() -> None:
    """docs/generate.py would change nothing; otherwise `make docs` was forgotten."""
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("hazard", sorted(set(HAZARDS) - set(OUT_OF_REACH)))
def test_every_known_failure_has_a_test(hazard: str) -> None:
    """Each hazard's id is in the name of at least one test."""
    assert list(covering(hazard, ROOT / "tests")), f"no test is named for {hazard}: {HAZARDS[hazard]}"


def test_every_setting_is_documented() -> None:
    """Every field says what it means, so that the table has no empty cell."""
    for name, field in Settings.model_fields.items():
        sections = getattr(field.annotation, "model_fields", None)
        for inner, item in (sections or {name: field}).items():
            assert item.description, f"{name}.{inner} has no description"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page is a file or folder of the repository."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        assert (page.parent / target.split("#")[0]).exists(), f"{relative(page)} links to {target}"


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_anchors_exist(page: Path) -> None:
    """A link into a page names a heading of it."""
    for target in re.findall(r"\]\(([^)\s:]*#[^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        assert anchor in anchors(page.parent / file if file else page), f"{relative(page)} links to {target}"


def commands() -> dict[str, Any]:
    """Every command by the words that call it, groups included."""
    from typer.main import get_command

    from serving.cli import app

    found = {}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        found[name] = command
        found |= {f"{name} {inner}": item for inner, item in getattr(command, "commands", {}).items()}
    return found


@pytest.mark.skipif(not CLI.exists(), reason="there is no command line yet")
def test_commands_and_docs_agree() -> None:
    """Every subcommand is named in a page, and every `draftsmith x` that a page names is a subcommand."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    known = commands()
    groups = {name.split()[0] for name in known if " " in name}
    named = set()
    for first, second in re.findall(r"(?:`|bin/|^)draftsmith ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?", text, re.MULTILINE):
        named |= {first, f"{first} {second}"} if first in groups and second else {first}
    assert [] == sorted(known.keys() - named)
    assert [] == sorted(named - known.keys())


@pytest.mark.skipif(not CLI.exists(), reason="there is no command line yet")
def test_every_command_has_help() -> None:
    """Each command says in a sentence what it does."""
    for name, command in commands().items():
        assert command.help, name


def test_environment_names_in_pages_are_settings() -> None:
    """A DRAFTSMITH_ variable that a page names can be set."""
    for page in PAGES:
        for name in re.findall(r"DRAFTSMITH_([A-Z0-9_]+[A-Z0-9])", page.read_text(encoding="utf-8")):
            section, _, field = name.lower().partition("__")
            assert section in Settings.model_fields, f"{relative(page)}: DRAFTSMITH_{name}"
            if field:
                assert field in Settings.model_fields[section].annotation.model_fields  # type: ignore[union-attr]


def test_dotted_settings_in_the_runbook_exist() -> None:
    """`section.name` in the runbook and the decisions is a setting."""
    sections = [name for name, item in Settings.model_fields.items() if hasattr(item.annotation, "model_fields")]
    pages = [ROOT / "docs/operations.md", *(ROOT / "docs/adr").glob("*.md")]
    for page in pages:
        for section, field in re.findall(rf"`({'|'.join(sections)})\.(\w+)", page.read_text(encoding="utf-8")):
            assert field in Settings.model_fields[section].annotation.model_fields  # type: ignore[union-attr]


def test_decisions_are_numbered_and_short() -> None:
    """ADRs are 0001, 0002, … without a gap, each with a status, and each about a page."""
    files = sorted((ROOT / "docs/adr").glob("*.md"))
    assert [f"{number:04d}" for number in range(1, len(files) + 1)] == [path.name[:4] for path in files]
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {path.name[:4]} ")
        assert "\nStatus: " in text
        assert len(text.splitlines()) <= 70


def test_every_redis_key_is_in_the_table() -> None:
    """Each key that the module spells is described in its table."""
    from adapter import keys

    page = (ROOT / "docs/redis-keys.md").read_text(encoding="utf-8")
    for name, value in vars(keys).items():
        if name.isupper() and isinstance(value, str) and value.startswith("draftsmith:"):
            assert f"`{value.rstrip(':')}" in page, name
