"""Run the API process: `python -m serving.api`.  Waits for the engine to say what it serves."""

from __future__ import annotations

import os
import socket
import sys
import threading

import structlog
import uvicorn

from adapter.contracts import DraftsmithError, SettingsError
from adapter.database import migrate, open_database
from adapter.facts import SERVING, Facts
from adapter.logs import configure_logging
from adapter.pairs import Pair, pair_from_facts
from adapter.settings import Settings, load_settings
from serving.api.app import create_app

log = structlog.get_logger("serving.api")

_PATIENCE_S = 600.0  # converting or downloading a target takes its time on the first start


def main() -> int:
    """Serve until a signal; 2 when the settings cannot work."""
    configure_logging()
    try:
        settings = load_settings()
        database = open_database(settings.database)
        migrate(database)
        facts = Facts(database)
        listener = _listen(settings)
        app = create_app(settings, _wait_for_pair(facts))
    except DraftsmithError as error:
        log.error("api_cannot_start", reason=str(error))
        return 2
    host, port = listener.getsockname()[:2]
    url = f"http://{host}:{port}"
    facts.put(SERVING, {"url": url, "pid": os.getpid()})
    log.info("api_listening", url=url)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, access_log=False)
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        raise SettingsError(
            f"port {settings.port} on {settings.host} cannot be used: {error.strerror}; choose another with --port"
        ) from None
    listener.set_inheritable(False)
    return listener


def _wait_for_pair(facts: Facts) -> Pair:
    pause = threading.Event()
    for _ in range(int(_PATIENCE_S / 0.2)):
        pair = pair_from_facts(facts)
        if pair is not None:
            return pair
        pause.wait(0.2)
    raise SettingsError(f"no engine said within {_PATIENCE_S:.0f} s what it serves; is `draftsmith engine` running?")


if __name__ == "__main__":
    sys.exit(main())
