"""What stands before the routes: keys, body limit, request ids, and leaving in good order.  Plain ASGI, no server."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.api.limits import ApiKeys, BodyLimit, Drain, Draining, RequestIds

KEYS = ("first-secret", "second-secret")


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with how long the body was and which id the request got."""
    request = Request(scope, receive)
    body = await request.body()
    answer = JSONResponse({"bytes": len(body), "id": getattr(request.state, "request_id", None)})
    await answer(scope, receive, send)


def _send(app: ASGIApp, method: str = "POST", path: str = "/v1/completions", **more: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            return await client.request(method, path, **more)

    return asyncio.run(go())


@pytest.mark.parametrize("key", KEYS)
def test_any_of_the_keys_opens(key):
    """Every configured key is good for every route."""
    answer = _send(ApiKeys(_echo, KEYS), headers={"Authorization": f"Bearer {key}"}, content=b"xy")
    assert (answer.status_code, answer.json()["bytes"]) == (200, 2)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer wrong-secret", "Basic first-secret", "first-secret",
               "Bearer first-secret2", "Bearer \xff"],
)  # fmt: skip
def test_without_a_key_nothing_opens_but_probes(header):
    """401 in OpenAI's shape, said before the body is read; health, readiness, metrics and version stay open."""
    app = ApiKeys(_echo, KEYS)
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = _send(app, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/v1/models", "/debug/engine", "/tokenize", "/health/", "/nothing"):
        assert _send(app, "GET", path, headers=headers).status_code == 401
    for path in ("/health", "/ready", "/metrics", "/version"):
        assert _send(app, "GET", path, headers=headers).status_code == 200


def test_no_keys_ask_for_none():
    """A server without keys serves everybody, with whatever key clients insist on sending."""
    assert _send(ApiKeys(_echo, ())).status_code == 200
    assert _send(ApiKeys(_echo, ()), headers={"Authorization": "Bearer x"}).status_code == 200


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_up_to_the_limit_passes_and_no_byte_more(announced):
    """The limit holds for announced and for chunked bodies."""

    def body(size: int) -> Any:
        async def chunks():
            for start in range(0, size, 7):
                yield b"x" * min(7, size - start)

        return b"x" * size if announced else chunks()

    app = BodyLimit(_echo, 100)
    assert _send(app, content=body(100)).json()["bytes"] == 100
    refused = _send(app, content=body(101))
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "body_too_large"
    assert "100 bytes" in refused.json()["error"]["message"]


def test_a_long_body_is_not_read_to_its_end():
    """A refused body is given up where the limit is, whatever its sender still has in mind."""
    given = 0

    async def receive() -> dict[str, Any]:
        nonlocal given
        given += 1
        return {"type": "http.request", "body": b"x" * 60, "more_body": True}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(BodyLimit(_echo, 100)(scope, receive, send))
    assert (given, sent[0]["status"]) == (2, 413)


@pytest.mark.parametrize("given", ["abc-1.2:3_X", "x" * 128])
def test_a_sane_request_id_is_kept(given):
    """The client's id is the request's and comes back."""
    answer = _send(RequestIds(_echo), headers={"X-Request-Id": given})
    assert answer.headers["X-Request-Id"] == answer.json()["id"] == given


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "a\tb", "{}", "ü".encode()])
def test_any_other_request_id_is_replaced(given):
    """Ids that could break a log line are replaced by a fresh one."""
    headers = {} if given is None else {"X-Request-Id": given}
    seen = {_send(RequestIds(_echo), headers=headers).headers["X-Request-Id"] for _ in range(2)}
    assert len(seen) == 2
    assert given not in seen


def test_leaving_waits_for_what_runs_and_turns_the_rest_away():
    """While draining: 503 with Retry-After, probes answered, over when the last request ended."""

    async def story() -> None:
        drain = Drain(60.0, lambda: 0.0)
        gate = asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/v1/completions":
                await gate.wait()
            await _echo(scope, receive, send)

        transport = httpx.ASGITransport(Draining(slow, drain))
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            running = asyncio.create_task(client.post("/v1/completions"))
            while not drain.in_flight:
                await asyncio.sleep(0)
            assert not drain.over
            drain.begin()
            assert drain.draining
            assert not drain.over
            refused = await client.post("/v1/chat/completions")
            assert refused.status_code == 503
            assert refused.headers["Retry-After"]
            assert refused.json()["error"]["code"] == "shutting_down"
            assert (await client.get("/health")).status_code == 200
            gate.set()
            assert (await running).status_code == 200
            assert drain.over

    asyncio.run(story())


def test_leaving_does_not_wait_for_ever():
    """After its patience, or after a second signal, the server goes although something runs."""
    now = [0.0]
    drain = Drain(5.0, lambda: now[0])
    drain.in_flight = 1
    assert not drain.over
    drain.begin()
    now[0] = 4.9
    assert not drain.over
    now[0] = 5.0
    assert drain.over
    hurried = Drain(5.0, lambda: 0.0)
    hurried.in_flight = 1
    hurried.begin()
    hurried.begin()
    assert hurried.over
