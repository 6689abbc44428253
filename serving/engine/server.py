"""The engine process: take requests off the socket, step, send tokens back.

One thread does it all, so that nothing but the decoding loop ever touches the caches.  While
requests run the socket is only polled; while none run the loop sleeps on it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec
import structlog
import zmq

from adapter.facts import ENGINE, SWAPS, Facts
from adapter.turns import Lender
from serving import ipc
from serving.engine.admission import Admission, Refusal
from serving.engine.build import Built
from serving.engine.engine import Delivery
from serving.engine.facts_writer import FactsWriter
from serving.engine.sequence import Sequence
from serving.snapshot import Snapshot

log = structlog.get_logger(__name__)

_LOAD_EVERY_S = 5.0
_IDLE_WAIT_MS = 50  # also how soon an idle engine notices a new draft version
_ADMIT_S = 0.02  # a step while others run; compiling a grammar may take several times as long
_LOST = (zmq.EAGAIN, zmq.EHOSTUNREACH)


class EngineServer:
    """Serve one engine to API processes.

    Args:
        max_model_len: tokens one request may hold, prompt and answer together.
        lender: tells a training when it may compute; None never does.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        built: Built,
        run_dir: Path,
        *,
        max_waiting: int,
        max_model_len: int,
        facts: Facts,
        lender: Lender | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = built.engine
        self._built = built
        self._max_waiting = max_waiting
        self._admission = Admission(built, max_model_len)
        self._facts = FactsWriter(facts)
        self._lender = lender
        self._last_load_s = float("-inf")
        self._clock = clock
        self._engine_id = uuid.uuid4().hex[:8]
        self._owners: dict[str, bytes] = {}
        self._arrived: dict[str, tuple[bytes, ipc.Submit, float]] = {}  # read off the socket, not admitted yet
        self._deaf: set[bytes] = set()
        self._peers: dict[str, bytes] = {}
        self._last_snapshot_s = 0.0
        self._last_version = -1
        self._swaps_written = 0
        self._stopping = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.SNDHWM, 100_000)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # say what cannot be sent instead of dropping it
        self._socket.setsockopt(zmq.LINGER, 200)
        path = run_dir / ipc.SOCKET_NAME
        path.unlink(missing_ok=True)
        self._socket.bind(ipc.engine_endpoint(run_dir))

    def stop(self) -> None:
        """Leave `run` after the step in progress.  Safe to call from a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Serve until `stop`."""
        try:
            while not self._stopping:
                self._receive(0 if self._lend() else _IDLE_WAIT_MS)
                self._lend()  # what arrived goes first
                self._admit()
                self._built.threads.follow()
                for delivery in self.engine.step():
                    self._deliver(delivery)
                self._send_snapshot()
        finally:
            self._facts.stop()
            if self._lender is not None:
                self._lender.close()
            self._socket.close()
            self._context.term()

    def _lend(self) -> bool:
        """Let a training on this machine compute while nothing is served; say whether something is."""
        busy = self.engine.busy or bool(self._arrived)
        if self._lender is not None:
            self._lender.follow(busy)
        return busy

    # -- requests in -------------------------------------------------------------------------

    def _receive(self, wait_ms: int) -> None:
        while self._socket.poll(wait_ms):
            peer, data = self._socket.recv_multipart()
            wait_ms = 0
            try:
                message = ipc.decode_for_engine(data)
            except msgspec.MsgspecError as error:
                log.warning("message_unreadable", error=str(error))
                continue
            if isinstance(message, ipc.Submit):
                self._queue(peer, message)
            elif isinstance(message, ipc.End):
                if self._arrived.pop(message.request_id, None) is not None:
                    self.engine.stats.never_admitted(message.reason)
                self._owners.pop(message.request_id, None)
                ended = self.engine.end(message.request_id, message.reason, message.delivered_tokens)
                if ended is not None:  # whoever found a stop string still wants to know what the answer cost
                    last = ipc.Tokens(
                        request_id=message.request_id, token_ids=[], finish_reason=message.reason,
                        summary=_summary(ended),
                    )  # fmt: skip
                    self._send(peer, last)
            else:
                self._greet(peer, message.name)

    def _queue(self, peer: bytes, message: ipc.Submit) -> None:
        """Keep a request for `_admit`, or refuse it where too many wait already."""
        scheduler = self.engine.scheduler  # a burst arrives between two steps, before anyone could join
        if len(scheduler.waiting) + len(self._arrived) >= self._max_waiting + scheduler.free_places:
            text = f"the server is busy: {self._max_waiting} requests wait already; try again later"
            self._refuse(peer, message, Refusal(429, text))
            return
        self._arrived[message.request_id] = (peer, message, self._clock())

    def _admit(self) -> None:
        """Admit what arrived, in order: at least one request, and no more than the running ones can wait for."""
        begin = self._clock()
        while self._arrived:
            request_id = next(iter(self._arrived))
            peer, message, arrived_s = self._arrived.pop(request_id)
            try:
                request = self._admission.to_sequence(message, arrived_s)
            except Refusal as refusal:
                self._refuse(peer, message, refusal)
            else:
                self._owners[request_id] = peer
                self.engine.submit(request)
            if self.engine.busy and self._clock() - begin >= _ADMIT_S:
                break

    def _refuse(self, peer: bytes, message: ipc.Submit, refusal: Refusal) -> None:
        answer = ipc.Refused(
            request_id=message.request_id, status=refusal.status, message=str(refusal), param=refusal.param
        )
        self._send(peer, answer)

    def _greet(self, peer: bytes, name: str) -> None:
        """Adopt an API process; what a dead predecessor of the same name had running is ended."""
        before = self._peers.get(name)
        self._peers[name] = peer
        if before != peer:
            self._arrived = {key: item for key, item in self._arrived.items() if item[0] != before}
        for request_id, owner in list(self._owners.items()):
            if owner == before and before != peer:
                self._owners.pop(request_id)
                self.engine.end(request_id, "cancelled")
        self._last_snapshot_s = 0.0

    # -- tokens out --------------------------------------------------------------------------

    def _deliver(self, delivery: Delivery) -> None:
        peer = self._owners.get(delivery.request_id)
        if delivery.finish_reason is not None:
            self._owners.pop(delivery.request_id, None)
        if peer is not None:
            self._send(
                peer,
                ipc.Tokens(
                    request_id=delivery.request_id,
                    token_ids=delivery.token_ids,
                    finish_reason=delivery.finish_reason,
                    logprobs=delivery.logprobs,
                    summary=_summary(delivery.sequence) if delivery.finish_reason else None,
                ),
            )

    def _send(self, peer: bytes, message: ipc.ToApi) -> None:
        """Send without waiting; the request of an API process that is gone, or that reads nothing, ends."""
        try:
            self._socket.send_multipart([peer, ipc.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in _LOST:
                raise
            self._undelivered(peer, message, error)

    def _undelivered(self, peer: bytes, message: ipc.ToApi, error: zmq.ZMQError) -> None:
        if peer not in self._deaf:
            self._deaf.add(peer)
            if error.errno == zmq.EHOSTUNREACH:  # it ended, as it does before the engine when all are stopped
                log.info("api_is_gone", message=type(message).__name__)
            else:
                log.warning("api_does_not_read", message=type(message).__name__, error=str(error))
        if isinstance(message, ipc.Tokens):
            self.engine.stats.undelivered += 1
            self._owners.pop(message.request_id, None)
            self.engine.end(message.request_id, "cancelled")

    def _send_snapshot(self) -> None:
        now = self._clock()
        if now - self._last_snapshot_s < ipc.SNAPSHOT_EVERY_S and self.engine.version == self._last_version:
            return
        self._last_version = self.engine.version
        self._last_snapshot_s = now
        message = self._snapshot()
        for peer in self._peers.values():
            self._send(peer, message)
        self._publish_swaps()
        if now - self._last_load_s >= _LOAD_EVERY_S:
            self._last_load_s = now
            self._facts.offer(ENGINE, msgspec.to_builtins(message))

    def _snapshot(self) -> Snapshot:
        engine, stats, log_stats = self.engine, self.engine.stats, self._built.publisher.stats()
        swap = self._built.hotswap
        scheduler = engine.scheduler
        usable = scheduler.num_blocks - 1
        positions = max(stats.accepted_by_position, default=-1) + 1
        return Snapshot(
            engine_id=self._engine_id, version=engine.version, previous=swap.previous if swap else None,
            generation=swap.generation if swap else 0, running=len(scheduler.running),
            waiting=len(scheduler.waiting), kv_usage=1 - scheduler.free_blocks / usable,
            preempted=scheduler.num_preempted,
            prefix_queries=scheduler.prefix_queries, prefix_hits=scheduler.prefix_hits, steps=stats.steps,
            step_s=stats.step_s, draft_s=stats.draft_s,
            median_step_ms=stats.median_step_ms, median_batch=stats.median_batch, rounds=stats.rounds,
            drafted=stats.drafted, examined=stats.examined, accepted=stats.accepted,
            accepted_by_position=[stats.accepted_by_position[i] for i in range(positions)],
            not_finite=stats.not_finite, draft_not_finite=engine.proposers.draft_not_finite,
            undelivered=stats.undelivered, routed=stats.routed, alternates=list(swap.alternates) if swap else [],
            prompt_tokens=stats.prompt_tokens, generated_tokens=stats.generated_tokens,
            finished_by_reason=dict(stats.finished_by_reason), log_offered=log_stats.offered,
            log_written=log_stats.written, log_dropped=log_stats.dropped, log_connected=log_stats.connected,
            swaps=stats.num_swaps, last_swap_version=swap.last.version if swap and swap.last else None,
            last_swap_pause_ms=swap.last.pause_ms if swap and swap.last else None, **engine.proposers.vocabulary_counts,
            controller={**engine.controller.explain(), **self._routing()},
        )  # fmt: skip

    def _routing(self) -> dict[str, Any]:
        """Say how well each version is believed to fit each segment, where there is a choice."""
        router, swap = self.engine.router, self.engine.hotswap
        if router is None or swap is None or not swap.alternates:
            return {}
        return {"routing": router.explain(swap.version, swap.alternates, swap.gain)}

    def _publish_swaps(self) -> None:
        """Leave the last swaps where the CLI and the dashboard find them."""
        swaps = self.engine.stats.swaps
        if self.engine.stats.num_swaps == self._swaps_written:
            return
        self._swaps_written = self.engine.stats.num_swaps
        rows = [
            {"version": s.version, "replaced": s.replaced, "generation": s.generation, "pause_ms": s.pause_ms,
             "at_s": s.at_s} for s in swaps
        ]  # fmt: skip
        value = {"swaps": rows, "median_step_ms": self.engine.stats.median_step_ms}
        self._facts.offer(SWAPS, value)


def _summary(request: Sequence) -> ipc.Summary:
    return ipc.Summary(
        cached_tokens=request.num_cached_tokens, plain_rounds=request.plain_rounds,
        counts=sum(request.by_version.values(), request.unversioned),
        accepted_by_position=[
            a + b for a, b in zip_longest(request.accepted_by_position, request.unversioned_by_position, fillvalue=0)
        ],
    )  # fmt: skip
