"""Registry and jobs on a real PostgreSQL, where the machine has one; SQLite is tested everywhere."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import poll_until
from sqlalchemy import Engine, text

from adapter.alerting import Alerts
from adapter.contracts import ConflictError
from adapter.database import migrate, open_database
from adapter.facts import Facts
from adapter.jobs import Jobs
from adapter.registry import Registry

FOUND = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
INITDB = FOUND[-1] if FOUND else Path(shutil.which("initdb") or "/nonexistent")
USERS = {entry.pw_name for entry in pwd.getpwall()}
USER = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root

pytestmark = pytest.mark.skipif(
    not INITDB.exists() or (USER is not None and USER not in USERS), reason="no PostgreSQL server on this machine"
)
THREADS = 6


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a PostgreSQL on a unix socket, started for this file."""
    folder = Path(tempfile.mkdtemp(prefix="dsp-", dir="/tmp"))
    if USER:
        shutil.chown(folder, USER)
    data = folder / "data"
    run: dict[str, Any] = {"user": USER, "cwd": folder, "stdout": subprocess.DEVNULL}
    subprocess.run([INITDB, "-D", data, "-U", "draftsmith", "-A", "trust", "-N", "-E", "UTF8"], check=True, **run)
    process = subprocess.Popen(
        [INITDB.with_name("postgres"), "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"],
        stderr=subprocess.DEVNULL,
        **run,
    )
    try:
        ready = [INITDB.with_name("pg_isready"), "-q", "-h", folder, "-U", "draftsmith"]
        poll_until(lambda: subprocess.run(ready, check=False).returncode == 0, 60)
        yield f"postgresql+psycopg://draftsmith@/postgres?host={folder}"
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres(server: str) -> Iterator[Engine]:
    """An empty, migrated database."""
    engine = open_database(server)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    migrate(engine)
    yield engine
    engine.dispose()


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """Run `work(i)` on n=6 threads that start together; return what each returned or raised."""
    start, results = threading.Barrier(THREADS), []

    def run(number: int) -> None:
        start.wait(30)
        try:
            results.append(work(number))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert THREADS == len(results)
    return results


def installed(engine: Engine) -> Registry:
    registry = Registry(engine)
    registry.install_base(target_fingerprint="a" * 64, base_fingerprint="b" * 64, actor="engine")
    return registry


def publish(registry: Registry) -> int:
    return registry.publish(
        parent=0, state="ready", artifact_sha256="c" * 64, artifact_bytes=1, trained_on={"n": 1}, gate={},
        reason="r", job_id=None, actor="trainer",
    ).version  # fmt: skip


def test_processes_that_start_together_migrate_once(server: str) -> None:
    """Six migrations at once leave one schema and no error."""
    engine = open_database(server)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    assert [None] * THREADS == at_once(lambda number: migrate(engine))
    assert [] == Registry(engine).drafts()
    engine.dispose()


def test_one_promotion_wins(postgres: Engine) -> None:
    """With the same expected generation one promotion wins and five are conflicts."""
    registry = installed(postgres)
    versions = [publish(registry) for _ in range(THREADS)]
    seen = registry.live().generation

    results = at_once(
        lambda number: registry.promote(versions[number], actor="a", reason="r", expected_generation=seen)
    )

    assert THREADS - 1 == sum(isinstance(result, ConflictError) for result in results), results
    assert seen + 1 == registry.live().generation
    assert registry.live().live == registry.audit(limit=1)[0].to_version


def test_published_versions_are_distinct(postgres: Engine) -> None:
    """Six publishers at once get six consecutive numbers, and installing at once is one install."""
    registry = installed(postgres)
    assert list(range(1, THREADS + 1)) == sorted(at_once(lambda number: publish(registry)))
    at_once(lambda number: installed(postgres))
    assert 1 == sum(entry.verb == "install" for entry in registry.audit())


def test_one_job_and_one_claim(postgres: Engine) -> None:
    """Six requests make one job; six claims of it give one lease, fenced by its epoch."""
    jobs = Jobs(postgres)
    made = [job for job in at_once(lambda number: jobs.request(reason="r", requested_by="w")) if job]
    assert 1 == len(made)
    held = [job for job in at_once(lambda n: jobs.claim(made[0].id, worker=f"w{n}", lease_s=30)) if job]
    assert [(1, 1)] == [(job.epoch, job.attempts) for job in held]
    assert jobs.finish(made[0].id, 1, result={"version": 1})
    assert not jobs.finish(made[0].id, 1, result={"version": 2})


def test_one_alert_and_one_fact(postgres: Engine) -> None:
    """The same alert opened six times is open once; a document replaced six times at once is one row."""
    alerts, facts = Alerts(postgres), Facts(postgres)
    opened = at_once(lambda number: alerts.open("R", "k", "ticket", "s", {}))
    assert THREADS - 1 == opened.count(None), opened
    assert [None] * THREADS == at_once(lambda number: facts.put("pair", {"n": number}))
    assert facts.get("pair") is not None


def test_readers_do_not_wait_for_a_writer(postgres: Engine) -> None:
    """`live` answers while another transaction holds the writers' lock."""
    registry = installed(postgres)
    with postgres.begin():
        assert 0 == registry.live().live
