"""A training that yields to serving: real processes, real sockets, signals that arrive."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from adapter.sections import DistillSettings, EngineSettings
from adapter.settings import Settings
from adapter.turns import GO, STOP, TURNS_SOCKET, Lender, Turns, takes_turns

Wait = Callable[..., None]


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")


@pytest.fixture
def training() -> Iterator[subprocess.Popen[bytes]]:
    """A process group that computes for ever."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    yield process
    for number in (signal.SIGCONT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    process.wait()


def stopped(process: subprocess.Popen[bytes]) -> bool:
    return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


class Heard:
    """What a training's socket heard; stands where the task listens."""

    def __init__(self, run_dir: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(run_dir / TURNS_SOCKET))
        self.socket.setblocking(False)

    def words(self) -> list[bytes]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self.socket.recv(16))
        return found


@pytest.fixture
def heard(run_dir: Path) -> Iterator[Heard]:
    made = Heard(run_dir)
    yield made
    made.socket.close()


class Clock:
    """Seconds that pass when told to, and while the engine pauses."""

    def __init__(self) -> None:
        self.now, self.paused = 100.0, 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds
        self.paused += seconds


def test_a_training_stands_still_while_the_engine_serves(
    run_dir: Path, training: subprocess.Popen[bytes], wait_for: Wait
) -> None:
    """Stopped with the first request, on its way again after the last, and the time between is told."""
    lender = Lender(run_dir, share=0.0)
    with Turns(run_dir, training.pid) as turns:
        lender.follow(busy=True)
        wait_for(lambda: stopped(training))
        assert turns.waited_s > 0
        lender.follow(busy=False)
        wait_for(lambda: not stopped(training))
        waited = turns.waited_s
        assert turns.waited_s == waited
    lender.close()


def test_an_engine_that_fell_silent_holds_nobody_up(
    run_dir: Path, training: subprocess.Popen[bytes], wait_for: Wait
) -> None:
    """It said stop and ended without another word: the training goes on by itself."""
    lender = Lender(run_dir, share=0.0)
    with Turns(run_dir, training.pid):
        lender.follow(busy=True)
        wait_for(lambda: stopped(training))
        lender.close()
        wait_for(lambda: not stopped(training))


def test_a_training_that_ends_is_let_go_first(run_dir: Path, training: subprocess.Popen[bytes], wait_for: Wait) -> None:
    """A stopped process hears no SIGTERM; leaving the turns continues it, and takes the socket away."""
    lender = Lender(run_dir, share=0.0)
    with Turns(run_dir, training.pid):
        lender.follow(busy=True)
        wait_for(lambda: stopped(training))
    assert not stopped(training)
    assert not (run_dir / TURNS_SOCKET).exists()
    lender.close()


def test_a_group_that_is_gone_is_no_error(run_dir: Path, training: subprocess.Popen[bytes]) -> None:
    """The training died; the engine speaks on, and nothing counts as waiting."""
    os.killpg(training.pid, signal.SIGKILL)
    training.wait()
    lender = Lender(run_dir, share=0.0)
    with Turns(run_dir, training.pid) as turns:
        lender.follow(busy=True)
        lender.follow(busy=False)
        assert turns.waited_s == 0.0
    lender.close()


def test_a_run_folder_that_cannot_hold_a_socket_only_costs_the_turns(
    tmp_path: Path, training: subprocess.Popen[bytes]
) -> None:
    """A path too long for a socket: training and serving go on, without taking turns."""
    long = tmp_path / ("x" * 100) / ("y" * 100)
    lender = Lender(long, share=0.5)
    with Turns(long, training.pid) as turns:
        lender.follow(busy=True)
        assert (turns.waited_s, stopped(training)) == (0.0, False)
    lender.close()


def test_the_engine_says_what_changes_and_repeats_stop(run_dir: Path, heard: Heard) -> None:
    """Once at each change, and again before silence would mean go; nothing at all while it is idle."""
    clock = Clock()
    lender = Lender(run_dir, share=0.0, clock=clock, pause=clock.pause)
    lender.follow(busy=False)
    assert heard.words() == []
    for _ in range(5):
        lender.follow(busy=True)
    assert heard.words() == [STOP]
    for _ in range(20):
        clock.now += 0.1
        lender.follow(busy=True)
    assert 4 <= len(heard.words()) <= 6  # every third of a second
    lender.follow(busy=False)
    lender.follow(busy=False)
    assert heard.words() == [GO]
    assert clock.paused == 0.0
    lender.close()


@pytest.mark.parametrize("share", [0.02, 0.08, 0.5])
def test_of_a_busy_time_the_share_is_lent(run_dir: Path, heard: Heard, share: float) -> None:
    """Over a minute of uninterrupted steps of 5 ms the engine pauses for its share of it, within a tenth of that."""
    clock = Clock()
    lender = Lender(run_dir, share, clock=clock, pause=clock.pause)
    begin = clock.now
    while clock.now - begin < 60:
        lender.follow(busy=True)
        clock.now += 0.005
    assert clock.paused / (clock.now - begin) == pytest.approx(share / (1 + share), rel=0.1)
    lender.close()


def test_short_requests_lend_nothing(run_dir: Path, heard: Heard) -> None:
    """Between them the training has the machine to itself, so no request pays."""
    clock = Clock()
    lender = Lender(run_dir, 0.08, clock=clock, pause=clock.pause)
    for _ in range(100):
        lender.follow(busy=True)
        clock.now += 0.25
        lender.follow(busy=True)
        lender.follow(busy=False)
        clock.now += 0.25
        assert heard.words() == [STOP, GO]
    assert clock.paused == 0.0
    lender.close()


def test_a_training_that_ended_is_forgotten_and_the_next_one_found(run_dir: Path, heard: Heard) -> None:
    """Words to a socket nobody holds are lost without an error, and a new socket hears stop at once."""
    clock = Clock()
    lender = Lender(run_dir, 0.0, clock=clock, pause=clock.pause)
    lender.follow(busy=True)
    heard.socket.close()
    clock.now += 1.0
    lender.follow(busy=True)
    (run_dir / TURNS_SOCKET).unlink()
    clock.now += 1.0
    lender.follow(busy=True)
    second = Heard(run_dir)
    clock.now += 1.0
    lender.follow(busy=True)
    assert second.words() == [STOP]
    second.socket.close()
    lender.close()


@pytest.mark.parametrize(
    ("device", "share", "yields"), [("cpu", 0.08, True), ("cpu", 1.0, False), ("cuda", 0.0, False)]
)
def test_who_takes_turns(device: str, share: float, yields: bool) -> None:
    """On a CPU, unless the training is to keep cores of its own; beside a GPU there is nothing to share."""
    settings = Settings(engine=EngineSettings(device=device), distill=DistillSettings(busy_share=share))
    assert takes_turns(settings) is yields
