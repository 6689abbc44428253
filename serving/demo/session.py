"""What the stages are made of: load that keeps running, waiting with words, boundaries, and the result.

A boundary is a moment at which every request has ended and the watcher has recorded it; stretches
of time between boundaries never share a request.  Base of `serving.demo.stages.Demo`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from adapter.contracts import FLOOR_VERSION, DraftsmithError
from serving.demo import exactness, measure
from serving.demo.progress import Progress
from serving.demo.prompts import Deck
from serving.demo.service import Service
from serving.demo.traffic import Reply, Traffic

CLIENTS = 4
SETTLE_S = 20.0
LOOK_EVERY_S = 0.25
_ASK_EVERY_S = 0.02
_COLUMNS = 72


class DemoFailed(DraftsmithError):
    """Raised when a stage did not end as it should; the message is one sentence."""


class Session:
    """A service, its clients and the result that grows.

    Args:
        result: what is written as JSON; filled in place.
        clock: epoch seconds, the same clock as the service's.
    """

    def __init__(
        self, service: Service, progress: Progress, result: dict[str, Any], clock: Callable[[], float] = time.time
    ) -> None:
        self.service = service
        self.progress = progress
        self.result = result
        self.exact = exactness.Exactness()
        self.replies: list[Reply] = []
        self.version = FLOOR_VERSION
        self._clock = clock
        self._began_s = clock()
        self._traffic: Traffic | None = None
        self._boundary_s = self._began_s

    @property
    def traffic(self) -> Traffic:
        """The clients; there are none before the service listens."""
        if self._traffic is None:
            raise DemoFailed("the service has not started")
        return self._traffic

    async def _phase(self, name: str, about: str, deck: Deck, requests: int, *, speculate: bool = True) -> list[Reply]:
        """Serve a fixed number of requests; return when all have ended and are recorded."""
        self.progress.begin(name, about)
        sent = 0

        def go_on() -> bool:
            nonlocal sent
            sent += 1
            self._check_alive()
            self.progress.waiting(f"request {min(sent, requests)} of {requests}")
            return sent <= requests

        replies = await self.traffic.loop(deck.next, CLIENTS, go_on, speculate=speculate)
        await self._settle()
        return replies

    @asynccontextmanager
    async def _load(self, deck: Deck, clients: int) -> AsyncIterator[asyncio.Event]:
        """Keep `clients` requests running until the block ends; the event is set once some have ended."""
        running, begun = True, asyncio.Event()

        def next_prompt() -> str:
            if len(self.replies) >= before + clients:
                begun.set()
            return deck.next()

        before = len(self.replies)
        task = asyncio.create_task(self.traffic.loop(next_prompt, clients, lambda: running))
        try:
            yield begun
        finally:
            running = False
            await task

    async def _settle(self) -> None:
        """Wait until the watcher has recorded every request that has ended; then draw the boundary here."""
        ended = sum(not reply.failed for reply in self.replies)
        deadline = self._clock() + SETTLE_S
        while measure.recorded_requests(self.service.accounting, self._began_s) < ended and self._clock() < deadline:
            await asyncio.sleep(LOOK_EVERY_S)
        self._boundary_s = self._clock()

    async def _until(
        self, condition: Callable[[], object], limit_s: float, words: Callable[[], str], failure: str
    ) -> None:
        """Wait until a condition holds, saying what for.

        Raises:
            DemoFailed: it does not hold in time, or the service cannot run.
        """
        deadline = self._clock() + limit_s
        while not condition():
            self._check_alive()
            if self._clock() > deadline:
                raise DemoFailed(f"{failure} within {limit_s:.0f} s; {words()}")
            self.progress.waiting(words())
            await asyncio.sleep(LOOK_EVERY_S)

    async def _serving(self, version: int, limit_s: float) -> None:
        """Wait until the engine itself says that it drafts with `version`."""
        deadline = self._clock() + limit_s
        while True:
            snapshot = await self._snapshot()
            if snapshot is not None and snapshot["version"] == version:
                return
            self._check_alive()
            if self._clock() > deadline:
                raise DemoFailed(
                    f"the engine did not take up version {version} within {limit_s:.0f} s; "
                    f"the loop says: {self.service.loop_sentence()}"
                )
            await asyncio.sleep(_ASK_EVERY_S)

    async def _snapshot(self) -> dict[str, Any] | None:
        try:
            ready = await self.traffic.client.get("/ready")
            if ready.status_code != 200:
                return None
            snapshot: dict[str, Any] | None = (await self.traffic.client.get("/debug/engine")).json()
        except httpx.HTTPError:
            return None
        return snapshot

    def _check_alive(self) -> None:
        if self.service.error is not None:
            raise DemoFailed(self.service.error)

    def _refuse_failures(self) -> None:
        bad = next((reply for reply in self.replies if reply.failed), None)
        if bad is not None:
            raise DemoFailed(f"a request failed, so nothing can be compared: {bad.error}")

    def _swap_of(self, version: int) -> dict[str, Any] | None:
        return next((swap for swap in self.service.swaps if swap["version"] == version), None)

    def _mark(self, name: str) -> None:
        self.result["marks"][name] = round(self._clock() - self._began_s, 2)

    def _keep_speed(self, name: str, value: float | None) -> None:
        self.result["tokens_per_second"][name] = value
        if value is not None:
            self.progress.happened(f"{name.replace('_', ' ')}: {value:.1f} tokens a second with {CLIENTS} clients")

    def _keep_acceptance(self, name: str, since_s: float, until_s: float, version: int) -> None:
        found = measure.acceptance(self.service.accounting, since_s, until_s, version)
        self.result["acceptance"][name] = found
        if found["value"] is None:
            raise DemoFailed(f"the watcher recorded no judged request in the stage '{name}'")
        low, high = found["interval"]
        self.progress.happened(
            f"{name.replace('_', ' ')}: acceptance {found['value']:.3f} [{low:.3f}, {high:.3f}], {found['n']} requests"
        )

    async def _close(self) -> None:
        """Count everything, whatever happened."""
        self.result["exact"] = self.exact.as_dict() if self.exact.prompts else None
        self.result["requests"] = {
            "sent": len(self.replies),
            "failed": sum(reply.failed for reply in self.replies),
            "truncated": sum(reply.truncated for reply in self.replies),
        }
        self.result["swap_pause_ms"] = max((swap["pause_ms"] for swap in self.service.swaps), default=None)
        rows = self.service.accounting.between(self._began_s)
        if rows:
            last = max(row.at_s for row in rows)
            self.result["timeline"] = {
                "seconds": round(last - self._began_s, 2),
                "acceptance": [None if value is None else round(value, 4)
                               for value in measure.series(rows, self._began_s, last, _COLUMNS)],
            }  # fmt: skip
        if self._traffic is None:
            return
        snapshot = await self._snapshot()
        if snapshot is not None:
            self.result["median_step_ms"] = round(snapshot["median_step_ms"], 3)
            self.result["log"] = {"entries": snapshot["log_written"], "dropped": snapshot["log_dropped"]}
        await self._traffic.close()
