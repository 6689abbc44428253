"""The engine's end of the socket, in this process: what waits, what is refused, and what cannot be sent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zmq
from engine_rig import Rig, build_rig, prompts, request

from adapter.contracts import Grammar, Sampling
from adapter.cores import taking
from adapter.database import migrate, open_database
from adapter.facts import Facts
from serving import ipc
from serving.api.engine_client import EngineClient
from serving.api.errors import ApiError
from serving.engine.engine import Delivery
from serving.engine.server import EngineServer
from serving.engine.threads import Threads


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Wire:
    """An engine behind its socket, one API process that talks to it, and a clock by hand."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self.rig, self.clock = rig, Clock()
        database = open_database(f"sqlite:///{folder / 'facts.db'}")
        migrate(database)
        self.server = EngineServer(
            replace(rig.built, threads=Threads(folder, clock=self.clock)), folder, max_waiting=4, max_model_len=192,
            facts=Facts(database), clock=self.clock,
        )  # fmt: skip
        self.context = zmq.Context()
        self.api = self.context.socket(zmq.DEALER)
        self.api.connect(ipc.engine_endpoint(folder))

    def send(self, *messages: ipc.ToEngine) -> None:
        """Send, and let the engine read all of it."""
        for message in messages:
            self.api.send(ipc.encode(message))
        self.server._receive(2000)
        while self.server._socket.poll(50):
            self.server._receive(0)

    def heard(self) -> list[ipc.ToApi]:
        """Everything the engine sent since."""
        found = []
        while self.api.poll(200):
            found.append(ipc.decode_for_api(self.api.recv()))
        return found

    def close(self) -> None:
        self.server._facts.stop()
        for socket, context in ((self.api, self.context), (self.server._socket, self.server._context)):
            socket.close(0)
            context.term()


@pytest.fixture
def wire(folder: Path, tmp_path: Path) -> Iterator[Wire]:
    rig = build_rig(folder, tmp_path / "data")
    wire = Wire(rig, tmp_path)
    yield wire
    wire.close()
    rig.built.publisher.close()


def _submit(name: str, grammar: Grammar | None = None) -> ipc.Submit:
    return ipc.Submit(
        request_id=name, token_ids=prompts(100)[0], max_tokens=8, sampling=Sampling(temperature=0.0), end_tokens=[],
        segment="test", gamma=None, grammar=grammar,
    )  # fmt: skip


def test_a_burst_is_admitted_over_several_steps(wire, monkeypatch):
    """Where building a request takes 15 ms, a step admits two of six while others run, in order, and loses none."""
    build = wire.server._admission.to_sequence

    def slowly(message: ipc.Submit, now_s: float):
        wire.clock.now += 0.015
        return build(message, now_s)

    monkeypatch.setattr(wire.server._admission, "to_sequence", slowly)
    wire.rig.engine.submit(request("running", prompts(100)[1], 100))
    wire.send(*(_submit(str(i)) for i in range(6)))
    seen = []
    for _ in range(3):
        wire.server._admit()
        seen.append(sorted(wire.rig.engine._requests.keys() - {"running"}))
    assert seen == [["0", "1"], ["0", "1", "2", "3"], ["0", "1", "2", "3", "4", "5"]]
    assert not wire.server._arrived


def test_an_end_overtakes_what_waits_to_be_admitted(wire):
    """A request whose client left before it was admitted is never built, and the running one ends at once."""
    wire.send(_submit("runs"))
    wire.server._admit()
    wire.send(_submit("left"), _submit("stays"))
    wire.send(
        ipc.End(request_id="left", reason="cancelled", delivered_tokens=0),
        ipc.End(request_id="runs", reason="cancelled", delivered_tokens=0),
    )
    assert not wire.rig.engine.busy
    wire.server._admit()
    assert set(wire.rig.engine._requests) == {"stays"}


def test_too_many_are_refused_before_they_are_built(wire):
    """Those not admitted yet count as waiting: of 14 requests for 8 places and 4 that wait, two are refused."""
    wire.send(*(_submit(str(i)) for i in range(14)))
    refused = [message for message in wire.heard() if isinstance(message, ipc.Refused)]
    assert [(message.request_id, message.status) for message in refused] == [("12", 429), ("13", 429)]


def test_a_request_nobody_can_hear_ends(wire):
    """When the API process is gone its requests end with the first tokens that cannot be sent, and are counted."""
    wire.send(_submit("a"), _submit("b"))
    wire.server._admit()
    for name in ("a", "b"):
        wire.server._owners[name] = b"gone"
    deliveries = []
    while not deliveries:
        deliveries = wire.rig.engine.step()
    for delivery in deliveries:
        wire.server._deliver(delivery)
    assert not wire.rig.engine.busy
    assert not wire.server._owners
    assert wire.server._snapshot().undelivered == 2
    assert wire.server._deaf == {b"gone"}


def test_a_process_that_reads_nothing_loses_its_request_only(wire, monkeypatch):
    """A full queue to one API process ends that request; others go on and the engine does not stop."""
    wire.send(_submit("deaf"))
    wire.server._admit()
    peer = wire.server._owners["deaf"]
    wire.rig.engine.submit(request("other", prompts(100)[1], 20))

    def full(*args: object) -> None:
        raise zmq.Again

    message = ipc.Tokens(request_id="deaf", token_ids=[1], finish_reason=None)
    with monkeypatch.context() as patch:
        patch.setattr(wire.server, "_socket", type("Full", (), {"send_multipart": full})())
        wire.server._send(peer, message)
    assert set(wire.rig.engine._requests) == {"other"}
    assert wire.rig.engine.stats.undelivered == 1


class Held:
    """Steps that begin only when the test lets them, of an engine served by a thread of its own."""

    def __init__(self, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits, self.free = threading.Event(), threading.Event()
        self._wire, self._step = wire, wire.rig.engine.step
        self._thread = threading.Thread(target=wire.server.run)
        monkeypatch.setattr(wire.rig.engine, "step", self._one)
        self._thread.start()

    def _one(self) -> list[Delivery]:
        self._wire.clock.now += 1.0
        if self._wire.rig.engine.busy:
            self.waits.set()
            self.free.wait()
        return self._step()

    def end(self) -> None:
        """Let the thread leave after its step, which closes the socket as the end of the process would."""
        self._wire.server.stop()
        self.free.set()

    def close(self) -> None:
        self.end()
        self._thread.join()


async def _until(condition: Callable[[], object]) -> None:
    """Let the loop go on until `condition` holds; the test's own time limit ends it."""
    while not condition():
        await asyncio.sleep(0.001)


def test_a_step_of_minutes_keeps_its_request_and_an_end_loses_it_at_once(wire, tmp_path, monkeypatch):
    """Two minutes without a word pass within one step; without any time passing, a closed socket ends what ran."""
    clock, pace = Clock(), [0.0]

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(0.001)
        clock.now += pace[0] * seconds

    async def ask(client: EngineClient, name: str) -> int:
        return sum([len(tokens.token_ids) async for tokens in client.generate(_submit(name))])

    async def go() -> None:
        client = EngineClient(tmp_path, clock=clock, sleep=sleep)
        await client.start()
        try:
            await _until(lambda: client.alive)
            asked = asyncio.create_task(ask(client, "long"))
            await _until(held.waits.is_set)
            pace[0] = 1.0
            await _until(lambda: clock.now > 120.0)
            pace[0] = 0.0
            assert client.alive
            held.free.set()
            assert await asked == 8
            held.free.clear()
            held.waits.clear()
            asked = asyncio.create_task(ask(client, "lost"))
            await _until(held.waits.is_set)
            held.end()
            with pytest.raises(ApiError, match="went away") as caught:
                await asked
            assert (caught.value.code, client.alive) == ("engine_lost", False)
        finally:
            await client.stop()

    held = Held(wire, monkeypatch)
    try:
        asyncio.run(asyncio.wait_for(go(), 60))
    finally:
        held.close()


def test_the_loop_leaves_a_training_its_cores(folder, tmp_path, monkeypatch):
    """The thread that decodes computes with fewer threads while a training says what it uses, and no longer."""
    before = torch.get_num_threads()
    rig = build_rig(folder, tmp_path / "data")
    torch.set_num_threads(2)
    wire = Wire(rig, tmp_path)
    seen = []

    def step() -> list[Delivery]:
        seen.append(torch.get_num_threads())
        wire.clock.now += 1.0
        if len(seen) == 2:
            training.close()
        if len(seen) == 3:
            wire.server.stop()
        return []

    monkeypatch.setattr(rig.engine, "step", step)
    with ExitStack() as training:
        training.enter_context(taking(tmp_path, 1000))
        wire.server.run()
    assert seen == [1, 1, 2]
    torch.set_num_threads(before)
    wire.close()
    rig.built.publisher.close()
