"""Processes of a real deployment die one by one, and the supervisor itself: what clients notice, what is left.

One `draftsmith up` on the tiny pair is shared; each test finds it running and leaves it so.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import poll_until
from deployment import (
    ROLES,
    Clients,
    Deployment,
    alive,
    answer,
    body,
    cli,
    client_of,
    environment,
    family,
    tiny_deployment,
)

MODEL = "tiny-target"
# what a stopped deployment consists of
LEFT = {"draftsmith.db", "logs", "pair", "tenant-salt", "valkey", "vocabularies"}


@pytest.fixture(scope="module")
def shared() -> Iterator[Deployment]:
    with tiny_deployment() as deployment:
        yield deployment


@pytest.fixture
def up(shared: Deployment) -> Deployment:
    shared.start()
    return shared


def _requests() -> Any:
    numbers = count()
    return lambda: body(f"the {next(numbers)}", MODEL)


def test_the_printed_dashboard_answers_and_status_is_readable(up: Deployment) -> None:
    """The dashboard's URL works, and `status` for eyes names every process and what is live."""
    words = up.output.read_text().split()
    url = words[words.index("dashboard") + 1]
    assert httpx.get(f"{url}/health", trust_env=False, timeout=10).status_code == 200
    shown = cli("status", "--data-dir", up.data).stdout
    assert all(role in shown for role in ROLES)
    assert "version 0, generation 1" in shown


@pytest.mark.parametrize("role", ["worker", "watcher", "valkey"])
def test_a_killed_helper_is_restarted_and_no_request_fails(up: Deployment, role: str) -> None:
    """Serving never notices that the worker, the watcher or Valkey died; nothing of the dead one lives on."""
    old = up.pids()[role]
    below = family(old)
    clients = Clients(up.url, _requests())
    with clients.sending():
        clients.wait_more(5)
        os.kill(old, signal.SIGKILL)
        poll_until(lambda: not alive({old}))
        clients.wait_more(5)
        new = up.wait_restarted(role, old)
        clients.wait_more(5)
    assert clients.failures == []
    now = up.status()["roles"][role]
    assert (now["pid"], now["state"]) == (new, "running")
    assert now["restarts"] >= 1
    poll_until(lambda: not alive(below))


def test_records_reach_a_restarted_valkey(up: Deployment) -> None:
    """The engine's log and the watcher come back by themselves: new requests are counted again."""
    old = up.pids()["valkey"]
    os.kill(old, signal.SIGKILL)
    up.wait_restarted("valkey", old)
    with client_of(up.url) as client:

        def connected() -> bool:
            answer(client, body("on", MODEL))
            return bool(client.get("/debug/engine").json()["log_connected"])

        poll_until(connected, 30)
        before = up.status()["acceptance"]["n"]
        for _ in range(5):
            answer(client, body("on", MODEL))
    poll_until(lambda: up.status()["acceptance"]["n"] >= before + 5, 60)


def test_a_killed_api_is_restarted_and_serves_as_before(up: Deployment) -> None:
    """The same seeded request has the same answer from the next API process."""
    ask = body("the user", MODEL, temperature=1.0, seed=5)
    with client_of(up.url) as client:
        before = answer(client, ask)
    old = up.pids()["api"]
    os.kill(old, signal.SIGKILL)
    up.wait_restarted("api", old)

    def ready() -> bool:
        try:
            return httpx.get(f"{up.url}/ready", trust_env=False, timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    poll_until(ready, 60)
    with client_of(up.url) as client:
        assert answer(client, ask) == before


def test_a_killed_engine_is_restarted_and_requests_never_hang(up: Deployment) -> None:
    """Requests of the gap get an answer or a 503 that says when to come back; then all is as before."""
    ask = body("the user", MODEL, temperature=1.0, seed=6)
    old = up.pids()["engine"]
    replies: list[httpx.Response] = []
    with client_of(up.url) as client:
        before = answer(client, ask)
        os.kill(old, signal.SIGKILL)

        def new_engine_answers() -> bool:
            replies.append(client.post("/v1/completions", json=ask))
            return up.pids().get("engine") not in (None, old) and replies[-1].status_code == 200

        poll_until(new_engine_answers, 90)
        assert answer(client, ask) == before
    for reply in replies:
        assert reply.status_code in (200, 503)
        if reply.status_code == 503:
            assert reply.headers["Retry-After"] == "1"
            assert "engine" in reply.json()["error"]["message"]


def test_a_killed_supervisor_leaves_no_role_and_the_next_up_starts(up: Deployment) -> None:
    """Roles end with their supervisor however it dies; its lock, sockets and table block nobody."""
    with client_of(up.url) as client:
        before = answer(client, body("again", MODEL))
    everything = family(up.process.pid)
    assert len(everything) > len(ROLES)
    up.signal(signal.SIGKILL)
    poll_until(lambda: not alive(everything), 30)
    assert {role["state"] for role in up.status()["roles"].values()} == {"stopped"}
    up.start()
    assert set(up.pids()) == set(ROLES)
    with client_of(up.url) as client:
        assert answer(client, body("again", MODEL)) == before
    assert up.status()["generation"] == 1


def test_a_stopped_deployment_consists_of_its_data(up: Deployment) -> None:
    """After SIGTERM the folder holds database, logs and Valkey's file, and neither socket nor half a file."""
    everything = family(up.process.pid)
    assert up.signal(signal.SIGTERM) == 0
    assert alive(everything) == set()
    assert {path.name for path in up.data.iterdir()} == LEFT
    assert up.output.read_text().endswith("stopped\n")
    assert [p for p in up.data.rglob("*") if p.is_socket() or p.suffix in (".lock", ".part", ".tmp")] == []


def test_a_port_in_use_ends_serve_with_one_line(shared: Deployment, tmp_path: Path) -> None:
    """It is found before anything is started: one line, and no folder was made."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = cli(
            "serve", "--port", str(port), "--data-dir", tmp_path / "d", *shared.arguments,
            env=environment() | {"COLUMNS": "60"},
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        f"error: port = {port}: 127.0.0.1:{port} cannot be used: Address already in use; choose another with --port, "
        "or 0 for any free one\n"
    )
    assert not (tmp_path / "d").exists()
