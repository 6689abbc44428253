"""Training jobs in SQL: queued, claimed under a lease with a fencing epoch, finished once.

A job is claimed by raising its epoch; whoever holds an older epoch can no longer touch it, however
late it wakes up.  Redis only carries the hint that a job exists.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, insert, or_, select, update

from adapter.contracts import RegistryError
from adapter.tables import jobs

OPEN_STATES = ("queued", "running")
MAX_ATTEMPTS = 3


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One training job. `progress` is what the trainer said last; `result` what it ended with.

    `segments` names those whose acceptance fell; empty where something else asked for the job.
    """

    id: str
    state: str
    reason: str
    requested_by: str
    segments: tuple[str, ...]
    created_at_s: float
    started_at_s: float | None
    finished_at_s: float | None
    attempts: int
    epoch: int
    lease_until_s: float | None
    worker: str | None
    progress: dict[str, Any]
    result: dict[str, Any]
    error: str | None


class Jobs:
    """The job table. `clock` is epoch seconds and must be one clock for all workers of a host."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._read = engine.execution_options(readonly=True)
        self._clock = clock

    def request(self, *, reason: str, requested_by: str, segments: Sequence[str] = ()) -> Job | None:
        """Queue a job, or return None when one is open already: one training at a time."""
        with self._engine.begin() as connection:
            if connection.execute(select(jobs.c.id).where(jobs.c.state.in_(OPEN_STATES))).first():
                return None
            job_id = uuid.uuid4().hex[:12]
            connection.execute(
                insert(jobs).values(
                    id=job_id,
                    state="queued",
                    reason=reason,
                    requested_by=requested_by,
                    segments=list(segments),
                    created_at_s=self._clock(),
                    attempts=0,
                    epoch=0,
                    progress={},
                    result={},
                )
            )
            return self._one(connection, job_id)

    def claim(self, job_id: str, *, worker: str, lease_s: float) -> Job | None:
        """Take a queued job, or a running one whose lease ran out; None when neither.

        A job that was claimed `MAX_ATTEMPTS` times without finishing is failed instead.
        """
        now = self._clock()
        with self._engine.begin() as connection:
            job = self._one(connection, job_id)
            expired = job.state == "running" and (job.lease_until_s or 0) < now
            if job.state != "queued" and not expired:
                return None
            if job.attempts >= MAX_ATTEMPTS:
                self._close(connection, job_id, "failed", {}, f"gave up after {job.attempts} attempts")
                return None
            connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id)
                .values(
                    state="running",
                    worker=worker,
                    started_at_s=now,
                    epoch=job.epoch + 1,
                    attempts=job.attempts + 1,
                    lease_until_s=now + lease_s,
                )
            )
            return self._one(connection, job_id)

    def heartbeat(self, job_id: str, epoch: int, *, lease_s: float, progress: dict[str, Any] | None = None) -> bool:
        """Extend the lease and store progress; False when the job was taken over or cancelled."""
        values: dict[str, Any] = {"lease_until_s": self._clock() + lease_s}
        if progress is not None:
            values["progress"] = progress
        return self._guarded(job_id, epoch, values)

    def fence(self, job_id: str, epoch: int) -> Callable[[Connection], None]:
        """Return a check for another transaction: that this job still runs under this epoch.

        Raises (the check):
            RegistryError: it was taken over, cancelled or has ended.
        """

        def check(connection: Connection) -> None:
            job = self._one(connection, job_id)
            if job.state != "running" or job.epoch != epoch:
                raise RegistryError(
                    f"job {job_id} is {job.state} at epoch {job.epoch}; this trainer holds epoch {epoch} and must "
                    "not publish"
                )

        return check

    def finish(self, job_id: str, epoch: int, *, result: dict[str, Any]) -> bool:
        """Close a job as done; False when the epoch is stale."""
        return self._guarded(job_id, epoch, {"state": "done", "result": result, "finished_at_s": self._clock()})

    def fail(self, job_id: str, epoch: int, *, error: str, retry: bool) -> bool:
        """Close a job as failed, or queue it again while attempts are left."""
        job = self.get(job_id)
        if retry and job.attempts < MAX_ATTEMPTS:
            return self._guarded(job_id, epoch, {"state": "queued", "error": error, "lease_until_s": None})
        return self._guarded(job_id, epoch, {"state": "failed", "error": error, "finished_at_s": self._clock()})

    def cancel(self, job_id: str, because: str = "cancelled by an operator") -> None:
        """Cancel an open job; its worker notices at the next heartbeat.

        Raises:
            RegistryError: there is no such job, or it has ended.
        """
        with self._engine.begin() as connection:
            job = self._one(connection, job_id)
            if job.state not in OPEN_STATES:
                raise RegistryError(f"job {job_id} is {job.state} already and cannot be cancelled")
            self._close(connection, job_id, "cancelled", {}, because)

    def get(self, job_id: str) -> Job:
        """Return one job.

        Raises:
            RegistryError: there is no such job.
        """
        with self._read.begin() as connection:
            return self._one(connection, job_id)

    def latest(self, limit: int = 20) -> list[Job]:
        """Return the newest jobs first."""
        with self._read.begin() as connection:
            rows = connection.execute(select(jobs).order_by(jobs.c.created_at_s.desc()).limit(limit))
            return [_job(row) for row in rows.mappings()]

    def since(self, at_s: float) -> list[Job]:
        """Return jobs that were requested after `at_s`, or ran then, oldest first."""
        touched = or_(jobs.c.created_at_s > at_s, jobs.c.started_at_s > at_s, jobs.c.finished_at_s > at_s)
        with self._read.begin() as connection:
            rows = connection.execute(select(jobs).where(touched).order_by(jobs.c.created_at_s))
            return [_job(row) for row in rows.mappings()]

    def claimable(self) -> list[str]:
        """Return ids of jobs that wait, or whose worker went silent."""
        with self._read.begin() as connection:
            waiting = or_(
                jobs.c.state == "queued", (jobs.c.state == "running") & (jobs.c.lease_until_s < self._clock())
            )
            return list(connection.execute(select(jobs.c.id).where(waiting).order_by(jobs.c.created_at_s)).scalars())

    def _guarded(self, job_id: str, epoch: int, values: dict[str, Any]) -> bool:
        with self._engine.begin() as connection:
            done = connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id, jobs.c.epoch == epoch, jobs.c.state == "running")
                .values(**values)
            )
            return bool(done.rowcount)

    def _close(self, connection: Any, job_id: str, state: str, result: dict[str, Any], error: str) -> None:
        connection.execute(
            update(jobs)
            .where(jobs.c.id == job_id)
            .values(state=state, result=result, error=error, finished_at_s=self._clock())
        )

    def _one(self, connection: Any, job_id: str) -> Job:
        row = connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().first()
        if row is None:
            raise RegistryError(f"there is no job {job_id!r}")
        return _job(row)


def _job(row: Mapping[Any, Any]) -> Job:
    return Job(**{**row, "segments": tuple(row["segments"])})
