"""The command line of `draftsmith bootstrap`: flags in, progress bars out, one line when it cannot work.

Knows how to ask and how to show; the work is `distill.bootstrap`.  Interrupted and repeated with the
same flags it continues where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adapter.contracts import DraftsmithError
from adapter.models import find_model
from adapter.pairs import SHIPPED
from adapter.settings import DEFAULT_TARGET, load_settings
from distill.bootstrap import bootstrap as make_draft
from distill.bootstrap_recipe import Recipe

_DEFAULT = Recipe()
console = Console(stderr=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Out = Annotated[Path, typer.Option("--out", help="Folder the draft is written to; pass it as --draft afterwards.")]
Target = Annotated[str, typer.Option("--target", help="Hugging Face name or path of the target model.")]
Work = Annotated[
    Path | None, typer.Option("--work", help="Folder of text and checkpoints; an interrupted run continues from it.")
]
Layers = Annotated[int, typer.Option("--layers", min=2, help="Layers kept: the target's first ones and its last.")]
Shards = Annotated[int, typer.Option("--shards", min=2, help="Files of self-written chats; the last one is held out.")]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Chats of a shard.")]
Length = Annotated[int, typer.Option("--length", min=32, help="Tokens of a chat.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")]
BatchRows = Annotated[int, typer.Option("--batch-rows", min=1, help="Chats of an optimizer step.")]
LearningRate = Annotated[float, typer.Option("--learning-rate", min=0.0, help="Peak learning rate.")]
Openings = Annotated[
    float, typer.Option("--openings", min=0.0, max=1.0, help="Share of chats that begin with a given word.")
]
VocabSize = Annotated[int, typer.Option("--vocab-size", min=0, help="Tokens the draft is trained to score; 0: all.")]
Start = Annotated[
    str | None,
    typer.Option("--start", help="Folder of a draft to go on from; `shipped`: the one that came with Draftsmith."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the text and of the order of training.")]


class _Bars:
    """One progress bar a phase, with the latest figures beside it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, object] = {}

    def report(self, phase: str, done: int, total: int, figures: dict[str, float]) -> None:
        """Show where a phase stands."""
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase, total=total, figures="")
        text = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        self._progress.update(self._tasks[phase], completed=done, total=total, figures=text)  # type: ignore[arg-type]


@app.command()
def bootstrap(
    out: Out, target: Target = DEFAULT_TARGET, work: Work = None, layers: Layers = _DEFAULT.layers,
    shards: Shards = _DEFAULT.shards, rows: Rows = _DEFAULT.rows, length: Length = _DEFAULT.length,
    steps: Steps = _DEFAULT.steps, batch_rows: BatchRows = _DEFAULT.batch_rows,
    learning_rate: LearningRate = _DEFAULT.learning_rate, openings: Openings = _DEFAULT.openings,
    vocab_size: VocabSize = _DEFAULT.vocab_size, start: Start = None, seed: Seed = _DEFAULT.seed,
) -> None:  # fmt: skip
    """Make a day-0 draft for a Llama-shaped target, from text the target writes itself."""
    recipe = Recipe(
        layers=layers, shards=shards, rows=rows, length=length, steps=steps, batch_rows=batch_rows,
        learning_rate=learning_rate, openings=openings, vocab_size=vocab_size, seed=seed,
    )  # fmt: skip
    settings = load_settings()
    folder = find_model(target, settings.cache_dir)
    name = target if target == DEFAULT_TARGET else folder.name
    begin = SHIPPED / name if start == "shipped" else Path(start) if start else None
    work = work or settings.cache_dir / "bootstrap" / name
    columns = (
        TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        manifest = make_draft(folder, name, out, work, recipe, _Bars(progress).report, begin)
    console.print(
        f"draft of layers {list(manifest.layers)} in {out}; acceptance {manifest.measured['acceptance']:.3f} over "
        f"{manifest.measured['positions']} held-out positions",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(f"serve it: draftsmith up --target {target} --draft {out}", highlight=False, soft_wrap=True)


def run(argv: list[str] | None = None) -> int:
    """Run the command; 2 with one line on stderr when the flags or the target cannot work."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        app(args=arguments, prog_name="draftsmith bootstrap", standalone_mode=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except DraftsmithError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
