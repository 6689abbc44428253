"""`python -m serving.demo`, which `draftsmith demo` and `make demo` run."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
from rich.console import Console

from adapter.contracts import DraftsmithError
from adapter.settings import load_settings
from serving.demo.progress import Progress
from serving.demo.report import PLAIN_OF, print_report, surroundings
from serving.demo.service import Service, demo_settings
from serving.demo.stages import Demo

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="Watch the whole loop: traffic changes, a draft is trained, gated, swapped in, rolled back.")
def demo(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="An empty folder to keep; otherwise a temporary one.")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help="Hugging Face name or path of the target.")] = None,
    draft: Annotated[str | None, typer.Option("--draft", help="Name or path of the draft; `auto`.")] = None,
    port: Annotated[int, typer.Option("--port", help="Port of the API; 0 takes a free one.")] = 0,
) -> None:
    """Run the demonstration; exit status 1 when a stage did not end as it should."""
    words = Console(stderr=True)
    folder = data_dir or Path(tempfile.mkdtemp(prefix="draftsmith-demo-"))
    result = empty_result()
    try:
        settings, result["settings"] = demo_settings(
            load_settings(), data_dir=folder, port=port, draft=draft, target=target
        )
        status = run(Service(settings), words, result)
    except DraftsmithError as error:
        words.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        result["failed"], status = {"stage": "settings", "reason": str(error)}, 2
    finally:
        if data_dir is None:
            shutil.rmtree(folder, ignore_errors=True)
    if json_file is not None:
        write_json(json_file, result)
    print_report(Console(), result)
    raise typer.Exit(status)


def run(service: Service, words: Console, result: dict[str, Any]) -> int:
    """Play the demonstration against a service; whatever happens, the service is taken down."""
    log = service.settings.data_dir / "demo.log"
    began = time.monotonic()
    with log.open("a") as file, Progress(words) as progress:
        structlog.configure(logger_factory=structlog.WriteLoggerFactory(file=file))
        for name, change in result["settings"].items():
            mine, usual = _shown(change["demo"]), _shown(change["default"])
            progress.note(f"{name} = {mine} for this demonstration (default {usual})")
        demo = Demo(service, progress, result)
        try:
            asyncio.run(_play(demo))
            status = 0
        except (DraftsmithError, KeyboardInterrupt, asyncio.CancelledError) as error:
            reason = str(error) if isinstance(error, DraftsmithError) else "it was interrupted"
            result["failed"] = {"stage": progress.stage, "reason": reason}
            progress.happened(f"ended in the stage '{progress.stage}': {reason}", good=False)
            status = 1
        finally:
            progress.begin("stop", "taking every process down")
            service.stop()
            structlog.reset_defaults()
    result["wall_seconds"] = round(time.monotonic() - began, 1)
    return status


async def _play(demo: Demo) -> None:
    task = asyncio.ensure_future(demo.play())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task


def empty_result() -> dict[str, Any]:
    """Return the document that is filled in as the stages go; what stays unknown is null."""
    return {
        "target": None, "draft": None, "exact": None,
        "acceptance": dict.fromkeys(("before_shift", "at_shift", "after_adaptation", "after_rollback")),
        "tokens_per_second": dict.fromkeys(("no_speculation", "no_speculation_after", *PLAIN_OF)),
        "swap_pause_ms": None, "median_step_ms": None, "rollback_s": None,
        "rollback_swap_s": None,
        "requests": {"sent": 0, "failed": 0, "truncated": 0}, "log": None, "training": None,
        "marks": {}, "timeline": None, "failed": None, "settings": {}, **surroundings(), "wall_seconds": None,
    }  # fmt: skip


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write the document, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(app(prog_name="draftsmith demo"))
