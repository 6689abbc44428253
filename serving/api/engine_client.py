"""The API's end of the line to the engine process: submit, receive, cancel, notice that it is gone.

The end of the engine's process ends the connection at once.  Silence says little, as the engine speaks only
between two steps: it is an end only when it lasts longer than any step.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import msgspec
import structlog
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from serving import ipc
from serving.api.errors import ApiError
from serving.snapshot import Snapshot

log = structlog.get_logger(__name__)

_TICK_S = 0.5
_Message = ipc.Tokens | ipc.Refused | ApiError  # an error: nothing more will come


class EngineClient:
    """One connection to the engine, shared by all requests of this process.

    Args:
        clock: monotonic seconds.
        sleep: waits so many of them.
    """

    def __init__(
        self, run_dir: Path, name: str = "api", clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:  # fmt: skip
        self._name = name
        self._endpoint = ipc.engine_endpoint(run_dir)
        self._queues: dict[str, asyncio.Queue[_Message]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._clock, self._sleep = clock, sleep
        self._connected = False
        self._silence_s = float("inf")  # how long this process listened since the engine was heard
        self._unreadable = False
        self.snapshot: Snapshot | None = None

    async def start(self) -> None:
        """Connect; returns at once, whether or not the engine is there."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._socket.connect(self._endpoint)
        self._tasks = [asyncio.create_task(work) for work in (self._follow(), self._read(), self._listen())]

    async def stop(self) -> None:
        """Close the connection."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

    @property
    def alive(self) -> bool:
        """Whether the engine is connected, and was heard within the time that the longest step may take."""
        return self._connected and self._silence_s < ipc.SILENT_AFTER_S

    async def generate(self, submit: ipc.Submit) -> AsyncGenerator[ipc.Tokens, None]:
        """Submit a request and yield its tokens, a round at a time.

        Closing the iterator early cancels the request: its slot is free within a round.  After `finish`
        the last message still comes, with the request's summary.

        Raises:
            ApiError: the engine refused the request, or went away.
        """
        if not self.alive:
            raise ApiError(503, "the engine is not ready; try again later", code="engine_unavailable")
        queue: asyncio.Queue[_Message] = asyncio.Queue()
        self._queues[submit.request_id] = queue
        finished, delivered = False, 0
        try:
            await self._socket.send(_encoded(submit))
            while not finished:
                message = await queue.get()
                if isinstance(message, ApiError):
                    raise message
                if isinstance(message, ipc.Refused):
                    finished = True
                    raise ApiError(message.status, message.message, param=message.param)
                finished = message.finish_reason is not None
                delivered += len(message.token_ids)
                yield message
        finally:
            self._queues.pop(submit.request_id, None)
            if not finished:
                self._post(ipc.End(request_id=submit.request_id, reason="cancelled", delivered_tokens=delivered))

    def finish(self, request_id: str, delivered_tokens: int) -> None:
        """Tell the engine that a stop string was found; it answers with the request's last message."""
        self._post(ipc.End(request_id=request_id, reason="stop", delivered_tokens=delivered_tokens))

    def abandon(self) -> None:
        """End every request that still runs, with an error its client can read: the server leaves."""
        self._lose_all(ApiError(503, "the server is shutting down; send it again", code="shutting_down"))

    def _post(self, message: ipc.ToEngine) -> None:
        """Send without waiting, so that a request that is being cancelled still says so."""
        self._socket.send(ipc.encode(message))

    async def _follow(self) -> None:
        """Say hello on each new connection; what was sent over the one before is lost."""
        while True:
            event = (await recv_monitor_message(self._monitor))["event"]
            self._connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self._silence_s = float("inf")
            if self._connected:
                self._lose_all(_lost())
                self._post(ipc.Hello(name=self._name))
            else:
                log.warning("engine_gone", running_requests=len(self._queues))

    async def _read(self) -> None:
        while True:
            data = await self._socket.recv()
            try:
                message = ipc.decode_for_api(data)
            except msgspec.MsgspecError as error:
                self._complain(error)
                continue
            self._silence_s = 0.0
            if isinstance(message, Snapshot):
                self.snapshot = message
            elif queue := self._queues.get(message.request_id):
                queue.put_nowait(message)

    def _complain(self, error: msgspec.MsgspecError) -> None:
        if not self._unreadable:
            log.error("message_unreadable", error=str(error), hint="the engine may be of another version; restart both")
        self._unreadable = True

    def _lose_all(self, error: ApiError) -> None:
        for queue in self._queues.values():
            queue.put_nowait(error)

    async def _listen(self) -> None:
        """Count the silence, and give up what runs once the engine is gone."""
        while True:
            if self._queues and not self.alive:
                self._lose_all(_lost())
            began_s = self._clock()
            await self._sleep(_TICK_S)
            # A busy or stopped process was not listening: what it missed waits to be read and is no silence.
            self._silence_s += min(self._clock() - began_s, 2 * _TICK_S)


def _encoded(submit: ipc.Submit) -> bytes:
    try:
        return ipc.encode(submit)
    except UnicodeEncodeError as error:
        raise ApiError(
            400, f"a text of this request holds a lone surrogate, which is no text: {error.reason}"
        ) from None


def _lost() -> ApiError:
    return ApiError(503, "the engine went away while this request ran; send it again", code="engine_lost")
