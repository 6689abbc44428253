"""One way to log for every process: one line an event, key=value, UTC, on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Any

try:
    import structlog
except ModuleNotFoundError:  # a machine that only measures the engine needs none of it
    structlog = None  # type: ignore[assignment]


def get_logger(name: str) -> Any:
    """Return structlog's logger; where that is not installed, one that prints the same words plainly."""
    return structlog.get_logger(name) if structlog is not None else _PlainLogger(name)


class _PlainLogger:
    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def __getattr__(self, level: str) -> Any:
        def say(event: str, **values: object) -> None:
            text = " ".join([event, *(f"{key}={value}" for key, value in values.items())])
            getattr(self._logger, level)(text)

        return say


def configure_logging(level: int = logging.INFO) -> None:
    """Set structlog up; colours only on a terminal.  Called first by every entry point."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *_renderer(sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )


def _renderer(terminal: bool) -> list[Any]:
    if terminal:
        return [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    return [
        structlog.processors.format_exc_info,
        structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False),
    ]
