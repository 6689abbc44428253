"""`python -m monitors`: the watcher on a thread, the dashboard on the main one."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from types import FrameType

import structlog
import uvicorn

from adapter.addresses import bind, url_of
from adapter.broker import announce_job
from adapter.contracts import SettingsError
from adapter.database import migrate, open_database
from adapter.logs import configure_logging
from adapter.settings import Settings, load_settings
from adapter.streams import connect
from monitors.alerts import Notifier
from monitors.dashboard.app import create_app
from monitors.metrics import Metrics
from monitors.watcher import Watcher

log = structlog.get_logger(__name__)

_JOIN_S = 1.5


def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    engine = open_database(settings.database)
    migrate(engine)
    listener = bind(settings.dashboard_host, settings.dashboard_port, setting="dashboard_port")
    metrics, stop = Metrics(), threading.Event()
    watcher = Watcher(
        settings,
        engine,
        client=connect(settings.redis, settings.log.timeout_s),
        announce=functools.partial(announce_job, settings),
        notifier=Notifier(settings.monitors.webhook_urls),
        metrics=metrics,
        dashboard_url=url_of(listener),
    )
    thread = threading.Thread(target=watcher.run, args=(stop,), name="watcher", daemon=True)
    thread.start()
    log.info("dashboard", url=url_of(listener), pid=os.getpid())
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings, engine, metrics=metrics.registry),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
    )

    def end(number: int, frame: FrameType | None) -> None:
        stop.set()
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)  # uvicorn repeats the signal to us once it has shut down
    server.run(sockets=[listener])
    stop.set()
    thread.join(_JOIN_S)
    log.info("stopped", clean=not thread.is_alive())


def main() -> int:
    """Start, and say in one sentence why not."""
    configure_logging()
    try:
        serve(load_settings())
    except SettingsError as error:
        log.error("cannot_start", error=str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
