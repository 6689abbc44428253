"""The engine and the API as processes of their own, each started, killed and stopped by the test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
from conftest import poll_until

from adapter.database import migrate, open_database
from adapter.facts import SERVING, Facts
from adapter.settings import Settings, child_environment

START_S = 120.0  # torch is imported first, on a machine that may be busy


class Processes:
    """`python -m serving.engine` and `python -m serving.api`, each started and stopped by the test."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self.database = open_database(settings.database)
        migrate(self.database)
        self.engine: subprocess.Popen[bytes] | None = None
        self.api: subprocess.Popen[bytes] | None = None

    def start_engine(self) -> None:
        self.engine = self._start("serving.engine")

    def start_api(self) -> None:
        before = Facts(self.database).get(SERVING)
        self.api = self._start("serving.api")
        poll_until(lambda: Facts(self.database).get(SERVING) not in (None, before), START_S)

    def start(self) -> None:
        """Start both and wait until a request would be served."""
        self.start_engine()
        self.start_api()
        self.wait_ready()

    def wait_ready(self) -> None:
        poll_until(lambda: self.status("/ready") == 200, START_S)

    def _start(self, module: str) -> subprocess.Popen[bytes]:
        with (self.settings.data_dir / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module], env=child_environment(self.settings), stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip

    def stop(self) -> None:
        for process in (self.api, self.engine):
            if process is not None and process.poll() is None:
                process.terminate()
        for process in (self.api, self.engine):
            if process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                if process.poll() is None:
                    process.kill()
                    process.wait(10)
        self.database.dispose()

    def kill_engine(self) -> None:
        assert self.engine is not None
        self.engine.send_signal(signal.SIGKILL)
        self.engine.wait(10)

    @property
    def url(self) -> str:
        return str((Facts(self.database).get(SERVING) or {})["url"])

    def status(self, path: str) -> int:
        return get(self.url + path)[0]

    def debug(self) -> dict[str, Any]:
        """The engine's counters as the API heard them last."""
        return dict(json.loads(get(f"{self.url}/debug/engine")[1] or "null") or {})

    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        seen = self.debug()
        return bool(seen) and seen["running"] == seen["waiting"] == 0

    def metric(self, name: str) -> float:
        """The sum of one metric over its labels."""
        lines = get(f"{self.url}/metrics")[1].splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    @contextlib.contextmanager
    def client(self, **more: Any) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120, **more) as client:
            yield client


def get(url: str, timeout_s: float = 10.0) -> tuple[int, str]:
    """GET; status 0 where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except (urllib.error.URLError, OSError):
        return 0, ""


def cli(*arguments: str, env: dict[str, str] | None = None, timeout_s: float = 120.0) -> subprocess.CompletedProcess:
    """Run `draftsmith` and wait for it."""
    return subprocess.run(
        [sys.executable, "-m", "serving.cli", *arguments], capture_output=True, text=True, timeout=timeout_s,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **(env or {})}, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def short_folder() -> Path:
    """A folder whose path leaves room for socket names."""
    return Path(tempfile.mkdtemp(prefix="dsd-", dir="/tmp"))
