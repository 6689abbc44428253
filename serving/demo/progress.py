"""One line that says what the demonstration waits for and why, and one line for each thing that happened."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

_PLAIN_EVERY_S = 15.0


class Progress:
    """A live line on a terminal; elsewhere a plain line now and then."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._began = clock()
        self._said_s = float("-inf")
        self._status = console.status("") if console.is_terminal else None
        self._title = ""
        self.stage = ""

    def __enter__(self) -> Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def begin(self, stage: str, title: str) -> None:
        """Begin a stage."""
        self.stage, self._title = stage, title
        self._said_s = float("-inf")
        self.waiting("")

    def waiting(self, words: str) -> None:
        """Say what the stage waits for, now."""
        text = f"{self._time()}  [bold]{escape(self._title)}[/]" + (f": {escape(words)}" if words else "")
        if self._status is not None:
            self._status.update(text)
        elif self._clock() - self._said_s >= _PLAIN_EVERY_S:
            self._said_s = self._clock()
            self._console.print(text, highlight=False, soft_wrap=True)

    def happened(self, words: str, *, good: bool = True) -> None:
        """Leave a line that stays."""
        mark = "[green]✓[/]" if good else "[red]✗[/]"
        self._console.print(f"{self._time()} {mark} {escape(words)}", highlight=False, soft_wrap=True)

    def note(self, words: str) -> None:
        """Leave a line of explanation."""
        self._console.print(f"[dim]{escape(words)}[/]", highlight=False, soft_wrap=True)

    def _time(self) -> str:
        seconds = int(self._clock() - self._began)
        return f"[dim]{seconds // 60:2d}:{seconds % 60:02d}[/]"
