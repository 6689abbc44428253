"""The API's end of the line to the engine process: submit, receive, cancel, notice a restart."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import msgspec
import structlog
import zmq
import zmq.asyncio

from serving import ipc
from serving.api.errors import ApiError
from serving.snapshot import Snapshot

log = structlog.get_logger(__name__)

_HELLO_AFTER_S = 2.0  # say hello again when the engine was silent this long: it may have restarted
_TICK_S = 0.5
_Message = ipc.Tokens | ipc.Refused | ApiError  # an error: nothing more will come


class EngineClient:
    """One connection to the engine, shared by all requests of this process.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, run_dir: Path, name: str = "api", clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._endpoint = ipc.engine_endpoint(run_dir)
        self._queues: dict[str, asyncio.Queue[_Message]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._clock = clock
        self._silence_s = float("inf")  # how long this process listened since the engine was heard
        self._unreadable = False
        self.snapshot: Snapshot | None = None

    async def start(self) -> None:
        """Connect; returns at once, whether or not the engine is there."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.connect(self._endpoint)
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._greet())]

    async def stop(self) -> None:
        """Close the connection."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._socket.close()
        self._context.term()

    @property
    def alive(self) -> bool:
        """Whether the engine was heard of recently."""
        return self._silence_s < ipc.SILENT_AFTER_S

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
                self._hear(message)
            elif queue := self._queues.get(message.request_id):
                queue.put_nowait(message)

    def _complain(self, error: msgspec.MsgspecError) -> None:
        if not self._unreadable:
            log.error("message_unreadable", error=str(error), hint="the engine may be of another version; restart both")
        self._unreadable = True

    def _hear(self, snapshot: Snapshot) -> None:
        before, self.snapshot = self.snapshot, snapshot
        if before is not None and before.engine_id != snapshot.engine_id:
            log.warning("engine_restarted", lost_requests=len(self._queues))
            self._lose_all(_lost())

    def _lose_all(self, error: ApiError) -> None:
        for queue in self._queues.values():
            queue.put_nowait(error)

    async def _greet(self) -> None:
        while True:
            if self._silence_s > _HELLO_AFTER_S:
                self._post(ipc.Hello(name=self._name))
            if self._queues and not self.alive:
                self._lose_all(_lost())
            began_s = self._clock()
            await asyncio.sleep(_TICK_S)
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
