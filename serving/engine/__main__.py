"""Run the engine process: `python -m serving.engine`."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path

import structlog

from adapter import keys
from adapter.contracts import DraftsmithError, SettingsError
from adapter.database import migrate, open_database
from adapter.facts import STARTING, Facts
from adapter.hotswap import HotSwap
from adapter.logs import configure_logging
from adapter.models import prepare_pair
from adapter.settings import Settings, load_settings
from adapter.streams import BROKEN, connect
from adapter.turns import Lender, takes_turns
from serving.engine.build import build_engine
from serving.engine.server import EngineServer

log = structlog.get_logger("serving.engine")

_PREDECESSOR_S = 10.0


def main() -> int:
    """Build the engine and serve until a signal; 2 when the settings cannot work."""
    configure_logging()
    try:
        settings = load_settings()
        lock = _hold(settings.data_dir)  # until this process ends, however it ends
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
        lender=Lender(settings.run_dir, settings.distill.busy_share) if takes_turns(settings) else None,
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    if built.hotswap is not None:
        threading.Thread(target=_listen, args=(settings, built.hotswap), daemon=True).start()
    gc.collect()
    gc.freeze()  # half a million objects that stay: looking through them would hold up every stream for 0.2 s
    log.info("engine_ready", target=pair.target_name, draft=pair.draft_kind, dtype=pair.dtype)
    server.run()
    os.close(lock)
    built.publisher.close()
    if built.hotswap is not None:
        built.hotswap.stop()
    return 0


def _hold(data_dir: Path) -> int:
    """Be the only engine of a data folder: a second one would take the socket away from the first, unseen.

    The folder itself is locked, so nothing is left behind; one that ends at this moment is waited for.
    The result is a descriptor, whose closing gives the folder back.

    Raises:
        SettingsError: another engine serves the folder.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(data_dir, os.O_RDONLY)
    give_up_s = time.monotonic() + _PREDECESSOR_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() < give_up_s:
                time.sleep(0.2)
                continue
            os.close(handle)
            raise SettingsError(f"another engine serves {data_dir}; stop it, or choose another --data-dir") from None
        return handle


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
