"""Run a deployment on one machine: start its roles, restart what dies, take all of it down again.

Each role is a process group of its own, so that Ctrl-C reaches only the supervisor, and each asks
the kernel for SIGTERM when the supervisor itself is killed.  A role that keeps dying is restarted
ever more slowly; exit status 2 means that its settings cannot work, and ends everything.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import structlog
from sqlalchemy.exc import SQLAlchemyError

from adapter.contracts import DraftsmithError
from adapter.cores import CORES_FILE, taken
from adapter.database import migrate, open_database
from adapter.facts import STARTING, Facts
from adapter.settings import Settings
from serving.roles import LOCK_FILE, ROLES_FILE, Role, write_roles
from serving.valkey import remove_socket

log = structlog.get_logger(__name__)

_PR_SET_PDEATHSIG = 1
_CANNOT_WORK = 2
_GRACE_S = {"api": 6.0, "engine": 5.0, "worker": 8.0, "watcher": 4.0, "valkey": 5.0}
_SLOWEST_RESTART_S = 10.0
_HEALTHY_AFTER_S = 20.0
_TICK_S = 0.1
LOG_BYTES = 32 << 20  # of one role's log, which then begins anew beside one old one
_REASON = re.compile(r' (?:reason|error)="((?:[^"\\]|\\.)*)"')


class DataDirInUse(DraftsmithError):
    """Raised when another supervisor runs on the same data folder; the message gives its pid."""


class RoleCannotStart(DraftsmithError):
    """Raised when a role's settings cannot work; the message is what it logged last."""


@dataclass(slots=True)
class _Running:
    role: Role
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    failures: int = 0
    started_s: float = 0.0
    next_start_s: float = 0.0
    log_file: IO[bytes] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None and self.process.poll() is None else None


class Supervisor:
    """Keep roles running until `stop`.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, settings: Settings, roles: list[Role], clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._running = [_Running(role) for role in roles]
        self._clock = clock
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._lock: IO[str] | None = None
        self.failure: str | None = None

    def start(self) -> None:
        """Take the data folder and start every role.

        Raises:
            DataDirInUse: another supervisor has the folder.
        """
        for folder in (self._settings.data_dir, self._settings.run_dir, self._settings.logs_dir):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(self._settings.run_dir, 0o700)
        self._take_lock()
        try:
            if any(item.role.name == "engine" for item in self._running):
                self._forget_pair()
        except BaseException:
            self._release_lock()
            raise
        for item in self._running:
            self._launch(item)
        self._write_table()

    def run(self, on_tick: Callable[[], None] = lambda: None) -> None:
        """Watch the roles until `stop` is called; then take them down.

        Raises:
            RoleCannotStart: a role said that its settings cannot work.
        """
        try:
            while not self._stop.wait(_TICK_S):
                for item in self._running:
                    self._look_after(item)
                on_tick()
        finally:
            self.shut_down()
        if self.failure is not None:
            raise RoleCannotStart(self.failure)

    def stop(self) -> None:
        """Make `run` return; said again, let no running request end.  Safe to call from a signal handler."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    def shut_down(self) -> None:
        """Stop every role, and leave neither process nor socket nor lock behind.

        The engine outlives the API, whose running requests may end, and Valkey outlives everybody.
        """
        last = {"engine": 1, "valkey": 2}
        for phase in range(3):
            leaving = [item for item in self._running if last.get(item.role.name, 0) == phase]
            for item in leaving:
                _signal(item, signal.SIGTERM)
            for item in leaving:
                self._wait(item)
        for item in self._running:
            if item.log_file is not None:
                item.log_file.close()
        if not self._settings.redis_url:
            remove_socket(self._settings)
        gone = [ROLES_FILE, "engine.sock"] + ([] if taken(self._settings.run_dir) else [CORES_FILE])
        for name in gone:
            (self._settings.run_dir / name).unlink(missing_ok=True)
        self._release_lock()

    def _wait(self, item: _Running) -> None:
        """Wait for a role that was told to stop; the API may take as long as its requests do."""
        grace_s = _GRACE_S.get(item.role.name, 5.0)
        if item.role.name == "api":
            until_s = self._clock() + self._settings.api.drain_s
            while item.pid is not None and self._clock() < until_s and not self._hurry.wait(_TICK_S):
                continue
            if self._hurry.is_set():
                _signal(item, signal.SIGTERM)
        _wait_or_kill(item, grace_s)

    # -- one role ----------------------------------------------------------------------------

    def _launch(self, item: _Running) -> None:
        if item.role.name == "valkey":
            remove_socket(self._settings)
        if item.log_file is None:
            item.log_file = (self._settings.logs_dir / f"{item.role.name}.log").open("ab")
        item.process = subprocess.Popen(
            item.role.command, env=item.role.env, stdin=subprocess.DEVNULL, stdout=item.log_file,
            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        item.started_s = self._clock()

    def _look_after(self, item: _Running) -> None:
        _bound_log(item)
        now = self._clock()
        if item.process is None:
            if now >= item.next_start_s:
                self._launch(item)
                item.restarts += 1
                log.info("role_restarted", role=item.role.name, pid=item.pid, logs=str(self._settings.logs_dir))
                self._write_table()
            return
        code = item.process.poll()
        if code is None:
            if item.failures and now - item.started_s > _HEALTHY_AFTER_S:
                item.failures = 0
            return
        if code == _CANNOT_WORK and item.role.name != "valkey":
            self.failure = f"{item.role.name} cannot start: {self._last_words(item.role.name)}"
            self.stop()
            return
        item.failures += 1
        item.process = None
        item.next_start_s = now + min(_SLOWEST_RESTART_S, 0.25 * 2 ** min(item.failures - 1, 8))
        log.warning("role_died", role=item.role.name, exit_code=code, restart_in_s=round(item.next_start_s - now, 2))
        self._write_table()

    def _last_words(self, name: str) -> str:
        """Return the reason in the last line a role logged, or that line."""
        path = self._settings.logs_dir / f"{name}.log"
        line = (path.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        found = _REASON.search(line)
        return found[1].replace('\\"', '"').replace("\\n", "\n") if found else line

    def _write_table(self) -> None:
        write_roles(
            self._settings,
            {
                item.role.name: {
                    "pid": item.pid,
                    "state": "running" if item.pid else "restarting",
                    "restarts": item.restarts,
                }
                for item in self._running
            },
        )

    def _forget_pair(self) -> None:
        """Let no role read the pair of an earlier start; the engine says anew what it serves."""
        database = open_database(self._settings.database)
        try:
            migrate(database)
            Facts(database).put(STARTING, {})
        except SQLAlchemyError as error:  # the engine says it, too, as soon as it starts
            log.warning("database_away", error=str(error))
        finally:
            database.dispose()

    # -- the folder --------------------------------------------------------------------------

    def _take_lock(self) -> None:
        path = self._settings.run_dir / LOCK_FILE
        handle = path.open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            reason = _in_use(self._settings, handle)
            handle.close()
            raise reason from None
        if not path.exists() or os.fstat(handle.fileno()).st_ino != path.stat().st_ino:
            handle.close()  # its holder removed this file between our opening and our locking it
            self._take_lock()
            return
        handle.seek(0)
        handle.truncate()
        handle.write(str(os.getpid()))
        handle.flush()
        self._lock = handle

    def _release_lock(self) -> None:
        if self._lock is None:
            return
        (self._settings.run_dir / LOCK_FILE).unlink(missing_ok=True)
        self._lock.close()
        self._lock = None
        if not any(self._settings.run_dir.iterdir()):
            shutil.rmtree(self._settings.run_dir, ignore_errors=True)


def check_free(settings: Settings) -> None:
    """Look whether another supervisor has the data folder, and leave everything as it is.

    Raises:
        DataDirInUse: it has.
    """
    with contextlib.suppress(FileNotFoundError), (settings.run_dir / LOCK_FILE).open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            raise _in_use(settings, handle) from None


def _in_use(settings: Settings, handle: IO[str]) -> DataDirInUse:
    handle.seek(0)
    holder = handle.read().strip() or "unknown"
    return DataDirInUse(f"{settings.data_dir} is in use by pid {holder}; stop it, or choose another --data-dir")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _bound_log(item: _Running) -> None:
    """Move a long log to one old file.  The role goes on writing to the same file: it only appends."""
    file = item.log_file
    if file is None or os.fstat(file.fileno()).st_size <= LOG_BYTES:
        return
    path = Path(file.name)
    with contextlib.suppress(OSError):  # a full disk: the log matters less than the space
        shutil.copyfile(path, path.with_suffix(".log.1"))
    os.truncate(file.fileno(), 0)


def _signal(item: _Running, number: signal.Signals) -> None:
    if item.pid is not None:
        os.killpg(item.pid, number) if number == signal.SIGKILL else os.kill(item.pid, number)


def _wait_or_kill(item: _Running, grace_s: float) -> None:
    if item.process is None:
        return
    try:
        item.process.wait(grace_s)
    except subprocess.TimeoutExpired:
        log.warning("role_killed", role=item.role.name, after_s=grace_s)
        _signal(item, signal.SIGKILL)
        item.process.wait()
