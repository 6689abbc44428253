"""What stands before every route: request ids, API keys, the body limit, and leaving in good order.

Plain ASGI middleware, so that streams pass through untouched.  Knows no model and no engine.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version"})  # asked by probes, which have no key
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class RequestIds:
    """Give every request an id, the client's where it is sane, and echo it in every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Choose the id and pass it on in the scope's state."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        sane = _REQUEST_ID.fullmatch(given) is not None
        request_id = given if sane else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, request_id_is_clients=sane)

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, tagged)


def bearer_key(scope: Scope) -> str:
    """Return the key a request carries, or an empty string."""
    kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


class ApiKeys:
    """Let requests in that carry one of the keys; with no keys set, everybody."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or answer 401."""
        if scope["type"] != "http" or not self._digests or scope["path"] in OPEN_PATHS or self._known(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(401, "no valid API key; send one as 'Authorization: Bearer KEY'")
        response = error.response()
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        """Compare with every key, each in constant time."""
        given = _digest(bearer_key(scope))
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


class BodyLimit:
    """Read the body before the route does, and refuse one that is too long without reading on."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on with the body read, or answer 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        size, parts, more = 0, [], True
        too_long = length.isdecimal() and int(length) > self._max_bytes
        while more and not too_long:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            too_long = size > self._max_bytes
        if too_long:
            error = ApiError(413, f"the body is longer than the {self._max_bytes} bytes this server takes")
            response = error.response()
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        await self._app(scope, _replay(b"".join(parts), receive), send)


class Drain:
    """Whether the server is leaving, and how many requests it still has.

    Args:
        patience_s: how long `begin` lets running requests go on.
        clock: monotonic seconds.
    """

    def __init__(self, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._until_s: float | None = None
        self.in_flight = 0

    @property
    def draining(self) -> bool:
        """Whether new requests are turned away."""
        return self._until_s is not None

    def begin(self) -> None:
        """Take no more requests; said twice, wait for none either.  Safe to call from a signal handler."""
        self._until_s = self._clock() + (0.0 if self.draining else self._patience_s)

    @property
    def over(self) -> bool:
        """Whether the server may go: nothing runs any more, or it was waited for long enough."""
        return self._until_s is not None and (self.in_flight == 0 or self._clock() >= self._until_s)


class Draining:
    """Count requests; while the server leaves, turn new ones away with a 503 that says when to come back."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or answer 503."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        if self._drain.draining:
            error = ApiError(503, "the server is shutting down; send the request again", code="shutting_down")
            await error.response()(scope, receive, send)
            return
        self._drain.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.in_flight -= 1


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the whole body once and then listens on."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
