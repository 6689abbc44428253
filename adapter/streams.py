"""Redis streams: bounded appends by a background publisher, grouped reads by consumers.

The publisher is the only thing that the decoding loop ever touches here, and it only touches a
bounded queue: a full queue drops the oldest entry and counts it.  Redis may be down, hang or come
back empty at any time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

from adapter import keys
from adapter.contracts import SettingsError, Wire
from adapter.wire import to_wire

log = structlog.get_logger(__name__)

BROKEN = (redis.RedisError, OSError)
_BATCH = 64
_MEAN_OVER = 500  # payloads
_Item = tuple[str, Wire | bytes]  # stream, and a record or what it was encoded to already


def connect(url: str, timeout_s: float) -> redis.Redis:
    """Open a client whose every call ends within about `timeout_s` and never retries by itself."""
    return redis.Redis.from_url(
        url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
    )


def check_url(url: str) -> None:
    """Refuse a URL that `connect`, or its first call, could make nothing of.  Asks no server.

    Raises:
        SettingsError: with neither the URL nor what is wrong with it, as both may show a password.
    """
    try:
        if "#" in url:  # what follows would be dropped: a password with one in it becomes another host and port
            raise ValueError
        (urlsplit(url).hostname or "").encode("idna")
        connect(url, timeout_s=1.0).connection_pool.make_connection()
    except Exception:  # an option that does not exist, or of the wrong type, raises whatever it likes
        raise SettingsError(
            "REDIS_URL cannot be read; expected redis://, rediss:// or unix://, with special characters of a password "
            "percent-encoded"
        ) from None


@dataclass(frozen=True, slots=True)
class PublisherStats:
    """Counters since start: entries offered, written, dropped; and whether Redis answered last."""

    offered: int
    written: int
    dropped: int
    connected: bool


class _MeanSize:
    """The mean of the last sizes, about `_MEAN_OVER` of them."""

    def __init__(self) -> None:
        self._mean = 0.0
        self._count = 0

    def add(self, size: int) -> float:
        """Count one size and return the mean, at least 1."""
        self._count = min(self._count + 1, _MEAN_OVER)
        self._mean += (size - self._mean) / self._count
        return max(1.0, self._mean)


class StreamPublisher:
    """Write records to streams from a thread of its own.

    `offer` never blocks and never raises.  When Redis fails, the batch in hand is kept and tried
    again after `retry_s`; what does not fit into `queue_entries` meanwhile is dropped, oldest first.

    Each stream keeps `max_entries`, or as many as `max_bytes` of payload make at their mean length of late.
    A server that is full all the same refuses even the XADD that would trim, so room is made by XTRIM.
    """

    def __init__(
        self, url: str, *, queue_entries: int, max_entries: int, timeout_s: float, retry_s: float,
        max_bytes: int | None = None,
    ) -> None:  # fmt: skip
        self._url = url
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._sizes: dict[str, _MeanSize] = {}
        self._queue: deque[_Item] = deque(maxlen=queue_entries)
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._offered = self._written = self._dropped = 0
        self._connected = False
        self._thread = threading.Thread(target=self._run, name="stream-publisher", daemon=True)
        self._thread.start()

    def offer(self, stream: str, record: Wire) -> None:
        """Queue a record; serialisation happens on the publisher's thread."""
        with self._lock:
            self._offered += 1
            if len(self._queue) == self._queue.maxlen:
                self._dropped += 1
            self._queue.append((stream, record))
        self._wake.set()

    def stats(self) -> PublisherStats:
        """Return the counters."""
        with self._lock:
            return PublisherStats(self._offered, self._written, self._dropped, self._connected)

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is queued if Redis answers within `timeout_s`, then stop."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        client: redis.Redis | None = None
        while True:
            self._wake.wait(timeout=0.5)
            self._wake.clear()
            while taken := self._take():
                batch = self._encode(taken)
                try:
                    client = client or connect(self._url, self._timeout_s)
                    batch = self._write(client, batch)
                    if not batch:
                        continue
                    self._put_back(batch, "the server is full")
                    self._make_room(client, {stream for stream, _ in batch})
                except BROKEN as error:
                    self._put_back(batch, str(error))
                    client = None
                if self._stop.is_set():
                    return
                self._stop.wait(self._retry_s)
            if self._stop.is_set():
                return

    def _take(self) -> list[_Item]:
        with self._lock:
            return [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]

    def _encode(self, batch: list[_Item]) -> list[tuple[str, bytes]]:
        """Write records to bytes; one that cannot be written is dropped alone."""
        ready = []
        for stream, record in batch:
            try:
                ready.append((stream, record if isinstance(record, bytes) else to_wire(record)))
            except Exception as error:  # whatever a malformed record raises, the publisher must live on
                with self._lock:
                    self._dropped += 1
                log.error("log_record_unwritable", stream=stream, error=repr(error))
        return ready

    def _write(self, client: redis.Redis, batch: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        """Write a batch; return what a full server refused of it."""
        pipe = client.pipeline(transaction=False)
        for stream, payload in batch:
            maxlen = self._entries_of(stream, len(payload))
            pipe.xadd(stream, {keys.PAYLOAD_FIELD: payload}, maxlen=maxlen, approximate=True)
        refused = []
        for item, reply in zip(batch, pipe.execute(raise_on_error=False), strict=True):
            if isinstance(reply, redis.exceptions.OutOfMemoryError):
                refused.append(item)
            elif isinstance(reply, Exception):
                raise reply
        with self._lock:
            self._written += len(batch) - len(refused)
            if refused:
                return refused
            if not self._connected:
                log.info("log_connected", written=self._written, dropped=self._dropped)
            self._connected = True
        return []

    def _entries_of(self, stream: str, size: int) -> int:
        """Count a payload into the stream's mean length; return how many entries the stream may hold."""
        mean = self._sizes.setdefault(stream, _MeanSize()).add(size)
        by_bytes = self._max_entries if self._max_bytes is None else int(self._max_bytes / mean)
        return max(1, min(self._max_entries, by_bytes))

    def _make_room(self, client: redis.Redis, streams: set[str]) -> None:
        """Drop the older half of the blocks, by far the longest entries; of the other streams once none are left."""
        with contextlib.suppress(*BROKEN):
            for stream in (keys.BLOCKS, *sorted(streams - {keys.BLOCKS})):
                held = int(client.xlen(stream))
                if held:
                    client.xtrim(stream, maxlen=held // 2, approximate=False)
                    log.warning("log_server_full", stream=stream, held=held, kept=held // 2)
                    return

    def _put_back(self, batch: list[tuple[str, bytes]], error: str) -> None:
        """Return a failed batch to the front as far as there is room; a part may be written twice."""
        with self._lock:
            room = (self._queue.maxlen or 0) - len(self._queue)
            kept = batch[len(batch) - room :] if room < len(batch) else batch
            self._dropped += len(batch) - len(kept)
            self._queue.extendleft(reversed(kept))
            if self._connected:
                log.warning("log_disconnected", error=error)
            self._connected = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One stream entry: Redis id and payload bytes."""

    entry_id: str
    payload: bytes


class StreamReader:
    """Read a stream through a consumer group; survives a Redis that lost the group.

    Raises redis errors to the caller, who decides whether to wait or to give up.
    """

    def __init__(self, client: redis.Redis, stream: str, group: str, consumer: str) -> None:
        self._client = client
        self._stream = stream
        self._group = group
        self._consumer = consumer

    def read(self, count: int, block_ms: int | None = None) -> list[Entry]:
        """Return new entries for this group; they stay pending until `ack`."""
        try:
            reply = self._read(count, block_ms)
        except redis.ResponseError as error:
            if not _lost(error):
                raise
            self._create_group()
            reply = self._read(count, block_ms)
        return [entry for _, items in _pairs(reply) for entry in _entries(items)]

    def claim(self, min_idle_ms: int, count: int) -> list[Entry]:
        """Take over entries another consumer read and never acknowledged."""
        try:
            reply = self._client.xautoclaim(
                self._stream, self._group, self._consumer, min_idle_time=min_idle_ms, count=count
            )
        except redis.ResponseError as error:
            if not _lost(error):
                raise
            self._create_group()
            return []
        return _entries(reply[1])

    def ack(self, entries: list[Entry]) -> None:
        """Mark entries as done."""
        if entries:
            self._client.xack(self._stream, self._group, *[entry.entry_id for entry in entries])

    def bury(self, entry: Entry, dead_stream: str, reason: str) -> None:
        """Move an entry that cannot be read to a dead-letter stream and acknowledge it."""
        fields: dict[Any, Any] = {keys.PAYLOAD_FIELD: entry.payload, b"reason": reason.encode()[:500]}
        self._client.xadd(dead_stream, fields, maxlen=1000, approximate=True)
        self.ack([entry])

    def _read(self, count: int, block_ms: int | None) -> object:
        return self._client.xreadgroup(self._group, self._consumer, {self._stream: ">"}, count=count, block=block_ms)

    def _create_group(self) -> None:
        try:
            self._client.xgroup_create(self._stream, self._group, id="0", mkstream=True)
        except redis.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):  # another consumer was faster
                raise


def _lost(error: redis.ResponseError) -> bool:
    """Whether the group is gone, or the stream with it, also while the server held the call."""
    return str(error).startswith(("NOGROUP", "UNBLOCKED"))


def _pairs(reply: object) -> list[tuple[bytes, list[object]]]:
    if not reply:
        return []
    return list(reply.items()) if isinstance(reply, dict) else list(reply)  # type: ignore[call-overload, no-any-return]


def _entries(items: object) -> list[Entry]:
    """Open (id, fields) pairs; trimmed entries arrive with no fields and are skipped."""
    found = []
    for item in _flatten(items):
        entry_id, fields = item
        if fields:
            found.append(Entry(entry_id.decode(), fields.get(keys.PAYLOAD_FIELD, b"")))
    return found


def _flatten(items: object) -> Iterator[tuple[bytes, dict[bytes, bytes]]]:
    for item in items or []:  # type: ignore[attr-defined]
        if isinstance(item, list) and item and isinstance(item[0], tuple):
            yield from item
        elif item[0] is not None:
            yield item


def wait_until_up(client: redis.Redis, timeout_s: float, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Ping until Redis answers; False when it did not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(*BROKEN):
            if client.ping():
                return True
        sleep(0.05)
    return False
