"""Messages between the API process and the engine process, over a local ZeroMQ socket.

The engine binds a ROUTER at `run_dir/engine.sock`; the API process connects a DEALER.  A deployment has one
API process: a second one that says hello takes the place of the first.  Token ids
travel, never text.  A snapshot goes out a couple of times a second, between two steps.  The connection is
kept by a thread of the socket's own: it outlasts the longest step and ends with the engine's process, and
that is how an API process knows that the engine lives.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from adapter.contracts import Counts, FinishReason, Grammar, Sampling, TokenLogprob
from serving.snapshot import Snapshot

SOCKET_NAME = "engine.sock"
SNAPSHOT_EVERY_S = 0.5
SILENT_AFTER_S = 300.0  # a step of a large target beside a training may take a minute; no step takes this long


def engine_endpoint(run_dir: Path) -> str:
    """ZeroMQ address of the engine of this deployment."""
    return f"ipc://{run_dir / SOCKET_NAME}"


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Start a request."""

    request_id: str
    token_ids: list[int]
    max_tokens: int
    sampling: Sampling
    end_tokens: list[int]
    segment: str
    gamma: int | None
    version: int | str | None = None  # draft version that drafts: a number, "floor", "live" or "previous"
    grammar: Grammar | None = None
    logprobs: int | None = None  # alternatives reported a token; 0 reports the chosen one only
    priority: int = 0  # lower runs first
    tenant: str = ""  # whose request it is, without a name
    learn: bool = True  # whether it may be logged for training
    cache_salt: str = ""  # requests share cached prefixes only with the same salt


class End(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Stop a request: the client left, or a stop string was found after `delivered_tokens`."""

    request_id: str
    reason: FinishReason
    delivered_tokens: int


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An API process connects; requests of its predecessor under the same name are ended."""

    name: str


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What one request's speculation did, and what it found cached."""

    cached_tokens: int
    counts: Counts
    accepted_by_position: list[int]
    plain_rounds: int


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Newly committed tokens of one request, one message a round."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[TokenLogprob] | None = None  # one a token, when asked for
    summary: Summary | None = None  # with the last message


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine cannot take a request."""

    request_id: str
    status: int
    message: str
    param: str | None = None


ToEngine = Submit | End | Hello
ToApi = Tokens | Refused | Snapshot

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_api: msgspec.msgpack.Decoder[ToApi] = msgspec.msgpack.Decoder(ToApi)


def encode(message: ToEngine | ToApi) -> bytes:
    """Write a message."""
    return _encoder.encode(message)


def decode_for_engine(data: bytes) -> ToEngine:
    """Read a message from an API process."""
    return _to_engine.decode(data)


def decode_for_api(data: bytes) -> ToApi:
    """Read a message from the engine."""
    return _to_api.decode(data)
