"""The dashboard over real SQLite: what it shows, what it changes, and what it refuses."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from adapter.accounting import Accounting, Window
from adapter.addresses import bind
from adapter.alerting import Alerts
from adapter.facts import ADVICE, DRIFT, PAIR, PAYOFF, WATCHER, Facts
from adapter.jobs import Jobs
from adapter.registry import Registry
from adapter.settings import Settings
from monitors.dashboard.app import HEADERS, create_app

NOW = 1_000_000.0
STATIC = Path(__file__).parents[1] / "monitors/dashboard/static"
SAME = {"Sec-Fetch-Site": "same-origin"}
GATE = {"verdict": "Passed: acceptance +0.094 [+0.071, +0.117] on 96 held-out requests"}


@pytest.fixture
def registry(database: Engine) -> Registry:
    """A base draft, version 1 live, version 2 ready, version 3 rejected with a hostile gate sentence."""
    made = Registry(database, clock=lambda: NOW - 600)
    made.install_base(target_fingerprint="a" * 64, base_fingerprint="b" * 64, actor="engine")
    for state, gate in (("ready", GATE), ("ready", GATE), ("rejected", {"verdict": "<script>alert(1)</script>"})):
        made.publish(
            parent=0, state=state, artifact_sha256="c" * 64, artifact_bytes=2_400_000, trained_on={"requests": 412},
            gate=gate, reason="drift", job_id=None, actor="trainer",
        )  # fmt: skip
    made.promote(1, actor="watcher", automatic=True, reason=GATE["verdict"], evidence=GATE)
    return made


@pytest.fixture
def client(database: Engine, registry: Registry) -> TestClient:
    app = create_app(Settings(), database, clock=lambda: NOW)
    return TestClient(app, base_url="http://127.0.0.1:8080")


def window(at_s: float, version: int | None, accepted: int = 40, segment: str = "chat") -> Window:
    return Window(
        at_s=at_s, seconds=5.0, segment=segment, version=version, requests=2, rounds=50, drafted=150, examined=100,
        accepted=accepted, delivered=90, acceptance_sum=2 * accepted / 100,
        acceptance_sum_squares=2 * (accepted / 100) ** 2, judged_requests=0 if version is None else 2,
    )  # fmt: skip


def fill(database: Engine) -> None:
    """Everything the page can show, firing and open."""
    clock = lambda: NOW - 60  # noqa: E731
    Accounting(database).add([window(NOW - 300 + 5 * number, number % 2) for number in range(50)])
    Accounting(database).add([window(NOW - 30, None, 0)])
    Alerts(database, clock=clock).open("AcceptanceDrift", "chat", "ticket", "acceptance of chat fell", {})
    jobs = Jobs(database, clock=clock)
    job = jobs.request(reason="acceptance of chat fell", requested_by="watcher")
    assert job is not None
    claimed = jobs.claim(job.id, worker="w", lease_s=1000)
    assert claimed is not None
    progress = {"step": 10, "steps": 40, "loss": 2.5, "holdout_acceptance": 0.4, "eta_s": 90.0}
    jobs.heartbeat(job.id, claimed.epoch, lease_s=1000, progress=progress)
    facts = Facts(database, clock=clock)
    facts.put(PAIR, {"target_name": "the-target"})
    facts.put(WATCHER, {"loop": {"phase": "training", "sentence": "training it", "since_s": NOW}, "saved_at_s": NOW})
    segment = {
        "requests": 90, "baseline_requests": 60, "baseline": 0.5, "drifting": True, "evidence": 1.0, "needed": 6.5,
        "since": 40, "recent_mean": 0.4, "skipped": 0,
    }  # fmt: skip
    facts.put(DRIFT, {"shown": {"version": 1, "segments": {"chat": segment}}})


def post(client: TestClient, action: str, **form: Any) -> httpx.Response:
    headers = form.pop("headers", SAME)
    return client.post(f"/actions/{action}", data=form, headers=headers)


def test_the_page_shows_state_and_evidence(client: TestClient, database: Engine) -> None:
    """What is live, who did it, the alert, the job's progress, the gate's sentence and the audit log are on it."""
    fill(database)
    text = client.get("/").text

    for wanted in ("the-target", "AcceptanceDrift", "10 / 40", "Roll back to v0", "2.4 MB"):
        assert wanted in text
    assert "Promoted automatically by <b>watcher</b>" in text
    assert GATE["verdict"] in text
    assert "Nothing needs you" not in text


def test_versions_show_what_they_cost_and_saved(client: TestClient, database: Engine) -> None:
    """Seconds of training stand beside those saved, or beside the reason why these are not known; held is a phase."""
    fill(database)
    account = {"training_s": 61.4, "saved_s": None, "why": "the engine tells no costs"}
    Facts(database).put(PAYOFF, {"1": account})
    Facts(database).put(WATCHER, {"loop": {"phase": "held", "sentence": "gave up", "since_s": NOW}, "saved_at_s": NOW})
    text = client.get("/").text
    assert "61 s of training, savings unknown: the engine tells no costs" in text
    assert 'aria-current="step"' in text
    Facts(database).put(PAYOFF, {"1": account | {"saved_s": 1234.5}})
    assert "61 s of training, 1 234 s of serving saved" in client.get("/").text.replace("\u202f", " ")


def test_advice_shows_settings_as_code_and_nothing_as_markup(client: TestClient, database: Engine) -> None:
    """What stands between backticks is code; a segment's name inside the sentence stays text."""
    advice = {
        "verdict": "do not speculate", "sentence": "Measured 0.91x.", "requests": 40, "signals": [],
        "instead": ["Switch `engine.prefix_cache` on.", "Segment <b>x</b> `<i>` asks."],
    }  # fmt: skip
    Facts(database).put(ADVICE, advice | {"at_s": NOW})
    text = client.get("/").text
    assert "Switch <code>engine.prefix_cache</code> on." in text
    assert "Segment &lt;b&gt;x&lt;/b&gt; <code>&lt;i&gt;</code> asks." in text


def test_an_empty_database_is_a_page_and_not_an_error(database: Engine) -> None:
    """Before anything was served the page says so."""
    with TestClient(create_app(Settings(), database, clock=lambda: NOW), base_url="http://localhost") as client:
        for path in ("/", "/fragments/overview", "/api/overview", "/api/series", "/health", "/metrics"):
            assert 200 == client.get(path).status_code
        assert "Nothing was served from this data folder yet" in client.get("/").text


def test_a_calm_deployment_says_that_nothing_needs_you(client: TestClient, database: Engine) -> None:
    """No alert and a watcher that reports: the strip is the empty state."""
    Facts(database).put(WATCHER, {"loop": {}, "saved_at_s": NOW - 5})
    assert "Nothing needs you" in client.get("/").text
    Facts(database).put(WATCHER, {"loop": {}, "saved_at_s": NOW - 500})
    assert "The watcher stopped reporting" in client.get("/").text


def test_what_others_wrote_is_text_and_never_markup(client: TestClient) -> None:
    """A gate sentence with a script tag is shown, not run."""
    text = client.get("/").text

    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_the_page_loads_nothing_from_elsewhere(client: TestClient, database: Engine) -> None:
    """No address with a scheme in HTML, script of ours or style; a strict policy; nothing inline."""
    fill(database)
    reply = client.get("/")

    assert [] == re.findall(r"(?:https?:)?//[a-z0-9]", reply.text)
    assert [] == re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", reply.text)
    assert "default-src 'self'" in reply.headers["Content-Security-Policy"]
    assert "unsafe" not in reply.headers["Content-Security-Policy"]
    for asset in set(re.findall(r'(?:src|href)="(/static/[^"#]+)', reply.text)):
        assert 200 == client.get(asset).status_code
    for name in ("app.js", "app.css"):
        outside = re.findall(r"https?://(?!www\.w3\.org/2000/svg)\S+", (STATIC / name).read_text())
        assert [] == outside


def test_vendored_files_are_the_listed_ones() -> None:
    """Each file in VENDORED.md has the sha256 that is written beside it."""
    rows = re.findall(r"^\| (\S+) \| npm .*`([0-9a-f]{64})` \|$", (STATIC / "VENDORED.md").read_text(), re.MULTILINE)

    assert 5 == len(rows)
    for name, digest in rows:
        assert digest == hashlib.sha256((STATIC / name).read_bytes()).hexdigest()


def test_roll_back_moves_the_alias_and_writes_who_and_why(client: TestClient, registry: Registry) -> None:
    """One post, one generation, one audit row in the operator's words."""
    reply = post(client, "roll-back", expected_generation=registry.live().generation, reason="looks slow")

    assert 200 == reply.status_code
    assert "v0 is live now" in reply.text
    assert "moved" == reply.headers["HX-Trigger"]
    assert 0 == registry.live().live
    last = registry.audit()[0]
    assert ("roll_back", "dashboard", False, "looks slow") == (last.verb, last.actor, last.automatic, last.reason)


def test_promote_makes_a_ready_version_live(client: TestClient, registry: Registry) -> None:
    """A ready version can be promoted; a rejected one is refused with the reason."""
    generation = registry.live().generation
    assert 200 == post(client, "promote", version=2, expected_generation=generation).status_code
    assert 2 == registry.live().live
    assert "no reason given" == registry.audit()[0].reason

    refused = post(client, "promote", version=3, expected_generation=generation + 1)
    assert 422 == refused.status_code
    assert "only &#39;ready&#39; ones can" in refused.text


def test_a_stale_generation_is_a_conflict_that_says_who(client: TestClient, registry: Registry) -> None:
    """When somebody moved first, nothing moves, the answer is 409 and names them."""
    generation = registry.live().generation
    registry.promote(2, actor="ana", reason="better")
    rows = len(registry.audit())
    reply = post(client, "roll-back", expected_generation=generation)

    assert 409 == reply.status_code
    assert "ana did &#39;promote&#39; to version 2" in reply.text
    assert 2 == registry.live().live
    assert rows == len(registry.audit())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1:8080"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Origin": "null"}, 403),
        ({}, 403),
        ({"Origin": "http://127.0.0.1:8080"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)
def test_only_the_page_itself_may_change_anything(
    client: TestClient, registry: Registry, headers: dict[str, str], status: int
) -> None:
    """A post from another site, or from nowhere, is refused and changes nothing."""
    live = registry.live()
    reply = post(client, "roll-back", expected_generation=live.generation, headers=headers)

    assert status == reply.status_code
    assert (registry.live() == live) == (status == 403)
    assert HEADERS["Content-Security-Policy"] == reply.headers["Content-Security-Policy"]


def test_a_foreign_name_for_this_machine_is_refused(client: TestClient) -> None:
    """On the loopback address only local names are answered, so a rebound name reads nothing."""
    assert 403 == client.get("/", headers={"Host": "evil.example"}).status_code
    assert 200 == client.get("/", headers={"Host": "localhost:8080"}).status_code
    assert 200 == client.get("/", headers={"Host": "[::1]:8080"}).status_code


def test_the_apis_address_does_not_open_the_dashboard(database: Engine) -> None:
    """Listening on every address for the API leaves the dashboard, which asks for no login, on this machine."""
    for host, address, status in (("127.0.0.1", "127.0.0.1", 403), ("0.0.0.0", "0.0.0.0", 200)):
        settings = Settings(
            host="0.0.0.0", dashboard_port=0, **({} if host == "127.0.0.1" else {"dashboard_host": host})
        )
        with bind(settings.dashboard_host, 0, setting="dashboard_port") as listener:
            assert listener.getsockname()[0] == address
        with TestClient(create_app(settings, database, clock=lambda: NOW), base_url="http://localhost") as client:
            assert client.get("/", headers={"Host": "evil.example"}).status_code == status


def test_a_form_without_a_generation_is_refused(client: TestClient, registry: Registry) -> None:
    """There is no change without saying what one looked at."""
    live = registry.live()

    assert 422 == post(client, "roll-back").status_code
    assert 422 == post(client, "promote", version="x", expected_generation=1).status_code
    assert live == registry.live()


def test_overview_and_series_are_json_with_n_and_windows(client: TestClient, database: Engine) -> None:
    """Acceptance, interval, n, tokens per round and the marks of every move, as numbers."""
    fill(database)
    overview = client.get("/api/overview").json()
    series = client.get("/api/series", params={"range": "1h"}).json()

    assert 0.4 == overview["now"]["acceptance"]
    assert 50 == overview["now"]["judged_requests"]
    assert 1.8 == overview["now"]["tokens_per_round"]
    assert 2 == overview["now"]["plain_requests"]
    assert 0.25 == overview["job"]["share"]
    assert "drift" == overview["segments"][0]["state"]
    assert [0, 1] == [line["version"] for line in series["versions"]]
    assert ["promote"] == [mark["verb"] for mark in series["marks"]]
    assert sorted(series["times"]) == series["times"]
    for line in series["versions"]:
        assert len(series["times"]) == len(line["acceptance"]) == len(line["tokens_per_round"])
        assert 50 == sum(number or 0 for number in line["requests"])
    assert 422 == client.get("/api/series", params={"range": "2h"}).status_code


def test_a_previous_version_that_was_quarantined_is_no_way_back(client: TestClient, registry: Registry) -> None:
    """The button names what the registry would really do."""
    registry.promote(2, actor="ana", reason="better")
    assert 1 == client.get("/api/overview").json()["live"]["rollback_to"]
    registry.quarantine(1, actor="ana", reason="bad")
    assert 0 == client.get("/api/overview").json()["live"]["rollback_to"]


def test_monitors_run_without_torch_from_start_to_sigterm(
    tmp_path: Path, valkey_url: str, wait_for: Callable[..., None]
) -> None:
    """`python -m monitors` with torch blocked serves on a free port it writes down, and ends on SIGTERM with 0."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft', 'triton'): sys.modules[name] = None\n"
        "from monitors.__main__ import main\n"
        "sys.exit(main())\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("DRAFTSMITH_")}
    env |= {"DRAFTSMITH_DATA_DIR": str(tmp_path), "DRAFTSMITH_DASHBOARD_PORT": "0", "REDIS_URL": valkey_url}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=log, stdout=log)
    try:

        def answers() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            found = re.search(r"url=(http://\S+)", (tmp_path / "log").read_text())
            if not found:
                return False
            try:
                return httpx.get(found[1] + "/health").status_code == 200
            except httpx.HTTPError:
                return False

        wait_for(answers, 60.0)
        url = re.search(r"url=(http://\S+)", (tmp_path / "log").read_text())[1]  # type: ignore[index]
        metrics = httpx.get(url + "/metrics").text
        assert 'draftsmith_acceptance_requests_total{version="live"}' in metrics
        from adapter.database import open_database

        engine = open_database(f"sqlite:///{tmp_path / 'draftsmith.db'}")
        written = Facts(engine).get(WATCHER)
        engine.dispose()
        assert written is not None
        assert url == written["dashboard_url"]
        process.send_signal(signal.SIGTERM)
        assert 0 == process.wait(20), (tmp_path / "log").read_text()
        assert "clean=true" in (tmp_path / "log").read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_a_taken_port_is_one_sentence(tmp_path: Path, valkey_url: str) -> None:
    """A port that is in use ends the start with the setting's name, its value and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        env = {name: value for name, value in os.environ.items() if not name.startswith("DRAFTSMITH_")}
        env |= {"DRAFTSMITH_DATA_DIR": str(tmp_path), "DRAFTSMITH_DASHBOARD_PORT": port, "REDIS_URL": valkey_url}
        ended = subprocess.run(
            [sys.executable, "-m", "monitors"], env=env, capture_output=True, text=True, timeout=60,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip

    assert 2 == ended.returncode
    assert f"dashboard_port = {port}" in ended.stderr
    assert "choose another with --dashboard-port" in ended.stderr
