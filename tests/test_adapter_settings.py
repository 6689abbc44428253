"""Settings: read from the environment, checked all at once, handed on to children unchanged."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from kombu import Connection

from adapter.contracts import SettingsError
from adapter.settings import DEFAULT_TARGET, Settings, child_environment, load_settings
from adapter.streams import connect, wait_until_up
from serving.valkey import valkey_command


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the person who runs the tests leaks in."""
    for name in list(os.environ):
        if name.startswith("DRAFTSMITH_") or name in ("REDIS_URL", "DATABASE_URL"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_without_an_environment_everything_has_a_default(tmp_path: Path) -> None:
    """The defaults are the embedded deployment: our target, bundled Valkey, SQLite, loopback."""
    settings = load_settings()
    assert (DEFAULT_TARGET, "auto", "127.0.0.1") == (settings.target, settings.draft, settings.host)
    assert tmp_path / "data/draftsmith" == settings.data_dir
    assert f"sqlite:///{settings.data_dir}/draftsmith.db" == settings.database
    assert settings.redis == f"unix://{settings.run_dir}/valkey.sock"
    assert settings.broker.startswith("redis+socket:///")


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%41b", "a b"])
def test_a_folder_of_any_name_has_a_server_that_is_found(tmp_path: Path, name: str) -> None:
    """The bundled Valkey listens where redis-py and Celery's transport look for it, whatever the folder is called."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # a socket's path has 107 bytes
        settings = load_settings(data_dir=Path(short) / name)
        settings.run_dir.mkdir(parents=True)
        process = subprocess.Popen(valkey_command(settings), stdout=subprocess.DEVNULL)
        try:
            with contextlib.closing(connect(settings.redis, 1.0)) as client:
                assert wait_until_up(client, 20.0)
            with Connection(settings.broker) as broker:
                assert broker.default_channel.client.ping()
        finally:
            process.terminate()
            process.wait(10)
        assert {"run", "valkey"} == {path.name for path in settings.data_dir.iterdir()}


def test_a_problem_is_named_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came by a flag is named by the flag, what came by the environment by the setting."""
    with pytest.raises(SettingsError, match=r"--dashboard-port = 99999: expected less than or equal to 65535"):
        load_settings(dashboard_port=99999)
    monkeypatch.setenv("DRAFTSMITH_PORT", "70000")
    with pytest.raises(SettingsError, match=r"  port = '70000': expected less"):
        load_settings()


def test_the_environment_is_read_by_section(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat and nested names work, REDIS_URL and DATABASE_URL under their usual names."""
    monkeypatch.setenv("DRAFTSMITH_PORT", "9000")
    monkeypatch.setenv("DRAFTSMITH_ENGINE__GAMMA", "5")
    monkeypatch.setenv("DRAFTSMITH_MONITORS__WEBHOOK_URLS", '["json://localhost/x"]')
    monkeypatch.setenv("REDIS_URL", "redis://cache:6379/1")
    monkeypatch.setenv("DATABASE_URL", "postgresql+psycopg://u@db/d")

    settings = load_settings()

    assert (9000, 5, ("json://localhost/x",)) == (settings.port, settings.engine.gamma, settings.monitors.webhook_urls)
    assert ("redis://cache:6379/1", "redis://cache:6379/1") == (settings.redis, settings.broker)
    assert "postgresql+psycopg://u@db/d" == settings.database


def test_flags_win_over_the_environment_and_none_means_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """An override is stronger than the environment; None is no override."""
    monkeypatch.setenv("DRAFTSMITH_PORT", "9000")
    assert (9001, 9000) == (load_settings(port=9001).port, load_settings(port=None).port)


def test_all_problems_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line names the setting, its value and what is valid."""
    monkeypatch.setenv("DRAFTSMITH_PORT", "70000")
    monkeypatch.setenv("DRAFTSMITH_ENGINE__GAMMA", "99")
    monkeypatch.setenv("DRAFTSMITH_ENGINE__COUPLING", "tight")

    with pytest.raises(SettingsError) as caught:
        load_settings()

    text = str(caught.value)
    for words in ("port = '70000'", "less than or equal to 65535", "engine.gamma = '99'", "engine.coupling = 'tight'"):
        assert words in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("DRAFTSMITH_ENGINE__GAMA", "did you mean DRAFTSMITH_ENGINE__GAMMA?"),
        ("DRAFTSMITH_ENGIN__GAMMA", "did you mean DRAFTSMITH_ENGINE__GAMMA?"),
        ("DRAFTSMITH_LOG__TOPK", "did you mean DRAFTSMITH_LOG__TOP_K?"),
        ("DRAFTSMITH_PROT", "did you mean DRAFTSMITH_PORT?"),
        ("DRAFTSMITH_REDIS_URL", "did you mean REDIS_URL?"),
    ],
)
def test_a_misspelt_setting_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    """A name that means nothing is refused, not ignored, and the likely one is named."""
    monkeypatch.setenv(name, "3")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert words in str(caught.value)


def test_a_secret_in_a_url_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error about one setting shows no password of another."""
    monkeypatch.setenv("DATABASE_URL", "postgresql+psycopg://u:hunter2@db/d")
    monkeypatch.setenv("DRAFTSMITH_PORT", "x")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


_CHILD = "from adapter.settings import load_settings; print(load_settings().model_dump_json())"


@pytest.mark.parametrize("outside", [False, True])
def test_a_child_reads_exactly_the_same_settings(tmp_path: Path, outside: bool) -> None:
    """Whatever the parent was given by flag, file or environment, a child process sees it."""
    urls = {"redis_url": "redis://cache:6379/1", "database_url": "sqlite:////tmp/x.db"} if outside else {}
    settings = load_settings(
        data_dir=tmp_path / "d", port=9001, draft="none",
        engine={"gamma": 5, "coupling": "maximal"}, monitors={"webhook_urls": ["json://a"]}, **urls,
    )  # fmt: skip
    env = child_environment(settings)
    out = subprocess.run(
        [sys.executable, "-c", _CHILD], env=env, cwd=Path(__file__).parent.parent,
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert json.loads(settings.model_dump_json()) == json.loads(out)


def test_a_parent_of_a_parent_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DRAFTSMITH_ variable that an override replaced does not reach the child under its old value."""
    monkeypatch.setenv("DRAFTSMITH_ENGINE__GAMMA", "5")
    env = child_environment(load_settings(engine={"gamma": 2}))
    assert "DRAFTSMITH_ENGINE__GAMMA" not in env
    assert 2 == json.loads(env["DRAFTSMITH_ENGINE"])["gamma"]


def test_socket_paths_stay_short(tmp_path: Path) -> None:
    """A deep data folder gets its sockets elsewhere, the same place every time, within the kernel's limit."""
    deep = tmp_path / ("x" * 120)
    one, two = load_settings(data_dir=deep), load_settings(data_dir=deep)
    assert one.run_dir == two.run_dir
    assert len(str(one.run_dir / "valkey.sock").encode()) <= 107
    assert one.run_dir != load_settings(data_dir=tmp_path / ("y" * 120)).run_dir


def test_settings_cannot_be_changed_after_the_check() -> None:
    """What was validated stays what it was."""
    settings: Settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


def test_a_list_that_is_not_json_is_explained(monkeypatch):
    """The most natural spelling of a key is refused in a sentence that shows the right one."""
    monkeypatch.setenv("DRAFTSMITH_API__KEYS", "secret123")
    with pytest.raises(SettingsError, match=r"written as JSON, like DRAFTSMITH_API__KEYS='\["):
        load_settings()
