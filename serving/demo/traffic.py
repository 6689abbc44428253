"""Clients of the served API: a closed loop of them, and what each got back.

Half of the clients stream.  Every reply is kept with its times, so that failures, cut answers and
tokens per second are counted from the client's side.  Knows HTTP only; called by `serving.demo`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

MAX_TOKENS = 48
_AFTER_FAILURE_S = 0.5
_SAMPLED_EVERY = 4  # every fourth request samples at temperature 0.7, the others are greedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One chat request of one user message."""

    prompt: str
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = MAX_TOKENS
    stream: bool = False
    speculate: bool = True
    segment: str | None = None  # None: the server's default, the one whose acceptance is watched

    @property
    def headers(self) -> dict[str, str]:
        """Return the request's own headers."""
        return {} if self.segment is None else {"x-draftsmith-segment": self.segment}

    def body(self, model: str) -> dict[str, Any]:
        """Return the request's JSON body."""
        body: dict[str, Any] = {
            "model": model, "messages": [{"role": "user", "content": self.prompt}], "temperature": self.temperature,
            "top_p": self.top_p, "seed": self.seed, "max_tokens": self.max_tokens,
        }  # fmt: skip
        if not self.speculate:
            body["speculative"] = {"enabled": False}
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body


@dataclass(slots=True, kw_only=True)
class Reply:
    """What came back. Times are epoch seconds; `ended` is whether the answer was closed as it should be."""

    ask: Ask
    started_s: float
    finished_s: float = 0.0
    text: str = ""
    finish_reason: str | None = None
    completion_tokens: int | None = None
    ended: bool = False
    error: str | None = None

    @property
    def failed(self) -> bool:
        """Whether no answer came: a refusal, a broken connection, an error in the stream."""
        return self.error is not None

    @property
    def truncated(self) -> bool:
        """Whether an answer came that is shorter than what was asked for."""
        if self.failed:
            return False
        short = self.finish_reason == "length" and (self.completion_tokens or 0) < self.ask.max_tokens
        return not self.ended or self.finish_reason is None or self.completion_tokens is None or short


class Traffic:
    """Send requests and remember every reply.

    Args:
        base_url: where the API listens.
        clock: epoch seconds.
    """

    def __init__(
        self, base_url: str, model: str, *, timeout_s: float = 120.0, clock: Callable[[], float] = time.time
    ) -> None:
        self.client = httpx.AsyncClient(
            base_url=base_url, timeout=timeout_s, trust_env=False, limits=httpx.Limits(max_connections=32)
        )
        self.replies: list[Reply] = []
        self._model = model
        self._clock = clock
        self._sent = 0

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    async def ask(self, ask: Ask) -> Reply:
        """Send one request and wait for its end; never raises for what the server does."""
        reply = Reply(ask=ask, started_s=self._clock())
        try:
            await (self._stream(reply) if ask.stream else self._whole(reply))
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            reply.error = f"{type(error).__name__}: {error}"
        reply.finished_s = self._clock()
        self.replies.append(reply)
        return reply

    async def ask_all(self, asks: list[Ask], concurrency: int) -> list[Reply]:
        """Send all requests, some at a time; replies come in the order of `asks`."""
        slots = asyncio.Semaphore(concurrency)

        async def one(ask: Ask) -> Reply:
            async with slots:
                return await self.ask(ask)

        return list(await asyncio.gather(*(one(ask) for ask in asks)))

    async def loop(
        self, next_prompt: Callable[[], str], concurrency: int, go_on: Callable[[], bool], *, speculate: bool = True
    ) -> list[Reply]:
        """Keep `concurrency` requests running while `go_on()`; return when all of them have ended."""
        replies: list[Reply] = []

        async def client() -> None:
            while go_on():
                reply = await self.ask(self._vary(next_prompt(), speculate))
                replies.append(reply)
                if reply.failed:
                    await asyncio.sleep(_AFTER_FAILURE_S)

        await asyncio.gather(*(client() for _ in range(concurrency)))
        return replies

    def _vary(self, prompt: str, speculate: bool) -> Ask:
        self._sent += 1
        sampled = self._sent % _SAMPLED_EVERY == 0
        return Ask(
            prompt=prompt, temperature=0.7 if sampled else 0.0, seed=self._sent, stream=self._sent % 2 == 1,
            speculate=speculate,
        )  # fmt: skip

    async def _whole(self, reply: Reply) -> None:
        body = reply.ask.body(self._model)
        response = await self.client.post("/v1/chat/completions", json=body, headers=reply.ask.headers)
        if response.status_code != 200:
            reply.error = f"HTTP {response.status_code}: {response.text[:300]}"
            return
        body = response.json()
        choice = body["choices"][0]
        reply.text, reply.finish_reason = choice["message"]["content"], choice["finish_reason"]
        reply.completion_tokens, reply.ended = body["usage"]["completion_tokens"], True

    async def _stream(self, reply: Reply) -> None:
        body = reply.ask.body(self._model)
        path, headers = "/v1/chat/completions", reply.ask.headers
        async with self.client.stream("POST", path, json=body, headers=headers) as response:
            if response.status_code != 200:
                reply.error = f"HTTP {response.status_code}: {(await response.aread()).decode()[:300]}"
                return
            async for line in response.aiter_lines():
                read_event(line, reply)


def read_event(line: str, reply: Reply) -> None:
    """Take one line of an event stream into a reply.

    Raises:
        ValueError: the line's data is not JSON.
    """
    if not line.startswith("data: "):
        return
    data = line.removeprefix("data: ")
    if data == "[DONE]":
        reply.ended = True
        return
    event = json.loads(data)
    if "error" in event:
        reply.error = str(event["error"].get("message", event["error"]))
    if event.get("usage"):
        reply.completion_tokens = event["usage"]["completion_tokens"]
    for choice in event.get("choices", ()):
        reply.text += choice["delta"].get("content") or ""
        reply.finish_reason = choice["finish_reason"] or reply.finish_reason
