"""The address of a listening socket, as somebody on this machine can open it.

Called by the processes that listen, to tell people and each other where.
"""

from __future__ import annotations

import socket


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listener; one that hears every address is named by the loopback one."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
