"""The real worker: Celery on a real Valkey, real trainers, and what a kill leaves behind."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from distill_tiny import log_requests, make_pair

from adapter.broker import announce_job
from adapter.jobs import Job, Jobs
from adapter.pairs import Pair
from adapter.registry import Registry
from adapter.sections import DistillSettings
from adapter.settings import Settings, child_environment
from adapter.turns import Lender
from distill import tasks

QUICK = DistillSettings(
    epochs=1,
    batch_tokens=256,
    rank=8,
    alpha=16,
    learning_rates=(5e-3,),
    min_requests=20,
    holdout_share=0.3,
    lease_s=3,
    replay_age_s=1e12,
)
START_S = 60.0  # a trainer imports torch first, on a machine that may be busy


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def settings(tmp_path, valkey_url, database, pair, valkey_client) -> Settings:
    """A deployment with the tiny pair served and 60 requests logged."""
    log_requests(pair, database, valkey_client)
    return Settings(
        data_dir=tmp_path / "data",
        redis_url=valkey_url,
        database_url=f"sqlite:///{tmp_path / 'draftsmith.db'}",
        distill=QUICK,
    )


@pytest.fixture
def jobs(database) -> Jobs:
    return Jobs(database)


@contextlib.contextmanager
def _worker(settings: Settings, log: Path) -> Iterator[psutil.Process]:
    """Run `python -m distill` and take down whatever of it is left at the end."""
    with (
        log.open("ab") as words,
        subprocess.Popen(
            [sys.executable, "-m", "distill"], env=child_environment(settings), stdout=words, stderr=words,
            stdin=subprocess.DEVNULL, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        worker = psutil.Process(process.pid)
        family: list[psutil.Process] = [worker]
        try:
            yield worker
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                family += worker.children(recursive=True)
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()


def _request(settings: Settings, jobs: Jobs) -> str:
    job = jobs.request(reason="test", requested_by="test")
    assert job is not None
    assert announce_job(settings, job.id)
    return job.id


def _trainer_of(job: Job) -> psutil.Process | None:
    """Find the process that trains a job, by its command line."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "distill.trainer" in command and job.id in command and str(job.epoch) in command:
            return process
    return None


def _slow(settings: Settings) -> Settings:
    return settings.model_copy(update={"distill": QUICK.model_copy(update={"epochs": 2_000.0})})


def _gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_an_announced_job_is_trained_and_published_without_torch_in_the_worker(
    settings, jobs, database, tmp_path, wait_for
):
    """From message to version: the job ends done, and neither worker process ever mapped libtorch."""
    log = tmp_path / "worker.log"
    with _worker(settings, log) as worker:
        job_id = _request(settings, jobs)
        wait_for(lambda: jobs.get(job_id).state not in ("queued", "running"), START_S)
        maps = [(Path("/proc") / str(p.pid) / "maps").read_text() for p in [worker, *worker.children()]]
    job = jobs.get(job_id)
    assert job.state == "done", (job.error, log.read_text()[-3000:])
    assert job.result["version"] == 1
    assert Registry(database).draft(1).job_id == job_id
    assert job.progress["step"] == job.progress["steps"]
    assert len(maps) >= 2
    assert not any("libtorch" in content for content in maps)


def test_a_killed_worker_leaves_no_trainer_and_its_job_is_taken_over(settings, jobs, tmp_path, wait_for):
    """SIGKILL of the whole worker in mid-training: the trainer goes too, the lease runs out, the next
    worker resumes under a higher epoch, and exactly one version is published."""
    slow = _slow(settings)
    with _worker(slow, tmp_path / "first.log") as worker:
        job_id = _request(slow, jobs)
        wait_for(lambda: jobs.get(job_id).progress.get("step", 0) > 3, START_S)
        first = jobs.get(job_id)
        trainer = _trainer_of(first)
        assert trainer is not None
        for process in [worker, *worker.children()]:
            os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: _gone(trainer))
    wait_for(lambda: job_id in jobs.claimable(), 3 * QUICK.lease_s)
    with _worker(settings, tmp_path / "second.log"):
        assert announce_job(settings, job_id)
        wait_for(lambda: jobs.get(job_id).state not in ("queued", "running"), START_S)
    job = jobs.get(job_id)
    assert (job.state, job.epoch) == ("done", first.epoch + 1), job.error


def test_killing_only_the_main_process_ends_its_trainer_too(settings, jobs, tmp_path, wait_for):
    """No orphan remains of a worker whose main process dies; the job can be claimed when its lease is over."""
    slow = _slow(settings)
    with _worker(slow, tmp_path / "worker.log") as worker:
        job_id = _request(slow, jobs)
        wait_for(lambda: jobs.get(job_id).progress.get("step", 0) > 0, START_S)
        trainer, children = _trainer_of(jobs.get(job_id)), worker.children()
        assert trainer is not None
        worker.kill()
        wait_for(lambda: _gone(trainer))
        wait_for(lambda: all(_gone(child) for child in children))
    wait_for(lambda: job_id in jobs.claimable(), 3 * QUICK.lease_s)


def test_a_trainer_that_stands_still_for_serving_is_no_orphan(settings, jobs, tmp_path, wait_for):
    """The worker is killed while its trainer is stopped: the kernel ends it, though it could notice nothing."""
    lender = Lender(settings.run_dir, share=0.0)
    with _worker(_slow(settings), tmp_path / "worker.log") as worker:
        job_id = _request(settings, jobs)
        wait_for(lambda: jobs.get(job_id).progress.get("step", 0) > 0, START_S)
        trainer = _trainer_of(jobs.get(job_id))
        assert trainer is not None

        def stands_still() -> bool:
            lender.follow(busy=True)
            return trainer.status() == psutil.STATUS_STOPPED

        wait_for(stands_still)
        for process in [worker, *worker.children()]:
            os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: _gone(trainer))
    lender.close()


@pytest.mark.slow
def test_a_trainer_that_waits_for_serving_is_not_late(settings, jobs, wait_for):
    """Stopped now and then it ends as ever, and the job says how long it waited."""
    lender = Lender(settings.run_dir, share=0.0)
    job = jobs.request(reason="test", requested_by="test")
    calls = itertools.count()

    def serving() -> bool:
        lender.follow(busy=next(calls) % 8 < 4)  # a second of requests, a second without
        return False

    assert tasks.supervise(settings, job.id, stopping=serving) == "done"
    assert 0 < jobs.get(job.id).result["waited_s"] < jobs.get(job.id).result["seconds"] + START_S
    lender.close()


def test_sigterm_stops_the_worker_and_hands_the_job_back(settings, jobs, tmp_path, wait_for):
    """A deploy does not wait for the training: worker and trainer are gone soon, the job can be claimed."""
    slow = _slow(settings)
    with _worker(slow, tmp_path / "worker.log") as worker:
        job_id = _request(slow, jobs)
        wait_for(lambda: jobs.get(job_id).progress.get("step", 0) > 0, START_S)
        trainer = _trainer_of(jobs.get(job_id))
        assert trainer is not None
        worker.terminate()
        wait_for(lambda: _gone(worker) and _gone(trainer), 30)
    assert jobs.get(job_id).state == "queued", (tmp_path / "worker.log").read_text()[-3000:]


def test_the_worker_outlives_a_broker_that_is_down_and_restarts(settings, jobs, valkey, tmp_path, wait_for):
    """Started without a broker and with one that goes away twice, it still takes the job at last."""
    valkey.stop()
    log = tmp_path / "worker.log"
    with _worker(settings, log) as worker:
        wait_for(lambda: "Cannot connect" in log.read_text(), START_S)
        for _ in range(2):
            seen = log.read_text().count("Connected to redis")
            valkey.start()
            wait_for(lambda seen=seen: log.read_text().count("Connected to redis") > seen, START_S)
            valkey.stop()
        valkey.start()
        assert worker.is_running()
        job_id = _request(settings, jobs)
        wait_for(lambda: jobs.get(job_id).state == "done", START_S)


def _shell_trainer(monkeypatch, script: str) -> None:
    """Let the supervisor exec a few lines of Python in place of the trainer."""
    monkeypatch.setattr(tasks, "TRAINER", (sys.executable, "-c", script))


def test_a_cancelled_job_ends_its_trainer(settings, jobs, monkeypatch):
    """The next heartbeat finds the job cancelled; the process group is gone when supervise returns."""
    _shell_trainer(monkeypatch, "import time; print('{\"step\": 1}', flush=True); time.sleep(600)")
    job = jobs.request(reason="test", requested_by="test")

    def cancel() -> bool:
        if jobs.get(job.id).progress.get("step") == 1:
            jobs.cancel(job.id)
        return False

    def cancel_once() -> bool:
        return jobs.get(job.id).state == "running" and cancel()

    assert tasks.supervise(settings, job.id, stopping=cancel_once) == "lost"
    assert jobs.get(job.id).state == "cancelled"
    assert _trainer_of(jobs.get(job.id)) is None


@pytest.mark.parametrize(
    ("script", "state", "words"),
    [
        ("import sys; sys.stderr.write('no blocks'); sys.exit(2)", "failed", "failed with status 2: no blocks"),
        ("import sys; sys.stderr.write('boom'); sys.exit(1)", "queued", "failed with status 1: boom"),
        ("import os; os.kill(os.getpid(), 9)", "queued", "was ended by SIGKILL"),
        ("print('not json'); print('[1]')", "queued", "ended without a result"),
    ],
)
def test_a_failed_trainer_closes_or_requeues_its_job_with_its_last_words(
    settings, jobs, monkeypatch, script, state, words
):
    """Status 2 is final, everything else is tried again; stderr's tail is in the error."""
    _shell_trainer(monkeypatch, script)
    job = jobs.request(reason="test", requested_by="test")
    assert tasks.supervise(settings, job.id) == "failed"
    assert jobs.get(job.id).state == state
    assert words in jobs.get(job.id).error


def test_a_job_that_keeps_failing_is_given_up(settings, jobs, monkeypatch):
    """Three attempts, then failed for good: no endless loop of messages."""
    _shell_trainer(monkeypatch, "import sys; sys.exit(1)")
    job = jobs.request(reason="test", requested_by="test")
    outcomes = [tasks.supervise(settings, job.id) for _ in range(4)]
    assert outcomes == ["failed", "failed", "failed", "held"]
    assert jobs.get(job.id).state == "failed"


def test_a_second_message_for_a_running_job_and_one_for_no_job_end_at_once(settings, jobs):
    """Duplicates and leftovers are acknowledged without work."""
    job = jobs.request(reason="test", requested_by="test")
    jobs.claim(job.id, worker="other", lease_s=60)
    assert tasks.supervise(settings, job.id) == "held"
    assert tasks.supervise(settings, "nothing") == "unknown"
    assert jobs.get(job.id).worker == "other"


def test_the_last_progress_line_is_kept_when_the_job_is_done(settings, jobs, monkeypatch):
    """What was said just before the result still reaches the registry."""
    lines = 'print(\'{"step": 5, "steps": 5}\'); print(\'{"result": {"version": 3}}\')'
    _shell_trainer(monkeypatch, lines)
    job = jobs.request(reason="test", requested_by="test")
    assert tasks.supervise(settings, job.id) == "done"
    assert jobs.get(job.id).result == {"version": 3}
    assert jobs.get(job.id).progress == {"step": 5, "steps": 5}
