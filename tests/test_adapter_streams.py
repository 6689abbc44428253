"""Streams against a real Valkey that is up, gone, frozen, restarted or emptied."""

from __future__ import annotations

import dataclasses
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from adapter import keys
from adapter.contracts import SCHEMA_VERSION, RequestOutcome, Sampling, SettingsError
from adapter.settings import load_settings
from adapter.streams import BROKEN, Entry, StreamPublisher, StreamReader, connect, wait_until_up
from adapter.wire import outcome_from_wire

WaitFor = Callable[..., None]
QUEUE = 200


def outcome(number: int) -> RequestOutcome:
    return RequestOutcome(
        schema=SCHEMA_VERSION, request_id=f"r{number}", segment="chat", finish_reason="stop", sampling=Sampling(),
        prompt_tokens=3, delivered_tokens=5, plain_rounds=0, by_version=(), accepted_by_position=(),
        queue_s=0.0, first_token_s=0.1, total_s=0.2, finished_at_s=1000.0,
    )  # fmt: skip


def long_record(number: int, size: int) -> RequestOutcome:
    return dataclasses.replace(outcome(number), request_id=f"r{number} " + "x" * size)


@pytest.fixture
def publishers() -> Iterator[Callable[..., StreamPublisher]]:
    """Make publishers with short time-outs that are closed at the end."""
    made: list[StreamPublisher] = []

    def make(url: str, **options: Any) -> StreamPublisher:
        sizes = {"queue_entries": QUEUE, "max_entries": 10_000, "timeout_s": 0.2, "retry_s": 0.02, **options}
        made.append(StreamPublisher(url, **sizes))
        return made[-1]

    yield make
    for publisher in made:
        publisher.close(timeout_s=0.5)


def length(valkey: Any) -> int:
    return int(valkey.client.xlen(keys.OUTCOMES))


def request_ids(valkey: Any) -> list[str]:
    return [outcome_from_wire(fields[keys.PAYLOAD_FIELD]).request_id for _, fields in valkey.client.xrange("s")]


def test_records_arrive_once_and_in_order(valkey: Any, publishers: Any, wait_for: WaitFor) -> None:
    """With Valkey up, what is offered is written once, in order, and counted."""
    publisher = publishers(valkey.url)
    for number in range(100):
        publisher.offer("s", outcome(number))

    wait_for(lambda: publisher.stats().written == 100)

    assert [f"r{number}" for number in range(100)] == request_ids(valkey)
    stats = publisher.stats()
    assert (100, 0, True) == (stats.offered, stats.dropped, stats.connected)


def test_close_writes_what_is_queued(valkey: Any, publishers: Any) -> None:
    """Entries offered right before the end are not lost when Valkey answers."""
    publisher = publishers(valkey.url)
    for number in range(150):
        publisher.offer("s", outcome(number))
    publisher.close(timeout_s=20)
    assert 150 == len(request_ids(valkey))


def test_the_stream_is_bounded(valkey: Any, publishers: Any, wait_for: WaitFor) -> None:
    """A stream never grows far beyond its limit; trimming is by whole nodes, so up to 100 entries more."""
    publisher = publishers(valkey.url, max_entries=50, queue_entries=2000)
    for number in range(1000):
        publisher.offer(keys.OUTCOMES, outcome(number))
    wait_for(lambda: publisher.stats().written == 1000)
    assert length(valkey) <= 50 + 100


def test_long_entries_are_bounded_by_their_bytes(valkey: Any, publishers: Any, wait_for: WaitFor) -> None:
    """A stream of long payloads keeps about `max_bytes` of them, far below the number of entries allowed."""
    publisher = publishers(valkey.url, max_bytes=1_000_000, max_entries=20_000, queue_entries=2000)
    for number in range(600):
        publisher.offer(keys.BLOCKS, long_record(number, 40_000))
    wait_for(lambda: publisher.stats().written == 600)
    held = int(valkey.client.xlen(keys.BLOCKS))
    assert 20 <= held <= 26
    assert valkey.client.memory_usage(keys.BLOCKS, samples=0) < 1_500_000


def test_a_full_server_is_logged_to_again(valkey: Any, publishers: Any, wait_for: WaitFor) -> None:
    """A server at its limit refuses every XADD; room is made among the blocks, and what was queued is written."""
    client = valkey.client
    for _ in range(400):
        client.xadd(keys.BLOCKS, {keys.PAYLOAD_FIELD: b"x" * 50_000})
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", client.info("memory")["used_memory"] - 1_000_000)
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        client.xadd(keys.OUTCOMES, {keys.PAYLOAD_FIELD: b"x"}, maxlen=10)

    publisher = publishers(valkey.url)
    for number in range(100):
        publisher.offer(keys.OUTCOMES, outcome(number))
    wait_for(lambda: publisher.stats().written == 100)

    assert length(valkey) == 100
    assert 100 <= int(client.xlen(keys.BLOCKS)) <= 200
    assert (publisher.stats().dropped, publisher.stats().connected) == (0, True)


def test_a_stream_that_fills_a_small_server_never_stops_for_good(
    valkey: Any, publishers: Any, wait_for: WaitFor
) -> None:
    """With a limit that does not fit the server, blocks go on being written, the newest among them."""
    valkey.client.config_set("maxmemory-policy", "noeviction")
    valkey.client.config_set("maxmemory", valkey.client.info("memory")["used_memory"] + 4_000_000)
    publisher = publishers(valkey.url, max_entries=20_000, queue_entries=2000)
    for number in range(800):
        publisher.offer(keys.BLOCKS, long_record(number, 40_000))
    wait_for(lambda: publisher.stats().written == 800)
    newest = valkey.client.xrevrange(keys.BLOCKS, count=1)[0][1][keys.PAYLOAD_FIELD]
    assert outcome_from_wire(newest).request_id.startswith("r799 ")


def test_without_a_server_offers_are_counted_and_bounded(valkey: Any, publishers: Any, wait_for: WaitFor) -> None:
    """With nothing listening, memory stays bounded, drops are counted, and start-up later delivers the newest."""
    valkey.stop()
    publisher = publishers(valkey.url)
    for number in range(QUEUE + 300):
        publisher.offer("s", outcome(number))
    wait_for(lambda: publisher.stats().dropped >= 300 - 64)
    assert not publisher.stats().connected

    valkey.start()
    wait_for(lambda: publisher.stats().written > 0 and publisher.stats().written + publisher.stats().dropped == 500)

    stored = request_ids(valkey)
    assert f"r{QUEUE + 299}" == stored[-1]
    assert sorted(stored, key=lambda name: int(name[1:])) == stored
    assert len(stored) <= QUEUE
    assert publisher.stats().connected


def test_a_frozen_server_never_blocks_the_caller(valkey: Any, publishers: Any, wait_for: WaitFor) -> None:
    """While Valkey accepts connections and answers nothing, every offer returns and the queue stays bounded."""
    publisher = publishers(valkey.url)
    publisher.offer("s", outcome(0))
    wait_for(lambda: publisher.stats().written == 1)
    valkey.pause()

    done = threading.Event()

    def offer_many() -> None:
        for number in range(1, 5001):
            publisher.offer("s", outcome(number))
        done.set()

    threading.Thread(target=offer_many, daemon=True).start()
    assert done.wait(20), "offer blocked while the server was frozen"
    wait_for(lambda: not publisher.stats().connected)
    assert publisher.stats().dropped >= 5000 - QUEUE - 64

    valkey.resume()
    # A frozen server may have received a batch it never confirmed, so a part may be written twice.
    wait_for(lambda: f"r{5000}" in request_ids(valkey))
    wait_for(lambda: publisher.stats().written + publisher.stats().dropped == 5001)


def test_a_restart_loses_nothing_that_fits_the_queue(valkey: Any, publishers: Any, wait_for: WaitFor) -> None:
    """Entries offered while Valkey restarts are written after it is back."""
    publisher = publishers(valkey.url)
    publisher.offer("s", outcome(0))
    wait_for(lambda: publisher.stats().written == 1)
    valkey.stop()
    for number in range(1, 51):
        publisher.offer("s", outcome(number))
    valkey.start()
    wait_for(lambda: publisher.stats().written >= 51)
    assert {f"r{number}" for number in range(51)} == set(request_ids(valkey))
    assert 0 == publisher.stats().dropped


def test_a_record_that_cannot_be_written_is_dropped_alone(valkey: Any, publishers: Any, wait_for: WaitFor) -> None:
    """One unserialisable record costs itself, not the publisher."""
    publisher = publishers(valkey.url)
    publisher.offer("s", object())
    publisher.offer("s", outcome(1))
    wait_for(lambda: publisher.stats().written == 1)
    assert ["r1"] == request_ids(valkey)
    assert 1 == publisher.stats().dropped


def test_close_returns_although_the_server_is_frozen(valkey: Any, publishers: Any) -> None:
    """Shutting down never waits for a server that does not answer."""
    publisher = publishers(valkey.url)
    valkey.pause()
    publisher.offer("s", outcome(1))
    closer = threading.Thread(target=publisher.close, daemon=True)
    closer.start()
    closer.join(20)
    assert not closer.is_alive()


# -- reading ------------------------------------------------------------------------------------


def add(client: redis.Redis, *payloads: bytes) -> None:
    for payload in payloads:
        client.xadd("s", {keys.PAYLOAD_FIELD: payload})


def payloads(entries: list[Entry]) -> list[bytes]:
    return [entry.payload for entry in entries]


def test_a_group_reads_each_entry_once(valkey_client: redis.Redis) -> None:
    """Entries written before the group existed are read too, and shared among its consumers."""
    add(valkey_client, b"1", b"2", b"3")
    one, two = (StreamReader(valkey_client, "s", "g", name) for name in ("one", "two"))

    first = one.read(2)
    second = two.read(10)

    assert ([b"1", b"2"], [b"3"]) == (payloads(first), payloads(second))
    assert [] == one.read(10)


def test_an_empty_or_missing_stream_reads_as_nothing(valkey_client: redis.Redis) -> None:
    """Reading and claiming before anything was ever written is no error."""
    reader = StreamReader(valkey_client, "s", "g", "one")
    assert [] == reader.claim(0, 10)
    assert [] == reader.read(10)
    assert [] == reader.read(10, block_ms=1)
    reader.ack([])


def test_unacknowledged_entries_are_claimed_by_another(valkey_client: redis.Redis) -> None:
    """What a dead consumer read comes back through `claim`; what it acknowledged does not."""
    add(valkey_client, b"1", b"2")
    dead, heir = (StreamReader(valkey_client, "s", "g", name) for name in ("dead", "heir"))
    entries = dead.read(10)
    dead.ack(entries[:1])

    assert [] == heir.claim(min_idle_ms=600_000, count=10)
    claimed = heir.claim(min_idle_ms=0, count=10)
    assert [b"2"] == payloads(claimed)
    heir.ack(claimed)
    assert [] == heir.claim(min_idle_ms=0, count=10)


def test_trimmed_entries_do_not_trip_a_claim(valkey_client: redis.Redis) -> None:
    """Pending entries that were trimmed away meanwhile are skipped."""
    add(valkey_client, b"1", b"2")
    reader = StreamReader(valkey_client, "s", "g", "one")
    reader.read(10)
    valkey_client.xtrim("s", maxlen=1, approximate=False)
    assert [b"2"] == payloads(reader.claim(min_idle_ms=0, count=10))


def test_a_reader_survives_an_emptied_server(valkey_client: redis.Redis) -> None:
    """After FLUSHALL the group is made again and new entries are read; stale acknowledgements do no harm."""
    add(valkey_client, b"1")
    reader = StreamReader(valkey_client, "s", "g", "one")
    old = reader.read(10)
    valkey_client.flushall()

    reader.ack(old)
    assert [] == reader.read(10)
    add(valkey_client, b"2")
    assert [b"2"] == payloads(reader.read(10))


@pytest.mark.parametrize("destroy", ["flushall", "group"])
def test_a_blocked_reader_survives_the_loss_of_its_group(valkey: Any, wait_for: WaitFor, destroy: str) -> None:
    """A reader that waits inside the server while its stream or group vanishes goes on reading."""
    client, blocking = valkey.client, connect(valkey.url, 30)
    add(client, b"1")
    reader = StreamReader(blocking, "s", "g", "one")
    assert [b"1"] == payloads(reader.read(10))
    found: list[bytes] = []
    failures: list[Exception] = []

    def wait() -> None:
        try:
            while not found:
                found.extend(payloads(reader.read(10, block_ms=5000)))
        except BROKEN as error:
            failures.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    wait_for(lambda: client.info("clients")["blocked_clients"] == 1)
    if destroy == "flushall":
        client.flushall()
    else:
        # At once: a reader that is woken between the two would find the old entry again, and rightly so.
        with client.pipeline(transaction=True) as both:
            both.xgroup_destroy("s", "g").delete("s").execute()
    wait_for(lambda: failures or client.exists("s"))
    add(client, b"2")
    thread.join(30)
    blocking.close()

    assert [] == failures
    assert [b"2"] == found


def test_bury_moves_an_entry_out_of_the_way(valkey_client: redis.Redis) -> None:
    """A buried entry is acknowledged and kept aside with its bytes and the reason."""
    add(valkey_client, b"garbage")
    reader = StreamReader(valkey_client, "s", "g", "one")
    [entry] = reader.read(10)

    reader.bury(entry, keys.BLOCKS_DEAD, "not a VerifiedBlock")

    assert [] == reader.claim(min_idle_ms=0, count=10)
    [(_, fields)] = valkey_client.xrange(keys.BLOCKS_DEAD)
    assert {keys.PAYLOAD_FIELD: b"garbage", b"reason": b"not a VerifiedBlock"} == fields


def test_entries_of_strangers_read_as_empty_payloads(valkey_client: redis.Redis) -> None:
    """An entry without our field arrives empty, so that its reader refuses it by name, not by crash."""
    valkey_client.xadd("s", {"other": "x"})
    assert [b""] == payloads(StreamReader(valkey_client, "s", "g", "one").read(10))


def test_a_client_never_waits_longer_than_told(valkey: Any) -> None:
    """A call to a frozen server ends with an error of the kind everybody catches, and is not retried."""
    client = connect(valkey.url, 0.2)
    assert wait_until_up(client, 5.0)
    valkey.pause()
    with pytest.raises(BROKEN):
        client.ping()
    assert not wait_until_up(client, 0.3)


@pytest.mark.parametrize(
    "url",
    [
        "http://:hunter2@cache", "redis://:hunter2/x@cache", "redis://cache:hunter2", "redis://user:6379#hunter2@cache",
        "redis://:hunter2@ca..che", "redis://:hunter2@cache?socket_timeout=soon", "redis://:hunter2@cache?no_such_option=1",
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_read_is_refused_without_its_password(url: str) -> None:
    """Scheme, port, host, an unencoded character, options: refused with the settings, and nothing of it is said."""
    with pytest.raises(SettingsError, match="REDIS_URL cannot be read") as caught:
        load_settings(redis_url=url)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "url",
    [
        "redis://cache:6379/1",
        "rediss://user:p%23w%2F@[::1]:6380",
        "unix:///run/v.sock?db=2",
        "redis://:%C3%A9@c?socket_timeout=5",
    ],
)
def test_a_url_that_can_be_read_is_taken_though_nobody_answers(url: str) -> None:
    """TCP, TLS, a socket, encoded passwords and options pass, and no server is asked."""
    assert load_settings(redis_url=url).redis == url


def test_a_group_that_cannot_be_made_is_an_error(valkey_client: redis.Redis) -> None:
    """A full server refuses the group; the reader says so instead of trying for ever."""
    valkey_client.config_set("maxmemory-policy", "noeviction")
    valkey_client.config_set("maxmemory", 1)
    reader = StreamReader(valkey_client, "s", "g", "one")
    try:
        with pytest.raises(redis.ResponseError):
            reader.read(1)
    finally:
        valkey_client.config_set("maxmemory", 0)
    assert reader.read(1) == []
