"""Tell the engine that an alias moved, so that it need not wait for its next poll.

A hint may be lost; the poll finds the move anyway.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from adapter import keys
from adapter.settings import Settings
from adapter.streams import BROKEN, connect


def announcer(settings: Settings) -> Callable[[int], None]:
    """Return what `Registry` calls after a move; takes at most about half a second and never raises."""

    def announce(generation: int) -> None:
        with contextlib.suppress(*BROKEN):
            client = connect(settings.redis, timeout_s=0.5)
            client.publish(keys.HINT, generation)
            client.close()

    return announce
