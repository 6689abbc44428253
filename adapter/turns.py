"""A training and the engine of its machine take turns: it computes while nothing is served, and little else.

The engine says "stop" when a request arrives and "go" when the last one has ended, in datagrams to a socket in the run
folder.  Whoever supervises a training holds that socket and stops and continues the training's processes, which notice
nothing.  Silence means "go": an engine that has ended, or does not know of turns, holds nobody up.  Called by the
worker's task and by the engine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from adapter.settings import Settings

log = structlog.get_logger(__name__)

TURNS_SOCKET = "turns.sock"  # no longer than the engine's own, so it fits wherever that one does
STOP, GO = b"stop", b"go"
SILENCE_S = 1.0  # after which "stop" holds no longer
_LOOK_S = 0.2  # how often the engine looks whether there is a training
_SLICE_S = 0.025  # lent at once while requests run


def takes_turns(settings: Settings) -> bool:
    """Whether a training of this deployment yields to serving.

    One beside a GPU has the cores to itself, and several processes that wait for each other are not to be stopped.
    """
    return settings.engine.device == "cpu" and settings.distill.busy_share < 1 and settings.distill.processes == 1


class Turns:
    """Stops a process group while the engine serves; a context.

    Args:
        run_dir: where the engine looks for it; None never stops the group.
        group: id of the group, which this process may signal.
        clock: monotonic seconds.
    """

    def __init__(self, run_dir: Path | None, group: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = None if run_dir is None else run_dir / TURNS_SOCKET
        self._group = group
        self._clock = clock
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._stopped_at_s: float | None = None
        self._waited_s = 0.0

    def __enter__(self) -> Turns:
        """Listen; where that cannot be done the training does not yield, and the log says so."""
        if self._path is None:
            return self
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._path.unlink(missing_ok=True)
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            listening.bind(str(self._path))
        except OSError as error:
            log.warning("takes_no_turns", path=str(self._path), error=str(error))
            return self
        listening.settimeout(SILENCE_S)
        self._socket = listening
        self._thread = threading.Thread(target=self._follow, name="turns", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening and let the group go, so that it hears other signals."""
        self._over.set()
        if self._socket is not None and self._path is not None:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RD)
            if self._thread is not None:
                self._thread.join(2 * SILENCE_S)
            self._socket.close()
        self._go()

    @property
    def waited_s(self) -> float:
        """Seconds in which the group was stopped."""
        since = self._stopped_at_s
        return self._waited_s + (0.0 if since is None else self._clock() - since)

    def _follow(self) -> None:
        assert self._socket is not None
        while not self._over.is_set():
            try:
                word = self._socket.recv(16)
            except TimeoutError:
                word = GO
            except OSError:
                return
            if self._over.is_set():
                return
            if word == STOP:
                self._stop()
            else:
                self._go()

    def _stop(self) -> None:
        if self._stopped_at_s is None and self._signal(signal.SIGSTOP):
            self._stopped_at_s = self._clock()

    def _go(self) -> None:
        if self._stopped_at_s is not None:
            self._signal(signal.SIGCONT)
            self._waited_s += self._clock() - self._stopped_at_s
            self._stopped_at_s = None

    def _signal(self, number: int) -> bool:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._group, number)
            return True
        return False


class Lender:
    """The engine's side: tells a training when it may compute.

    Args:
        share: of the time in which requests run that is lent all the same, in slices; 0 lends none of it.
        clock: monotonic seconds.
        pause: waits so many seconds, while a slice is lent.
    """

    def __init__(
        self, run_dir: Path, share: float, *, clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._path = str(run_dir / TURNS_SOCKET)
        self._share = share
        self._clock = clock
        self._pause = pause
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._there = False
        self._looked_s = self._told_s = float("-inf")
        self._held = False  # what was said last was "stop"
        self._lent_s = 0.0  # when a slice ended last, or requests began to run

    def follow(self, busy: bool) -> None:
        """Say what changed since the last call; `busy` while there are requests.  Called around every step."""
        now = self._clock()
        if now - self._looked_s >= _LOOK_S:
            self._looked_s, self._there = now, os.path.exists(self._path)
        if not self._there:
            self._held = False
        elif not busy:
            if self._held:
                self._say(GO, now)
        elif not self._held:
            self._say(STOP, now)
            self._lent_s = now
        elif self._share and now - self._lent_s >= _SLICE_S / self._share:
            self._say(GO, now)
            self._pause(_SLICE_S)
            self._lent_s = self._clock()
            self._say(STOP, self._lent_s)
        elif now - self._told_s >= SILENCE_S / 3:
            self._say(STOP, now)

    def close(self) -> None:
        """Say nothing more; a training goes on by itself."""
        self._socket.close()

    def _say(self, word: bytes, now: float) -> None:
        self._told_s, self._held = now, word == STOP
        try:
            self._socket.sendto(word, self._path)
        except BlockingIOError:  # it has enough to read
            pass
        except OSError:  # the training has ended
            self._there = self._held = False
