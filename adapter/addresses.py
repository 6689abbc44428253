"""Open a port, and name it so that somebody on this machine can open it, too.

Called by the processes that listen, and by the supervisor, which looks before it starts them.
"""

from __future__ import annotations

import socket

from adapter.contracts import SettingsError


def bind(host: str, port: int, *, setting: str) -> socket.socket:
    """Take a port without listening yet; 0 lets the system choose.

    Args:
        setting: the name of the setting `port` comes from; its flag is spelt alike.

    Raises:
        SettingsError: the address or port cannot be had.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, UnicodeError) as error:
        bound.close()
        where, why = f"[{host}]" if ":" in host else host, getattr(error, "strerror", None) or error
        raise SettingsError(
            f"{setting} = {port}: {where}:{port} cannot be used: {why}; choose another with "
            f"--{setting.replace('_', '-')}, or 0 for any free one"
        ) from None
    return bound


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listener; one that hears every address is named by the loopback one."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
