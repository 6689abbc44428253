"""Two hundred streams at once on the tiny pair, through real processes: all end, none starves, nothing leaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from processes import Processes, serving_tiny

from adapter.sections import LogSettings
from bench.load import counted

STREAMS = 200
N = 24
MODEL = "tiny-target"
_GROWTH = 24 << 20  # bytes: 60 kB a stream, as kept sockets and buffers are; test_serving_hazards finds smaller things


@pytest.fixture(scope="module")
def service() -> Iterator[Processes]:
    with serving_tiny(
        engine={"max_batch": 8, "max_waiting": 256, "past_tokens": 2000},
        log=LogSettings(queue_entries=4, timeout_s=0.2, retry_s=0.1),
    ) as service:  # fmt: skip
        yield service


async def _stream(client: httpx.AsyncClient, number: int, leave_after: int | None) -> tuple[int, str | None, int]:
    """Read one stream; return (status, finish reason, completion tokens), or leave after some events."""
    body: dict[str, Any] = {
        "model": MODEL, "prompt": f"the user {number % 17}", "max_tokens": N, "temperature": 1.0, "seed": number,
        "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    reason, tokens, events = None, 0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            reason = next((c["finish_reason"] for c in event["choices"] if c["finish_reason"]), reason)
            tokens = event["usage"]["completion_tokens"] if event.get("usage") else tokens
            events += 1
            if leave_after is not None and events >= leave_after:
                break
        return response.status_code, reason, tokens


async def _wave(url: str, leaving: bool) -> list[tuple[int, str | None, int]]:
    limits = httpx.Limits(max_connections=STREAMS, max_keepalive_connections=STREAMS)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        jobs = [_stream(client, i, 1 + i % 3 if leaving and i % 2 else None) for i in range(STREAMS)]
        return await asyncio.gather(*jobs)


def _memory(service: Processes) -> int:
    return sum(psutil.Process(p.pid).memory_info().rss for p in (service.engine, service.api) if p is not None)


def test_two_hundred_streams_leave_nothing_behind(service, wait_for):
    """Each stream gets all its tokens, and the server counted them; leaving early frees every block and byte."""

    def idle() -> bool:
        return service.idle() and service.debug()["kv_usage"] < 1e-9

    before_any = counted(service.url)
    for leaving in (False, True, True):
        ended = asyncio.run(_wave(service.url, leaving))
        assert {status for status, _, _ in ended} == {200}
        stayed = [item for i, item in enumerate(ended) if not (leaving and i % 2)]
        assert {(reason, tokens) for _, reason, tokens in stayed} == {("length", N)}
        wait_for(idle)
        if not leaving:
            seen = {name: count - before_any[name] for name, count in counted(service.url).items()}
            assert (seen["requests"], seen["output_tokens"]) == (STREAMS, STREAMS * N)
    before = _memory(service)
    for _ in range(2):
        asyncio.run(_wave(service.url, True))
        wait_for(idle)
    assert _memory(service) - before < _GROWTH
