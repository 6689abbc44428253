"""Sends a schedule of arrivals to a live service, open loop, and keeps what came back.

All answers are streamed, so the first token has a time of its own.  Acceptance comes from the metrics that
the service sends with an answer when asked.  Knows HTTP only; called by `bench.shift_arms`.
"""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.shift_schedule import Arrival

MEASURING_GAMMA = 2
_TIMEOUT_S = 300.0


@dataclass(slots=True, kw_only=True)
class Seen:
    """An arrival and what came of it.  Times are seconds since the begin of the scenario, on the client's clock."""

    arrival: Arrival
    started_s: float = 0.0
    first_s: float | None = None
    finished_s: float = 0.0
    tokens: int = 0
    text: int = 0  # CRC-32 of the answer
    rounds: int = 0  # of speculation
    plain_rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    examined: float = 0.0
    error: str | None = None
    _ended: bool = field(default=False, repr=False)

    @property
    def ok(self) -> bool:
        """Whether a whole answer came."""
        return self.error is None and self.tokens > 0

    @property
    def decoding_s(self) -> float | None:
        """Seconds from the first token to the end; None where there is nothing between."""
        return None if self.first_s is None or self.tokens < 2 else self.finished_s - self.first_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """How requests are spelled: for chat models, or as plain completions."""

    model: str
    max_tokens: int
    chat: bool = True
    speculate: bool = True

    @property
    def path(self) -> str:
        """Where requests go."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, arrival: Arrival) -> dict[str, Any]:
        """Return the JSON body of a request."""
        asked: dict[str, Any] = {"prompt": arrival.prompt}
        if self.chat:
            asked = {"messages": [{"role": "user", "content": arrival.prompt}]}
        if not self.speculate:
            asked["speculative"] = {"enabled": False}
        elif arrival.measuring:
            asked["speculative"] = {"gamma": MEASURING_GAMMA}
        return asked | {
            "model": self.model, "temperature": arrival.temperature, "seed": arrival.index,
            "max_tokens": self.max_tokens, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip

    @staticmethod
    def headers(arrival: Arrival) -> dict[str, str]:
        """Return the headers of a request."""
        told = {"x-draftsmith-spec-metrics": "summary", "x-draftsmith-segment": arrival.tenant}
        return told | ({"x-draftsmith-learning": "off"} if arrival.measuring else {})


def examined(metrics: dict[str, Any]) -> float:
    """Return how many drafted tokens were looked at, from `metrics.speculative_decoding` of an answer.

    Exact where every round drafted as many.  At a fixed length only a request's last round may be shorter; which
    of its tokens were examined is not said, so it is taken to be like the others.
    """
    rounds, drafted = metrics["num_spec_steps"], metrics["num_draft_tokens"]
    reached = [rounds, *metrics["num_accepted_tokens_per_pos"]]
    length = MEASURING_GAMMA if drafted > rounds else 1
    whole = 1.0 if not rounds else max(0.0, 1 - (length * rounds - drafted) / rounds)
    return float(reached[0] + whole * sum(reached[1:length]))


class Client:
    """Send arrivals when they are due.

    Args:
        clock: seconds; only differences count.
    """

    def __init__(self, url: str, wire: Wire, clock: Callable[[], float] = time.monotonic) -> None:
        self.wire = wire
        self.seen: list[Seen] = []
        self._http = httpx.AsyncClient(
            base_url=url, timeout=_TIMEOUT_S, trust_env=False, limits=httpx.Limits(max_connections=None)
        )
        self._clock = clock
        self._began = clock()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @property
    def now_s(self) -> float:
        """Seconds since the begin."""
        return self._clock() - self._began

    async def play(self, arrivals: Sequence[Arrival], tell: Callable[[], None] = lambda: None) -> list[Seen]:
        """Send every arrival at its time, whatever became of the others; return when all have ended."""
        self._began = self._clock()
        tasks = []
        for arrival in arrivals:
            await asyncio.sleep(max(0.0, arrival.at_s - self.now_s))
            tasks.append(asyncio.create_task(self.ask(arrival)))
            tell()
        await asyncio.gather(*tasks)
        return self.seen

    async def crowd(self, arrivals: Sequence[Arrival], clients: int, *, least: int, seconds: float) -> list[Seen]:
        """Send arrivals one after another from so many clients, regardless of their times.

        Args:
            least: how many are sent however long it takes; the others only within `seconds`.
        """
        self._began = self._clock()
        waiting = iter(arrivals)

        async def one() -> None:
            for arrival in waiting:
                if arrival.index >= least and self.now_s > seconds:
                    return
                await self.ask(arrival)

        await asyncio.gather(*(one() for _ in range(clients)))
        return self.seen

    async def ask(self, arrival: Arrival) -> Seen:
        """Send one request and wait for its end; never raises for what the server does."""
        seen = Seen(arrival=arrival, started_s=self.now_s)
        self.seen.append(seen)
        try:
            await self._stream(seen)
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            seen.error = f"{type(error).__name__}: {error}"
        seen.finished_s = self.now_s
        if seen.error is None and not (seen._ended and seen.tokens):
            seen.error = "the answer was cut"
        return seen

    async def _stream(self, seen: Seen) -> None:
        arrival, wire = seen.arrival, self.wire
        async with self._http.stream(
            "POST", wire.path, json=wire.body(arrival), headers=wire.headers(arrival)
        ) as response:
            if response.status_code != 200:
                seen.error = f"HTTP {response.status_code}: {(await response.aread()).decode()[:300]}"
                return
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    self._take(line.removeprefix("data: "), seen)

    def _take(self, data: str, seen: Seen) -> None:
        if data == "[DONE]":
            seen._ended = True
            return
        event = json.loads(data)
        if "error" in event:
            seen.error = str(event["error"].get("message", event["error"]))
        for choice in event.get("choices", ()):
            text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
            if text:
                seen.first_s = self.now_s if seen.first_s is None else seen.first_s
                seen.text = zlib.crc32(text.encode(), seen.text)
        if event.get("usage"):
            seen.tokens = event["usage"]["completion_tokens"]
        metrics = (event.get("metrics") or {}).get("speculative_decoding")
        if metrics is not None:
            seen.rounds, seen.plain_rounds = metrics["num_spec_steps"], metrics["num_plain_steps"]
            seen.drafted, seen.accepted = metrics["num_draft_tokens"], metrics["num_accepted_draft_tokens"]
            seen.examined = examined(metrics)
