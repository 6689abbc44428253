"""The supervisor: roles come back, settings that cannot work end it, and it leaves nothing behind.

The first half supervises small programs, the second `draftsmith up` on a tiny pair.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import poll_until
from deployment import ROLES, Deployment, alive, answer, body, cli, client_of, family, tiny_deployment

from adapter.database import migrate, open_database
from adapter.facts import PAIR, STARTING, Facts
from adapter.pairs import loaded_pair, pair_from_facts
from adapter.settings import Settings
from serving.roles import LOCK_FILE, ROLES_FILE, Role, read_roles, roles_for
from serving.supervisor import DataDirInUse, RoleCannotStart, Supervisor

FOREVER = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(0)); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"
)


PAIR_OF_BEFORE = {
    "target_name": "of before", "target_path": "/gone", "target_fingerprint": "t", "dtype": "float32",
    "draft_kind": "none", "draft_path": None, "base_fingerprint": "none", "lora_shapes": {},
}  # fmt: skip


def _role(name: str, program: str) -> Role:
    return Role(name, [sys.executable, "-c", program], dict(os.environ))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", redis_url="unix:///nowhere")


@contextlib.contextmanager
def _supervised(settings: Settings, *roles: Role) -> Iterator[tuple[Supervisor, list[BaseException]]]:
    """Run a supervisor in a thread; what `run` raised is in the list afterwards."""
    supervisor, raised = Supervisor(settings, list(roles)), []

    def run() -> None:
        try:
            supervisor.run()
        except BaseException as error:
            raised.append(error)

    supervisor.start()
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield supervisor, raised
    finally:
        supervisor.stop()
        thread.join(30)
        assert not thread.is_alive()


def _pids(settings: Settings) -> dict[str, int]:
    return {name: role["pid"] for name, role in read_roles(settings).items() if role["pid"]}


def test_a_role_that_dies_is_restarted(settings, wait_for):
    """A killed process comes back under another pid, the others stay, and the table says how often."""
    with _supervised(settings, _role("engine", FOREVER), _role("api", FOREVER)):
        wait_for(lambda: len(_pids(settings)) == 2)
        before = _pids(settings)
        os.kill(before["engine"], signal.SIGKILL)
        wait_for(lambda: _pids(settings).get("engine") not in (None, before["engine"]))
        assert _pids(settings)["api"] == before["api"]
        assert read_roles(settings)["engine"]["restarts"] == 1
        assert read_roles(settings)["engine"]["state"] == "running"


def test_nothing_is_left_behind(settings, wait_for):
    """After `stop` no process lives and neither lock, table nor socket exists."""
    with _supervised(settings, _role("engine", FOREVER), _role("api", FOREVER)):
        wait_for(lambda: len(_pids(settings)) == 2)
        pids = set(_pids(settings).values())
    assert not alive(pids)
    assert not settings.run_dir.exists() or not list(settings.run_dir.iterdir())


def test_a_role_that_does_not_listen_is_killed(settings, wait_for, monkeypatch):
    """A process that ignores SIGTERM is killed after its grace."""
    from serving import supervisor as module

    monkeypatch.setitem(module._GRACE_S, "engine", 0.3)
    with _supervised(settings, _role("engine", STUBBORN)):
        wait_for(lambda: "on" in (settings.logs_dir / "engine.log").read_text())
        pids = set(_pids(settings).values())
    assert not alive(pids)


def test_settings_that_cannot_work_end_everything(settings, wait_for):
    """Exit status 2 of one role takes the others down; the error carries the end of its log."""
    failing = _role("engine", "import sys; print('kv_tokens is too small'); sys.exit(2)")
    with _supervised(settings, _role("api", FOREVER), failing) as (_, raised):
        wait_for(lambda: bool(raised))
    assert isinstance(raised[0], RoleCannotStart)
    assert "engine cannot start" in str(raised[0])
    assert "kv_tokens is too small" in str(raised[0])


def test_a_role_that_keeps_dying_is_restarted_ever_more_slowly(settings):
    """Pauses between restarts double up to ten seconds; the clock is the test's."""
    now = [0.0]
    supervisor = Supervisor(settings, [_role("engine", "raise SystemExit(1)")], clock=lambda: now[0])
    supervisor.start()
    item, pauses = supervisor._running[0], []
    try:
        for _ in range(8):
            item.process.wait(20)
            supervisor._look_after(item)
            pauses.append(item.next_start_s - now[0])
            now[0] = item.next_start_s - 0.01
            supervisor._look_after(item)
            assert item.process is None, "it was started before its pause was over"
            now[0] = item.next_start_s
            supervisor._look_after(item)
    finally:
        supervisor.shut_down()
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_one_supervisor_a_folder(settings):
    """A second one is refused with the pid of the first; the lock of a dead one does not count."""
    settings.run_dir.mkdir(parents=True)
    (settings.run_dir / LOCK_FILE).write_text("999999")
    first = Supervisor(settings, [])
    first.start()
    try:
        with pytest.raises(DataDirInUse, match=f"in use by pid {os.getpid()}"):
            Supervisor(settings, []).start()
        assert (settings.run_dir / LOCK_FILE).read_text() == str(os.getpid())
    finally:
        first.shut_down()
    assert not (settings.run_dir / LOCK_FILE).exists()


def test_an_earlier_starts_pair_is_not_believed(settings):
    """Before any role runs, SQL says that the engine loads; who serves must wait for its word (and others need not)."""
    database = open_database(settings.database)
    migrate(database)
    facts = Facts(database)
    facts.put(PAIR, PAIR_OF_BEFORE)
    assert loaded_pair(facts) is not None
    looks = (
        "import json\nfrom adapter.database import open_database\nfrom adapter.facts import Facts\n"
        f"from adapter.pairs import loaded_pair\n"
        f"print('saw', loaded_pair(Facts(open_database({settings.database!r}))), flush=True)\n"
    )
    with _supervised(settings, _role("api", looks + FOREVER), _role("engine", FOREVER)):
        poll_until(lambda: "saw" in (settings.logs_dir / "api.log").read_text())
    assert (settings.logs_dir / "api.log").read_text() == "saw None\n"
    assert pair_from_facts(facts).target_name == "of before"
    database.dispose()


def test_a_role_without_an_engine_leaves_the_pair(settings):
    """A supervisor that starts no engine has nobody who would say it anew."""
    with _supervised(settings, _role("api", FOREVER)):
        database = open_database(settings.database)
        migrate(database)
        assert Facts(database).get(STARTING) is None
        database.dispose()


def test_a_log_is_bounded(settings, wait_for, monkeypatch):
    """A role that writes without end keeps one log of the limit and one old one, and is still being logged."""
    from serving import supervisor as module

    monkeypatch.setattr(module, "LOG_BYTES", 100_000)
    writes = "import time\nwhile True:\n print('x' * 9_999, flush=True); time.sleep(0.002)"
    log, old = settings.logs_dir / "worker.log", settings.logs_dir / "worker.log.1"
    with _supervised(settings, _role("worker", writes)):
        wait_for(old.exists)
        shrunk = log.stat().st_size
        wait_for(lambda: log.stat().st_size != shrunk)
        first = old.stat().st_mtime_ns
        wait_for(lambda: old.stat().st_mtime_ns != first)
        assert {path.name for path in settings.logs_dir.iterdir()} == {"worker.log", "worker.log.1"}
    assert set(log.read_bytes()) <= set(b"x\n")  # no hole where the old lines were; it may just have begun anew


def test_roles_die_with_a_killed_supervisor(settings, wait_for, tmp_path):
    """SIGKILL of the supervisor itself takes its roles with it, by the kernel's word."""
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom adapter.settings import Settings\n"
        "from serving.roles import Role\nfrom serving.supervisor import Supervisor\n"
        f"s = Supervisor(Settings(data_dir=Path({str(settings.data_dir)!r}), redis_url='unix:///nowhere'), "
        f"[Role('engine', [sys.executable, '-c', {FOREVER!r}], dict(os.environ))])\ns.start()\ns.run()\n"
    )
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen([sys.executable, "-c", program], cwd=root) as process:
        wait_for(lambda: bool(_pids(settings)))
        pids = set(_pids(settings).values())
        process.kill()
    wait_for(lambda: not alive(pids))


# -- the real thing --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def up() -> Iterator[Deployment]:
    """`draftsmith up` on the tiny pair, started when a test first needs it."""
    with tiny_deployment() as deployment:
        yield deployment


def _everything(up: Deployment) -> set[int]:
    return set().union(*(family(pid) for pid in up.pids().values())) | {up.process.pid}


def _assert_gone(up: Deployment, pids: set[int], wait_for: Callable[..., None]) -> None:
    wait_for(lambda: not alive(pids), 10)
    assert not (up.data / "run").exists() or not list((up.data / "run").iterdir())


def test_up_serves_and_status_tells(up):
    """The URLs are printed once they answer, and `status --json` has pair, aliases, acceptance and processes."""
    up.start()
    printed = up.output.read_text()
    status = up.status()
    assert f"{status['api_url']}/v1" in printed
    assert status["dashboard_url"] in printed
    assert status["target_path"].endswith("tiny-target")
    assert (status["dtype"], status["live"], status["previous"], status["generation"]) == ("float32", 0, None, 1)
    assert set(status["acceptance"]) >= {"value", "n", "interval", "tokens_per_round"}
    assert set(status["roles"]) == set(ROLES)
    for role in status["roles"].values():
        assert role["state"] == "running"
        assert alive({role["pid"]})
    with client_of(status["api_url"]) as client:
        assert answer(client, body("the", "tiny-target"))["usage"]["completion_tokens"] == 24


def test_a_second_up_is_refused(up):
    """It ends with status 2 and one line that names the holder's pid; the first one goes on."""
    up.start()
    done = cli("up", "--port", "0", "--dashboard-port", "0", "--data-dir", up.data, *up.arguments, env=up.env)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert f"in use by pid {up.process.pid}" in lines[0]
    assert up.running


def test_killed_roles_come_back_and_the_service_with_them(up, wait_for):
    """SIGKILL of every role at once: each gets a new pid, and requests are answered as before."""
    up.start()
    with client_of(up.url) as client:
        before = answer(client, body("the", "tiny-target"))
    old = up.pids()
    for pid in old.values():
        os.kill(pid, signal.SIGKILL)
    for name, pid in old.items():
        up.wait_restarted(name, pid)

    def answers() -> bool:
        with contextlib.suppress(Exception), client_of(up.url) as client:
            return answer(client, body("the", "tiny-target")) == before
        return False

    wait_for(answers, 90)
    assert {role["restarts"] for role in up.roles().values()} == {1}


def test_sigterm_leaves_nothing(up, wait_for):
    """SIGTERM ends with status 0 and takes every process, socket and lock away; status says so."""
    up.start()
    pids = _everything(up)
    assert up.signal(signal.SIGTERM) == 0
    _assert_gone(up, pids, wait_for)
    status = up.status()
    assert status["roles"] == {}
    assert status["target_path"].endswith("tiny-target")


def test_sigint_leaves_nothing(up, wait_for):
    """Ctrl-C does the same, even while the processes are still starting."""
    up.launch()
    wait_for(lambda: len(up.pids()) == len(ROLES), 60)
    pids = _everything(up)
    assert up.signal(signal.SIGINT) == 0
    _assert_gone(up, pids, wait_for)


def test_a_pair_whose_folder_is_gone_does_not_stop_the_next_start(up):
    """The fact of an earlier start names a folder that was deleted: the API waits for the engine's own word."""
    up.start()
    assert up.signal(signal.SIGTERM) == 0
    facts = Facts(open_database(f"sqlite:///{up.data / 'draftsmith.db'}"))
    facts.put(PAIR, facts.get(PAIR) | {"target_path": "/gone/tiny-target"})
    up.start()
    assert pair_from_facts(facts).target_path.startswith(up.arguments[1])
    with client_of(up.url) as client:
        assert answer(client, body("the", "tiny-target"))["usage"]["completion_tokens"] == 24
    assert up.roles()["api"]["restarts"] == 0
    assert up.signal(signal.SIGTERM) == 0


def test_another_pair_on_the_same_folder_is_refused(up, tmp_path):
    """A data folder remembers its pair: another draft is refused with both fingerprints, and nothing is left."""
    assert (up.data / "draftsmith.db").exists()
    target = up.arguments[1]
    ports = ("--port", "0", "--dashboard-port", "0")
    done = cli("up", *ports, "--data-dir", up.data, "--target", target, "--draft", target, env=up.env)
    assert done.returncode == 2
    assert "belongs to another pair" in done.stderr
    assert not (up.data / "run" / ROLES_FILE).exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--target", "/no/such/model"], "neither a folder here"), (["--draft", "{empty}"], "config.json cannot be read")],
)
def test_models_that_cannot_be_used_are_refused(up, tmp_path, flags, words):
    """A target or draft that is not there ends `serve` with status 2 and the reason."""
    (tmp_path / "empty").mkdir()
    given = [flag.format(empty=tmp_path / "empty") for flag in flags]
    arguments = [*up.arguments, *given]  # the last one of a flag counts
    done = cli(
        "serve", "--port", "0", "--data-dir", tmp_path / "data", *arguments, env=up.env | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 2
    assert words in done.stderr, json.dumps(done.stderr)


def test_decoding_threads_spin_and_a_trainers_sleep(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the worker is told to let threads sleep at barriers; a policy of one's own reaches every role."""
    names = ["engine", "api", "worker", "watcher"]
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    told = {role.name: role.env.get("OMP_WAIT_POLICY") for role in roles_for(settings, names)}
    assert told == {"engine": None, "api": None, "worker": "PASSIVE", "watcher": None}
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert {role.env["OMP_WAIT_POLICY"] for role in roles_for(settings, names)} == {"ACTIVE"}
