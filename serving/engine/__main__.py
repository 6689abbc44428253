"""Run the engine process: `python -m serving.engine`."""

from __future__ import annotations

import signal
import sys
import threading

import structlog

from adapter import keys
from adapter.contracts import DraftsmithError
from adapter.database import migrate, open_database
from adapter.facts import STARTING, Facts
from adapter.hotswap import HotSwap
from adapter.logs import configure_logging
from adapter.models import prepare_pair
from adapter.settings import Settings, load_settings
from adapter.streams import BROKEN, connect
from serving.engine.build import build_engine
from serving.engine.server import EngineServer

log = structlog.get_logger("serving.engine")


def main() -> int:
    """Build the engine and serve until a signal; 2 when the settings cannot work."""
    configure_logging()
    try:
        settings = load_settings()
        database = open_database(settings.database)
        migrate(database)
        Facts(database).put(STARTING, {})
        pair = prepare_pair(settings)
        built = build_engine(settings, pair, database)
    except DraftsmithError as error:
        log.error("engine_cannot_start", reason=str(error))
        return 2
    settings.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    server = EngineServer(
        built, settings.run_dir, max_waiting=settings.engine.max_waiting,
        max_model_len=settings.engine.max_model_len, facts=Facts(database),
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    if built.hotswap is not None:
        threading.Thread(target=_listen, args=(settings, built.hotswap), daemon=True).start()
    log.info("engine_ready", target=pair.target_name, draft=pair.draft_kind, dtype=pair.dtype)
    server.run()
    built.publisher.close()
    if built.hotswap is not None:
        built.hotswap.stop()
    return 0


def _listen(settings: Settings, hotswap: HotSwap) -> None:
    """Wake the swapper on a hint, so that a roll back does not wait for the next poll."""
    pause = threading.Event()
    while True:
        try:
            subscriber = connect(settings.redis, timeout_s=60).pubsub(ignore_subscribe_messages=True)
            subscriber.subscribe(keys.HINT)
            while True:
                if subscriber.get_message(timeout=30) is not None:
                    hotswap.wake()
        except BROKEN:
            pause.wait(5)


if __name__ == "__main__":
    sys.exit(main())
