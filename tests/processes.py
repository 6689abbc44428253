"""The engine and the API as processes of their own, each started, killed and stopped by the test."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
from conftest import poll_until
from tiny_pair import pair_settings, write_pair

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

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        """POST a JSON body; `more` is httpx's."""
        return httpx.post(f"{self.url}{path}", **({"json": body, "timeout": 120} | more))

    @contextlib.contextmanager
    def stream(self, path: str, body: Any, **more: Any) -> Iterator[httpx.Response]:
        """POST a JSON body and read the answer as it comes; `more` is httpx's."""
        with httpx.stream("POST", f"{self.url}{path}", **({"json": body, "timeout": 120} | more)) as response:
            yield response


@contextlib.contextmanager
def serving_tiny(
    *, redis_url: str | None = None, chat_template: str | None = None, **settings: Any
) -> Iterator[Processes]:
    """Engine and API on a tiny pair of their own, ready for requests; with no `redis_url`, no log is ever reached."""
    with short_folder() as folder:
        target, _ = write_pair(folder)
        if chat_template is not None:
            (target / "chat_template.jinja").write_text(chat_template)
        redis_url = redis_url or f"unix://{folder}/nobody.sock"
        processes = Processes(pair_settings(folder, folder / "data", redis_url=redis_url, port=0, **settings))
        try:
            processes.start()
            yield processes
        finally:
            processes.stop()


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


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for socket names, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="dsd-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
