"""Say with the exit status whether one role of this container works: engine, api, worker, watcher.

Asks the role itself where it listens, and the broker for the worker, which listens nowhere.  Called
by docker-compose.yml; imports no tensor library.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import urllib.error
import urllib.request

from adapter.settings import Settings, load_settings
from adapter.streams import BROKEN, connect

TIMEOUT_S = 3.0


def healthy(role: str, settings: Settings) -> bool:
    """Return whether `role` answers within a few seconds."""
    if role == "engine":
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.settimeout(TIMEOUT_S)
            client.connect(str(settings.run_dir / "engine.sock"))
            return True
        return False
    if role == "worker":
        with contextlib.suppress(*BROKEN):
            return bool(connect(settings.redis, TIMEOUT_S).ping())
        return False
    port = {"api": settings.port, "watcher": settings.dashboard_port}[role]
    with (
        contextlib.suppress(urllib.error.URLError, OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=TIMEOUT_S) as reply,
    ):
        return bool(reply.status == 200)
    return False


if __name__ == "__main__":
    sys.exit(0 if healthy(sys.argv[1], load_settings()) else 1)
