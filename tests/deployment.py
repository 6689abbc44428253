"""A deployment as an operator runs it: `draftsmith up` in a subprocess, its CLI, and clients over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from conftest import poll_until
from processes import short_folder
from tiny_pair import write_pair

CLI = (sys.executable, "-m", "serving.cli")
ROOT = Path(__file__).resolve().parent.parent
ROLES = ("valkey", "engine", "api", "worker", "watcher")
START_S = 90.0
TINY_ENGINE = {
    "max_batch": 8, "max_model_len": 192, "kv_tokens": 2048, "block_tokens": 8, "prefill_tokens": 64, "threads": 1,
    "swap_poll_s": 0.05,
    "controller": "fixed",  # a tiny pair is never worth speculating on, and its drafts shall be judged
}  # fmt: skip


def environment(**sections: dict[str, Any]) -> dict[str, str]:
    """This process's environment without settings of its own, plus whole sections of settings."""
    own = {"REDIS_URL", "DATABASE_URL"}
    keep = {"DRAFTSMITH_CACHE_DIR"}  # a model converted once is enough
    env = {k: v for k, v in os.environ.items() if k in keep or not (k in own or k.startswith("DRAFTSMITH_"))}
    return env | {f"DRAFTSMITH_{name.upper()}": json.dumps(value) for name, value in sections.items()}


def cli(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one command of the CLI to its end."""
    return subprocess.run(
        [*CLI, *map(str, arguments)], env=env or environment(), cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@dataclass
class Deployment:
    """One data folder and the `up` (or `serve`) that runs on it, started when first needed."""

    data: Path
    arguments: list[str]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    command: str = "up"
    process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> Path:
        """What the supervisor printed, all starts in one file."""
        return self.data.with_suffix(".out")

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def env(self) -> dict[str, str]:
        return environment(**({"engine": TINY_ENGINE} | self.sections))

    def launch(self) -> None:
        """Start, and return without waiting for anything."""
        ports = ["--port", "0"] + (["--dashboard-port", "0"] if self.command == "up" else [])
        line = [*CLI, self.command, *ports, "--data-dir", str(self.data), *self.arguments]
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                line, env=self.env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )

    def start(self) -> None:
        """Start if it does not run, and wait until it says that everything answers."""
        if not self.running:
            self.launch()

        def ready() -> bool:
            assert self.running, f"ended with {self.process and self.process.returncode}: {self.output.read_text()}"
            return "Ctrl-C stops everything" in self.output.read_text()

        poll_until(ready, START_S)

    def signal(self, number: signal.Signals, timeout_s: float = 30.0) -> int:
        """Send the supervisor a signal and wait for its end."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def close(self) -> None:
        """Stop it if it runs; nothing may be left after that."""
        if self.running:
            try:
                self.signal(signal.SIGTERM)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise

    # -- what it says ------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """`draftsmith status --json`."""
        done = cli("status", "--json", "--data-dir", self.data)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def roles(self) -> dict[str, dict[str, Any]]:
        """The role table without the price of a process."""
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((self.data / "run" / "roles.json").read_text()))
        return {}

    def pids(self) -> dict[str, int]:
        return {name: role["pid"] for name, role in self.roles().items() if role["pid"]}

    def wait_restarted(self, role: str, old: int) -> int:
        """Wait until a role runs under another pid; return that."""
        poll_until(lambda: self.pids().get(role) not in (None, old), 60)
        return self.pids()[role]

    @property
    def url(self) -> str:
        """Where the API listens now."""
        return str(self.status()["api_url"])

    def log(self, role: str) -> str:
        return (self.data / "logs" / f"{role}.log").read_text(errors="replace")


@contextlib.contextmanager
def tiny_deployment(command: str = "up", **sections: dict[str, Any]) -> Iterator[Deployment]:
    """A deployment of a tiny pair of its own, not yet started; closed at the end."""
    with short_folder() as folder:
        target, draft = write_pair(folder)
        made = Deployment(folder / "data", ["--target", str(target), "--draft", str(draft)], sections, command)
        try:
            yield made
        finally:
            made.close()


def body(prompt: str, model: str, *, max_tokens: int = 24, **fields: Any) -> dict[str, Any]:
    """A greedy completion request; `fields` say otherwise."""
    return {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, **fields}


def client_of(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60.0, trust_env=False)


def answer(client: httpx.Client, request: dict[str, Any]) -> dict[str, Any]:
    """Send a completion and return what must be the same every time: text, counts, reason."""
    response = client.post("/v1/completions", json=request)
    assert response.status_code == 200, response.text
    reply = response.json()
    choice = reply["choices"][0]
    return {"text": choice["text"], "finish_reason": choice["finish_reason"], "usage": reply["usage"]}


class Clients:
    """Threads that keep sending requests; every failure and every cut answer is remembered."""

    def __init__(self, url: str, next_request: Callable[[], dict[str, Any]], count: int = 2) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._url = url
        self._next = next_request
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._loop, daemon=True) for _ in range(count)]

    def _loop(self) -> None:
        with client_of(self._url) as client:
            while not self._stop.is_set():
                with self._lock:
                    request = self._next()
                try:
                    reply = answer(client, request)
                    short = reply["finish_reason"] == "length" and (
                        reply["usage"]["completion_tokens"] < request["max_tokens"]
                    )
                    problem = f"cut: {reply}" if short or reply["finish_reason"] is None else None
                except (httpx.HTTPError, AssertionError, ValueError, KeyError) as error:
                    problem = f"{type(error).__name__}: {error}"
                with self._lock:
                    self.answered += problem is None
                    self.failures += [problem] if problem else []

    @contextlib.contextmanager
    def sending(self) -> Iterator[Clients]:
        """Send while the block runs; all requests in flight end before it is left."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(90)

    def wait_more(self, count: int, timeout_s: float = 60.0) -> None:
        """Wait until so many more requests were answered."""
        goal = self.answered + count
        poll_until(lambda: self.answered >= goal or bool(self.failures), timeout_s)


def alive(pids: set[int]) -> set[int]:
    """Which of these processes exist and are not mere zombies."""
    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.add(pid)
    return found


def family(pid: int) -> set[int]:
    """A process and everything below it."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return {pid} | {child.pid for child in process.children(recursive=True)}
    return set()
