"""Run the API process: `python -m serving.api`.  Waits for the engine to say what it serves.

The first SIGTERM or SIGINT drains: new requests get a 503, running ones may end.  A second one ends
them, too, with an error their clients can read.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError

from adapter.addresses import bind, url_of
from adapter.contracts import DraftsmithError, SettingsError
from adapter.database import migrate, open_database
from adapter.facts import SERVING, Facts
from adapter.logs import configure_logging
from adapter.pairs import Pair, loaded_pair
from adapter.settings import load_settings
from serving.api.app import create_app

log = structlog.get_logger("serving.api")

_LEAVE_S = 5.0  # for responses that were told to end
_KEEP_ALIVE_S = 75  # longer than clients keep idle connections, 5 s as a rule: who closes first must not be us
_PATIENCE_S = 600.0  # converting or downloading a target takes its time on the first start


def main() -> int:
    """Serve until a signal; 2 when the settings cannot work."""
    configure_logging()
    try:
        settings = load_settings()
        database = open_database(settings.database)
        migrate(database)
        facts = Facts(database)
        listener = bind(settings.host, settings.port, setting="port")
        pair = _wait_for_pair(facts)
        app = create_app(settings, pair)
    except DraftsmithError as error:
        log.error("api_cannot_start", reason=str(error))
        return 2
    url = url_of(listener)
    facts.put(SERVING, {"url": url, "pid": os.getpid()})
    log.info("api_listening", url=url)
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=int(_LEAVE_S), timeout_keep_alive=_KEEP_ALIVE_S,
        access_log=False,
    )  # fmt: skip
    server = _Server(config, app, lambda: loaded_pair(facts) in (None, pair))
    server.run(sockets=[listener])
    log.info("api_stopped")
    return 1 if server.stale else 0


class _Server(uvicorn.Server):
    """uvicorn's server, except that it keeps listening while it drains, so that clients are told."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, serves_ours: Callable[[], bool]) -> None:
        super().__init__(config)
        self._state = app.state
        self._serves_ours = serves_ours
        self._engine_id: str | None = None
        self.stale = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; on the second signal, stop waiting."""
        self._state.drain.begin()

    async def on_tick(self, counter: int) -> bool:
        """Say whether it is time to go; called ten times a second."""
        leave = await super().on_tick(counter) or self._state.drain.over
        if leave and self._state.drain.in_flight:
            log.warning("requests_abandoned", count=self._state.drain.in_flight)
            self._state.client.abandon()
        return leave or self._engine_changed()

    def _engine_changed(self) -> bool:
        """Whether a new engine serves another pair than the one read here; whoever started us starts us again."""
        snapshot = self._state.client.snapshot
        if snapshot is None or snapshot.engine_id == self._engine_id:
            return False
        with contextlib.suppress(SQLAlchemyError):  # the database is away: ask again at the next tick
            self.stale = not self._serves_ours()
            self._engine_id = snapshot.engine_id
        if self.stale:
            log.warning("pair_changed", action="exits, to be started again with the engine's pair")
        return self.stale


def _wait_for_pair(facts: Facts) -> Pair:
    pause = threading.Event()
    for _ in range(int(_PATIENCE_S / 0.2)):
        pair = loaded_pair(facts)
        if pair is not None:
            return pair
        pause.wait(0.2)
    raise SettingsError(f"no engine said within {_PATIENCE_S:.0f} s what it serves; is `draftsmith engine` running?")


if __name__ == "__main__":
    sys.exit(main())
