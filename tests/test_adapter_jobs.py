"""Training jobs: one at a time, leased, fenced by epochs, and given up after some attempts."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import Engine

from adapter.contracts import RegistryError
from adapter.database import migrate, open_database
from adapter.jobs import MAX_ATTEMPTS, Job, Jobs


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    """A clock that tests move."""
    return Clock()


@pytest.fixture
def jobs(database: Engine, clock: Clock) -> Jobs:
    """The job table on a fresh file."""
    return Jobs(database, clock=clock)


def queued(jobs: Jobs) -> Job:
    job = jobs.request(reason="drift on chat", requested_by="watcher")
    assert job is not None
    return job


def claimed(jobs: Jobs, job_id: str, worker: str = "w1") -> Job:
    job = jobs.claim(job_id, worker=worker, lease_s=30)
    assert job is not None
    return job


def test_one_open_job_at_a_time(jobs: Jobs) -> None:
    """A second request while one is queued or running is no job; after the end it is."""
    job = queued(jobs)
    assert jobs.request(reason="again", requested_by="ana") is None

    running = claimed(jobs, job.id)
    assert jobs.request(reason="again", requested_by="ana") is None

    assert jobs.finish(job.id, running.epoch, result={"version": 1})
    assert jobs.request(reason="again", requested_by="ana") is not None


def test_a_job_names_the_segments_it_is_about(jobs: Jobs) -> None:
    """They come back as they were given, from every way to read a job; none is the default."""
    job = jobs.request(reason="drift", requested_by="watcher", segments=["chat", "code"])
    assert job is not None
    running = claimed(jobs, job.id)
    assert {job.segments, running.segments, jobs.get(job.id).segments, jobs.latest()[0].segments} == {("chat", "code")}
    assert jobs.finish(job.id, running.epoch, result={})
    assert queued(jobs).segments == ()


def test_jobs_since_a_time_are_those_that_touched_it(jobs: Jobs, clock: Clock) -> None:
    """A job counts when it was requested, began or ended after that time; oldest first."""
    for _ in range(2):
        job = queued(jobs)
        clock.now_s += 10
        running = claimed(jobs, job.id)
        clock.now_s += 10
        jobs.finish(job.id, running.epoch, result={})
    first, second = reversed(jobs.latest())
    assert [job.id for job in jobs.since(999.0)] == [first.id, second.id]
    assert [job.id for job in jobs.since(1015.0)] == [first.id, second.id]
    assert [job.id for job in jobs.since(1020.0)] == [second.id]
    assert jobs.since(1040.0) == []


def test_jobs_of_before_segments_were_kept_have_none(tmp_path: Path) -> None:
    """A database of the second migration is brought up to date with its jobs."""
    database = open_database(f"sqlite:///{tmp_path / 'old.db'}")
    migrate(database)
    with database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs DROP COLUMN segments")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0002'")
        connection.exec_driver_sql(
            "INSERT INTO jobs (id, state, reason, requested_by, created_at_s, attempts, epoch, progress, result) "
            "VALUES ('j', 'done', 'r', 'w', 1.0, 1, 1, '{}', '{}')"
        )
    migrate(database)
    assert [(job.id, job.segments) for job in Jobs(database).latest()] == [("j", ())]
    database.dispose()


def test_a_cancelled_job_says_why(jobs: Jobs) -> None:
    """An operator is the default."""
    for words in ("no worker took it", None):
        job = queued(jobs)
        jobs.cancel(job.id, words) if words else jobs.cancel(job.id)
        assert jobs.get(job.id).error == (words or "cancelled by an operator")


def test_concurrent_requests_make_one_job(jobs: Jobs) -> None:
    """n=8 threads ask at once: one job."""
    start, made = threading.Barrier(8), []

    def ask() -> None:
        start.wait(30)
        made.append(jobs.request(reason="r", requested_by="w"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert 8 == len(made)
    assert 1 == sum(job is not None for job in made)


def test_a_held_lease_keeps_others_out(jobs: Jobs, clock: Clock) -> None:
    """A running job cannot be claimed while heartbeats come, however long it takes."""
    job = claimed(jobs, queued(jobs).id)
    for _ in range(10):
        clock.now_s += 29
        assert jobs.claim(job.id, worker="w2", lease_s=30) is None
        assert [] == jobs.claimable()
        assert jobs.heartbeat(job.id, job.epoch, lease_s=30)


def test_a_silent_worker_is_taken_over_and_fenced_off(jobs: Jobs, clock: Clock) -> None:
    """After the lease a second worker claims; the first can then neither report, finish nor fail the job."""
    job = claimed(jobs, queued(jobs).id)
    clock.now_s += 31
    assert [job.id] == jobs.claimable()

    second = claimed(jobs, job.id, "w2")

    assert (job.epoch + 1, 2, "w2") == (second.epoch, second.attempts, second.worker)
    assert not jobs.heartbeat(job.id, job.epoch, lease_s=30, progress={"step": 9})
    assert not jobs.finish(job.id, job.epoch, result={"version": 9})
    assert not jobs.fail(job.id, job.epoch, error="late", retry=False)
    assert ("running", {}, {}) == (jobs.get(job.id).state, jobs.get(job.id).progress, jobs.get(job.id).result)
    assert jobs.finish(job.id, second.epoch, result={"version": 1})
    assert {"version": 1} == jobs.get(job.id).result


def test_an_old_worker_that_fails_late_does_not_requeue(jobs: Jobs, clock: Clock) -> None:
    """A stale `fail(retry=True)` leaves the new owner's job alone."""
    job = claimed(jobs, queued(jobs).id)
    clock.now_s += 31
    claimed(jobs, job.id, "w2")
    assert not jobs.fail(job.id, job.epoch, error="late", retry=True)
    assert "running" == jobs.get(job.id).state


def test_retries_end(jobs: Jobs) -> None:
    """A job that fails every time is queued again until its attempts are used up, then failed for good."""
    job_id = queued(jobs).id
    for attempt in range(1, MAX_ATTEMPTS + 1):
        job = claimed(jobs, job_id)
        assert jobs.fail(job_id, job.epoch, error=f"no luck {attempt}", retry=True)
        assert ("failed" if attempt == MAX_ATTEMPTS else "queued") == jobs.get(job_id).state
    assert jobs.claim(job_id, worker="w", lease_s=30) is None
    assert f"no luck {MAX_ATTEMPTS}" == jobs.get(job_id).error


def test_workers_that_vanish_every_time_end_in_failure(jobs: Jobs, clock: Clock) -> None:
    """A job whose workers die silently is failed with the number of attempts, and no longer claimable."""
    job_id = queued(jobs).id
    for _ in range(MAX_ATTEMPTS):
        claimed(jobs, job_id)
        clock.now_s += 31
    assert jobs.claim(job_id, worker="w", lease_s=30) is None
    assert ("failed", f"gave up after {MAX_ATTEMPTS} attempts") == (jobs.get(job_id).state, jobs.get(job_id).error)
    assert [] == jobs.claimable()


def test_a_cancelled_job_tells_its_worker(jobs: Jobs) -> None:
    """After cancel the next heartbeat says stop, and the job cannot be cancelled twice."""
    job = claimed(jobs, queued(jobs).id)
    jobs.cancel(job.id)
    assert not jobs.heartbeat(job.id, job.epoch, lease_s=30)
    assert not jobs.finish(job.id, job.epoch, result={})
    with pytest.raises(RegistryError, match="is cancelled already"):
        jobs.cancel(job.id)


def test_progress_is_what_the_trainer_said_last(jobs: Jobs) -> None:
    """A heartbeat without progress keeps the last one."""
    job = claimed(jobs, queued(jobs).id)
    jobs.heartbeat(job.id, job.epoch, lease_s=30, progress={"step": 5})
    jobs.heartbeat(job.id, job.epoch, lease_s=30)
    assert {"step": 5} == jobs.get(job.id).progress


def test_newest_first_and_unknown_by_name(jobs: Jobs, clock: Clock) -> None:
    """`latest` lists newest first; an unknown id is named."""
    ids = []
    for _ in range(3):
        job = queued(jobs)
        ids.append(job.id)
        jobs.cancel(job.id)
        clock.now_s += 1
    assert ids[::-1] == [job.id for job in jobs.latest()]
    assert ids[:0:-1] == [job.id for job in jobs.latest(limit=2)]
    with pytest.raises(RegistryError, match="no job 'nope'"):
        jobs.get("nope")
