"""The command line on a real registry: what it prints, what it refuses in one line, and with which status."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from deployment import cli as process
from deployment import environment

from adapter.alerting import Alerts
from adapter.database import migrate, open_database
from adapter.facts import ADVICE, ENGINE, PAIR, PAYOFF, SERVING, Facts
from adapter.jobs import Jobs
from adapter.registry import Registry
from adapter.settings import Settings
from serving import cli, cli_views
from serving.roles import write_roles

Ran = tuple[int, str, str]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A deployment's folder: a pair, the base draft, a version that passed its gate and one that did not."""
    folder = tmp_path / "data"
    database = open_database(f"sqlite:///{folder / 'draftsmith.db'}")
    migrate(database)
    registry = Registry(database)
    registry.install_base(target_fingerprint="t" * 64, base_fingerprint="b" * 64, actor="engine")
    for state, verdict in (("ready", "gained 0.05"), ("rejected", "gained nothing")):
        registry.publish(
            parent=0, state=state, artifact_sha256="a" * 64, artifact_bytes=1_500_000, trained_on={"requests": 90},
            gate={"gain": 0.05}, reason=verdict, job_id=None, actor="trainer",
        )  # fmt: skip
    Facts(database).put(PAIR, {
        "target_name": "tiny", "target_path": "/models/tiny", "target_fingerprint": "t" * 64, "dtype": "float32",
        "draft_kind": "model", "draft_path": "/models/draft", "base_fingerprint": "b" * 64, "lora_shapes": {},
    })  # fmt: skip
    Facts(database).put(SERVING, {"url": "http://127.0.0.1:1", "pid": 1})
    database.dispose()
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Return `run(*arguments) -> (status, stdout, stderr)`; the command runs in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("REDIS_URL", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["draftsmith", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def _assert_refused(ran: Ran, *words: str) -> None:
    status, out, err = ran
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err


# -- drafts ----------------------------------------------------------------------------------


def test_a_person_asks_for_a_training(run: Any, data: Path) -> None:
    """The job carries the person and the reason, and a second one is refused while it is open."""
    status, out, _ = run("drafts", "train", "--data-dir", data, "--reason", "new tenant", "--json")
    database = open_database(f"sqlite:///{data / 'draftsmith.db'}")
    [job] = Jobs(database).latest()
    database.dispose()
    assert (status, json.loads(out)) == (0, {"job": job.id})
    assert (job.state, job.reason, job.segments) == ("queued", "new tenant", ())
    assert job.requested_by.startswith("cli")
    _assert_refused(run("drafts", "train", "--data-dir", data), "a training is open already", "draftsmith status")


def test_the_list_says_what_a_version_cost_and_saved(run: Any, data: Path) -> None:
    """Seconds of training for seconds saved; unknown where they are, a dash where it was never live."""
    database = open_database(f"sqlite:///{data / 'draftsmith.db'}")
    account = {"training_s": 61.4, "saved_s": None, "why": "no costs"}
    Facts(database).put(PAYOFF, {"1": account, "2": account | {"saved_s": 1234.5}})
    database.dispose()
    table = run("drafts", "list", "--data-dir", data)[1]
    assert "61 s for unknown" in table
    assert "61 s for 1,234 s" in table
    listed = json.loads(run("drafts", "list", "--data-dir", data, "--json")[1])["drafts"]
    assert [item["payoff"] for item in listed][1:] == [account, None]


def test_list_shows_versions_and_aliases(run, data):
    """Newest first, with alias, state, parent and verdict; the same as JSON."""
    status, out, _ = run("drafts", "list", "--data-dir", data, "--json")
    listed = json.loads(out)
    assert (status, listed["generation"]) == (0, 1)
    assert [(d["version"], d["alias"], d["state"]) for d in listed["drafts"]] == [
        (2, "", "rejected"), (1, "", "ready"), (0, "live floor", "ready"),
    ]  # fmt: skip
    table = run("drafts", "list", "--data-dir", data)[1]
    for word in ("live floor", "rejected", "1.5 MB", "gained 0.05", "trainer"):
        assert word in table


def test_show_has_gate_data_and_artifact(run, data):
    """One version in full, as text and as JSON."""
    shown = json.loads(run("drafts", "show", 1, "--data-dir", data, "--json")[1])
    assert shown["gate"] == {"gain": 0.05}
    assert shown["trained_on"] == {"requests": 90}
    assert shown["artifact_sha256"] == "a" * 64
    assert '"gain": 0.05' in run("drafts", "show", 1, "--data-dir", data)[1]


def test_promote_and_roll_back(run, data):
    """Both say where the aliases point afterwards, and each leaves one audit row with actor and reason (I6)."""
    status, out, _ = run("drafts", "promote", 1, "--data-dir", data, "--reason", "looks good", "--json")
    assert (status, json.loads(out)) == (0, {"generation": 2, "live": 1, "previous": 0, "alternates": []})
    aliases = {
        d["version"]: d["alias"] for d in json.loads(run("drafts", "list", "--data-dir", data, "--json")[1])["drafts"]
    }
    assert aliases == {2: "", 1: "live", 0: "previous floor"}
    status, out, _ = run("drafts", "rollback", "--data-dir", data, "--expected-generation", 2)
    assert (status, "version 0 is live (generation 3, previous 1)" in out) == (0, True)
    database = open_database(f"sqlite:///{data / 'draftsmith.db'}")
    rows = [row for row in Registry(database).audit() if row.verb in ("promote", "roll_back")]
    database.dispose()
    assert [(row.verb, row.to_version, row.automatic) for row in rows] == [
        ("roll_back", 0, False),
        ("promote", 1, False),
    ]
    assert rows[1].reason == "looks good"
    assert all(row.actor.startswith("cli") for row in rows)


def test_admit_and_dismiss(run, data):
    """A version drafts beside the live one and no longer; list and status name it, and each leaves one audit row."""
    status, out, _ = run("drafts", "admit", 1, "--data-dir", data, "--reason", "fits chat", "--json")
    assert (status, json.loads(out)) == (0, {"generation": 2, "live": 0, "previous": None, "alternates": [1]})
    listed = json.loads(run("drafts", "list", "--data-dir", data, "--json")[1])["drafts"]
    assert {d["version"]: d["alias"] for d in listed} == {2: "", 1: "alternate", 0: "live floor"}
    assert "version 1: draft for requests they fit better" in run("status", "--data-dir", data)[1]
    _assert_refused(run("drafts", "admit", 1, "--data-dir", data), "version 1 is an alternate already")
    status, out, _ = run("drafts", "dismiss", 1, "--data-dir", data)
    assert (status, "version 0 is live (generation 3, previous None)" in out) == (0, True)
    database = open_database(f"sqlite:///{data / 'draftsmith.db'}")
    rows = [row for row in Registry(database).audit() if row.verb in ("admit", "dismiss")]
    database.dispose()
    assert [(row.verb, row.from_version, row.to_version) for row in rows] == [("dismiss", 1, None), ("admit", None, 1)]
    assert rows[1].reason == "fits chat"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("drafts", "admit", 2), ("version 2 is rejected", "'ready'")),
        (("drafts", "dismiss", 1), ("version 1 is no alternate; alternates: none",)),
        (("drafts", "show", 9), ("no draft version 9", "0, 1, 2")),
        (("drafts", "promote", 9), ("no draft version 9",)),
        (("drafts", "promote", 0), ("version 0 is live already",)),
        (("drafts", "promote", 2), ("version 2 is rejected",)),
        (("drafts", "promote", 1, "--expected-generation", 7), ("generation is 1, you looked at 7",)),
        (("drafts", "rollback"), ("no earlier version",)),
    ],
)
def test_what_the_registry_refuses_is_one_line(run, data, arguments, words):
    """Unknown, rejected, already live, out of date, nothing to go back to: one line and status 2."""
    _assert_refused(run(*arguments, "--data-dir", data), *words)


def test_square_brackets_are_shown_as_they_are(run, data):
    """Text from others is no markup: tags are shown, and one that closes nothing ends no command."""
    database = open_database(f"sqlite:///{data / 'draftsmith.db'}")
    registry = Registry(database)
    registry.publish(
        parent=0, state="rejected", artifact_sha256="c" * 64, artifact_bytes=1, trained_on={"[/]": "[red]"}, gate={},
        reason="[/bold] lost [red]all[/red]", job_id=None, actor="trainer",
    )  # fmt: skip
    Alerts(database).open("AcceptanceDrift", "[x]", "ticket", "segment [/x] fell", {})
    facts = Facts(database)
    facts.put(PAIR, facts.get(PAIR) | {"target_name": "[/tiny]"})
    for arguments, words in (
        (("drafts", "list"), "[/bold] lost [red]all[/red]"),
        (("drafts", "show", 3), "[/bold] lost [red]all[/red]"),
        (("status",), "segment [/x] fell"),
        (("status",), "[/tiny] (float32)"),
    ):
        status, out, _ = run(*arguments, "--data-dir", data)
        assert (status, words in out) == (0, True), out
    _assert_refused(run("status", "--data-dir", data / "[/no]"), "[/no] holds no deployment")


def test_a_database_that_cannot_be_read_is_one_line(run, data):
    """A file that is no database is said to be unusable, without a traceback."""
    for path in data.glob("draftsmith.db*"):
        path.write_bytes(b"this is not SQLite" * 100)
    _assert_refused(run("status", "--data-dir", data), "the database cannot be used", "not a database")


def test_a_database_that_is_away_does_not_end_the_supervisor(data, monkeypatch):
    """While SQL cannot be read nothing is announced and nothing is raised; afterwards it is looked at again."""
    announcement = cli_views._Announcement(Settings(data_dir=data), with_dashboard=False)
    announcement.look()
    database = data / "draftsmith.db"
    kept = database.read_bytes()
    announcement._facts = None
    for path in data.glob("draftsmith.db*"):
        path.write_bytes(b"this is not SQLite" * 100)
    announcement._next_s = 0.0
    announcement.look()
    assert announcement._said_away
    for path in data.glob("draftsmith.db*"):
        path.unlink()
    database.write_bytes(kept)
    announcement._next_s, asked = 0.0, []
    monkeypatch.setattr(cli_views, "_answers", lambda url: asked.append(url))
    announcement.look()
    assert asked == ["http://127.0.0.1:1/ready"]


# -- status ----------------------------------------------------------------------------------


def test_status_says_whether_the_log_is_written(run, data):
    """Nothing while no engine spoke; then what is written, or that nothing is."""
    assert json.loads(run("status", "--data-dir", data, "--json")[1])["log"] is None
    facts = Facts(open_database(f"sqlite:///{data / 'draftsmith.db'}"))
    facts.put(ENGINE, {"log_connected": True, "log_written": 70, "log_dropped": 3})
    assert "70 entries written, 3 dropped" in run("status", "--data-dir", data)[1]
    facts.put(ENGINE, {"log_connected": False, "log_written": 0, "log_dropped": 0})  # nobody asked for anything yet
    assert "nothing written yet" in run("status", "--data-dir", data)[1]
    facts.put(ENGINE, {"log_connected": False, "log_written": 70, "log_dropped": 9})
    assert "Redis is gone or full; 9 entries dropped" in run("status", "--data-dir", data)[1]


def test_status_works_while_nothing_runs(run, data):
    """Everything comes from SQL and files, so it is shown although no process is there."""
    shown = json.loads(run("status", "--data-dir", data, "--json")[1])
    assert shown["target_path"] == "/models/tiny"
    assert (shown["dtype"], shown["draft"]) == ("float32", "/models/draft")
    assert (shown["live"], shown["previous"], shown["generation"]) == (0, None, 1)
    assert shown["acceptance"]["value"] is None
    assert shown["acceptance"]["n"] == 0
    assert shown["roles"] == {}
    text = run("status", "--data-dir", data)[1]
    for words in ("tiny (float32)", "version 0, generation 1", "none firing", "no processes run here"):
        assert words in text


@pytest.mark.parametrize("arguments", [("status",), ("drafts", "list"), ("drafts", "rollback")])
def test_a_folder_without_a_deployment_is_refused_and_left_alone(run, tmp_path, arguments):
    """A mistyped folder is said to hold nothing; no database is made in it."""
    _assert_refused(run(*arguments, "--data-dir", tmp_path / "nothing"), "--data-dir or DRAFTSMITH_DATA_DIR")
    assert not (tmp_path / "nothing").exists()


# -- flags and settings ----------------------------------------------------------------------


def test_advise_prints_what_the_watcher_wrote_and_says_when_it_is_old(run, data):
    """Without a watcher the refusal says what to start; an old answer is shown and called old."""
    _assert_refused(run("advise", "--data-dir", data), "nobody watched", "draftsmith watch")
    signal = {"name": "answer length", "value": 9.0, "leaning": "against", "sentence": "Half have 9 tokens or fewer."}
    said = {
        "verdict": "do not speculate", "sentence": "Speculation costs speed here. Measured 0.80x.", "requests": 44,
        "signals": [signal], "instead": ["Smaller gamma: token 2 is kept in 3% of rounds."], "at_s": 1000.0,
    }  # fmt: skip
    Facts(open_database(f"sqlite:///{data / 'draftsmith.db'}")).put(ADVICE, said)
    status, out, _ = run("advise", "--data-dir", data)
    assert status == 0
    for words in ("do not speculate", "44 requests", "0.80x", "against", "Smaller gamma", "watcher is not running"):
        assert words in out
    status, out, _ = run("advise", "--json", "--data-dir", data)
    assert status == 0
    assert json.loads(out) == said


def test_settings_that_do_not_exist_are_refused(run, monkeypatch, tmp_path):
    """A mistyped variable is named, with what was probably meant."""
    monkeypatch.setenv("DRAFTSMITH_ENGIN__GAMMA", "3")
    status, _, err = run("status", "--data-dir", tmp_path)
    assert status == 2
    assert "DRAFTSMITH_ENGIN__GAMMA" in err
    assert "DRAFTSMITH_ENGINE" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("up", "--port", "99999"), ("port = 99999",)),
        (("up", "--dtype", "int8"), ("dtype = 'int8'",)),
        (("serve", "--port", "-1"), ("port = -1",)),
    ],
)
def test_impossible_values_are_refused(run, tmp_path, arguments, words):
    """A value that cannot work is named with what is valid, before anything is started."""
    status, _, err = run(*arguments, "--data-dir", tmp_path / "data")
    assert status == 2
    for word in words:
        assert word in err
    assert not (tmp_path / "data").exists()


def test_up_looks_around_before_it_starts(tmp_path):
    """A taken port names its own flag, a Redis that nobody answers is a warning, and no folder is made."""
    env = environment() | {"REDIS_URL": f"unix://{tmp_path}/nobody.sock"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = process("up", "--port", "0", "--dashboard-port", port, "--data-dir", tmp_path / "data", env=env)
    assert done.returncode == 2
    assert "redis_away" in done.stdout + done.stderr
    assert f"dashboard_port = {port}" in done.stderr
    assert "--dashboard-port" in done.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("role", "url"),
    [("up", "http://:hunter2@cache"), ("engine", "redis://:hunter2/x@cache"), ("watch", "redis://a:1#b")],
)
def test_a_redis_url_that_is_none_is_refused_without_its_password(tmp_path, role, url):
    """It ends everything, and each role alone, in one line that does not repeat the URL."""
    env = environment() | {"REDIS_URL": url}
    done = process(role, "--data-dir", tmp_path / "data", env=env)
    assert done.returncode == 2
    assert "REDIS_URL cannot be read" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    assert not (tmp_path / "data").exists()


def test_one_port_for_both_and_a_host_that_is_none_are_refused(tmp_path):
    """The API and the dashboard need a port each; an impossible host is a sentence, too."""
    for arguments, words in (
        (("--port", "8080", "--dashboard-port", "8080"), "port and dashboard_port are both 8080"),
        (("--port", "0", "--host", "a..b"), "a..b:0 cannot be used"),
    ):
        done = process("up", *arguments, "--data-dir", tmp_path / "data", env=environment())
        assert done.returncode == 2
        assert words in done.stderr
        assert not (tmp_path / "data").exists()


def test_status_says_when_the_api_cannot_serve(run, data):
    """A process that runs is not yet a service: without a /ready that says yes, `status` says so."""
    Facts(open_database(f"sqlite:///{data / 'draftsmith.db'}")).put(SERVING, {"url": "http://127.0.0.1:1"})
    settings = Settings(data_dir=data)
    settings.run_dir.mkdir()
    write_roles(settings, {"api": {"pid": os.getpid(), "state": "running", "restarts": 0}})
    assert "serves nothing yet" in run("status", "--data-dir", data)[1]
    assert json.loads(run("status", "--data-dir", data, "--json")[1])["ready"] is False


@pytest.mark.parametrize("arguments", [("up", "--no-such-flag"), ("nonsense",), ("drafts", "promote", "one")])
def test_usage_errors_have_status_2(run, arguments):
    """Unknown flags and commands, and arguments of the wrong type."""
    assert run(*arguments)[0] == 2


def test_version_and_help(run):
    """`version` prints the version; every command has a line of help."""
    status, out, _ = run("version")
    assert (status, out.count(".")) == (0, 2)
    shown = run("--help")[1]
    for command in ("up", "serve", "engine", "api", "worker", "watch", "status", "drafts", "bootstrap", "demo"):
        assert command in shown
