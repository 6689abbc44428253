"""The training task: a thin supervisor around one exec'd trainer.

It claims the job, relays the trainer's progress to SQL, and ends the trainer's whole process group
when the job is cancelled or taken over, when time is up, or when the worker stops.  Redis is only
where the task came from: a redelivered or stale message finds the job held and ends at once.  Never
imports torch.  Called by Celery.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import structlog
from celery import Celery
from sqlalchemy.exc import SQLAlchemyError

from adapter.broker import TRAIN_TASK
from adapter.contracts import RegistryError
from adapter.database import open_database
from adapter.jobs import Job, Jobs
from adapter.settings import Settings, child_environment
from adapter.turns import Turns, takes_turns

log = structlog.get_logger(__name__)

LEASH = (sys.executable, "-m", "distill.leash")
TRAINER = (sys.executable, "-m", "distill.trainer")
LAUNCHER = (
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--log-dir", os.devnull,
)  # fmt: skip
_POLL_S = 0.25
_TERM_S = 5.0
_ERROR_CHARS = 2000
_FINAL_ERROR = 2  # the trainer's exit status for "it would fail again"


def register(app: Celery, settings: Settings) -> None:
    """Add the training task to an application."""

    @app.task(name=TRAIN_TASK, ignore_result=True)
    def train(job_id: str) -> str:
        """Run one training job to its end."""
        stop = threading.Event()
        previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
        try:
            return supervise(settings, job_id, stopping=stop.is_set)
        finally:
            signal.signal(signal.SIGTERM, previous)


def supervise(settings: Settings, job_id: str, *, stopping: Callable[[], bool] = lambda: False) -> str:
    """Claim a job and run its trainer; return what became of it in one word."""
    engine = open_database(settings.database)
    try:
        jobs = Jobs(engine)
        worker = f"{socket.gethostname()}:{os.getpid()}"
        try:
            job = jobs.claim(job_id, worker=worker, lease_s=settings.distill.lease_s)
        except RegistryError as error:
            log.warning("job_unknown", job_id=job_id, error=str(error))
            return "unknown"
        if job is None:
            log.info("job_not_claimable", job_id=job_id)
            return "held"
        return _Run(settings, jobs, job, stopping).run()
    finally:
        engine.dispose()


@dataclass(slots=True)
class _Run:
    """One trainer process and the claim under which it runs."""

    settings: Settings
    jobs: Jobs
    job: Job
    stopping: Callable[[], bool]
    lines: queue.SimpleQueue[bytes] = field(default_factory=queue.SimpleQueue)
    result: dict[str, Any] | None = None
    progress: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None

    def run(self) -> str:
        """Start the trainer, watch it to its end, close the job."""
        folder = self.settings.data_dir / "jobs" / self.job.id
        folder.mkdir(parents=True, exist_ok=True)
        words = folder / f"trainer-{self.job.epoch}.log"
        processes = self.settings.distill.processes
        trainer = TRAINER if processes == 1 else (*LAUNCHER, "--nproc-per-node", str(processes), *TRAINER[1:])
        command = [*LEASH, *trainer, "--job", self.job.id, "--epoch", str(self.job.epoch)]
        with (
            words.open("wb") as stderr,
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=child_environment(self.settings),
                start_new_session=True,
            ) as process,
        ):
            log.info("trainer_started", job_id=self.job.id, epoch=self.job.epoch, pid=process.pid)
            reader = threading.Thread(target=self._read, args=(process,), daemon=True)
            reader.start()
            try:
                with self._turns(process.pid) as turns:
                    ending = self._watch(process, turns)
            finally:
                _end_group(process)
                reader.join(_TERM_S)
        self._relay()
        if self.result is not None and turns.waited_s:
            self.result["waited_s"] = round(turns.waited_s, 3)
        return self._close(ending, process.returncode, words)

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.put(line)

    def _turns(self, group: int) -> Turns:
        """Let serving go first, where the two share cores."""
        return Turns(self.settings.run_dir if takes_turns(self.settings) else None, group)

    def _watch(self, process: subprocess.Popen[bytes], turns: Turns) -> str:
        """Relay progress until the trainer exits or must not go on; say which."""
        deadline = time.monotonic() + 2 * self.settings.distill.max_seconds + 120
        lease_s = self.settings.distill.lease_s
        beaten = extended = time.monotonic()
        while process.poll() is None:
            news = self._relay()
            now = time.monotonic()
            if news or now - beaten >= lease_s / 3:
                beaten = now
                held = self._heartbeat()
                if held is False:
                    return "lost"
                if held:
                    extended = now
            if now - extended >= lease_s:
                return "lost"
            if now > deadline + turns.waited_s:
                return "time_out"
            if self.stopping():
                return "stopped"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
        return "exited"

    def _relay(self) -> bool:
        """Take what the trainer said; anything that is not a JSON object is ignored."""
        news = False
        while True:
            try:
                line = self.lines.get_nowait()
            except queue.Empty:
                return news
            with contextlib.suppress(msgspec.DecodeError, msgspec.ValidationError):
                message = msgspec.json.decode(line, type=dict[str, Any])
                news = True
                if isinstance(message.get("result"), dict):
                    self.result = message["result"]
                elif isinstance(message.get("failure"), dict):
                    self.failure = message["failure"]
                else:
                    self.progress = message

    def _heartbeat(self) -> bool | None:
        """Extend the lease; None when the database could not be asked."""
        try:
            return self.jobs.heartbeat(
                self.job.id, self.job.epoch, lease_s=self.settings.distill.lease_s, progress=self.progress
            )
        except SQLAlchemyError as error:
            log.warning("heartbeat_failed", job_id=self.job.id, error=str(error))
            return None

    def _close(self, ending: str, status: int, words: Path) -> str:
        job_id, epoch = self.job.id, self.job.epoch
        if ending == "lost":
            log.warning("job_lost", job_id=job_id, epoch=epoch)
            return "lost"
        if ending == "exited" and status == 0 and self.result is not None:
            if self.progress is not None:
                self._heartbeat()
            return "done" if self.jobs.finish(job_id, epoch, result=self.result) else "lost"
        failure = (self.failure if ending == "exited" else None) or {}  # torchrun's own status and words say less
        status = int(failure.get("status", status))
        reason = {
            "time_out": f"stopped after {2 * self.settings.distill.max_seconds + 120:g} s",
            "stopped": "the worker was stopped; the next one goes on from the checkpoint",
        }.get(ending, f"the trainer {_describe(status)}")
        tail = "" if ending == "stopped" else str(failure.get("error") or _tail(words))[-_ERROR_CHARS:]
        retry = not (ending == "exited" and status == _FINAL_ERROR)
        self.jobs.fail(job_id, epoch, error=f"{reason}: {tail}" if tail else reason, retry=retry)
        log.warning("trainer_failed", job_id=job_id, epoch=epoch, reason=reason)
        return "stopped" if ending == "stopped" else "failed"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the trainer and everything it started; it keeps no state that a kill could tear.

    torchrun gives each of its processes a session of its own, which no signal to the group reaches: they all have
    its stdin, and leave when that closes.
    """
    if process.stdin is not None:
        process.stdin.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(_TERM_S)
        except subprocess.TimeoutExpired:
            continue
        break


def _describe(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return "ended without a result" if status == 0 else f"failed with status {status}"


def _tail(words: Path) -> str:
    with contextlib.suppress(OSError):
        return words.read_bytes()[-_ERROR_CHARS:].decode(errors="replace").strip()
    return ""
