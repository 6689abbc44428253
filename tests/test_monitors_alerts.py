"""Alerts reach a real local webhook, once each, and a dead one holds nobody up."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from sqlalchemy import Engine

from adapter.alerting import Alerts
from monitors.alerts import AlertDesk, Message, Notifier, apprise_url, shown_url

# Apprise imports all its targets when the first URL is added, and one of them a deprecated module.
pytestmark = pytest.mark.filterwarnings("ignore:.*imghdr.*:DeprecationWarning")


class Receiver:
    """An HTTP server that keeps what it was sent and answers the codes it is given, then 200."""

    def __init__(self) -> None:
        self.received: list[tuple[str, dict[str, Any]]] = []
        self.codes: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.received.append((self.path, body))
                self.send_response(receiver.codes.pop(0) if receiver.codes else 200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?token=s3cret"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    yield server
    server.close()


@pytest.fixture
def notifier(receiver: Receiver) -> Iterator[Notifier]:
    made = Notifier([receiver.url], retry_s=0.01)
    yield made
    made.close(5.0)


def test_opening_and_resolving_reach_the_webhook_once(
    database: Engine, receiver: Receiver, notifier: Notifier, wait_for: Callable[..., None]
) -> None:
    """A plain http address gets one JSON POST when an alert opens and one when it resolves, query included."""
    desk = AlertDesk(Alerts(database), notifier.send)
    for _ in range(3):
        desk.open("AcceptanceDrift", "chat", "ticket", "acceptance of chat fell from 0.4 to 0.3")
    wait_for(lambda: len(receiver.received) == 1)
    for _ in range(3):
        desk.resolve("AcceptanceDrift", "chat", "acceptance is back")
    wait_for(lambda: len(receiver.received) == 2)

    (path, opened), (_, resolved) = receiver.received
    assert "/hook?token=s3cret" == path
    assert "AcceptanceDrift (chat)" in opened["title"]
    assert "acceptance of chat fell from 0.4 to 0.3" == opened["message"]
    assert ("warning", "success") == (opened["type"], resolved["type"])
    assert "resolved" in resolved["title"]


def test_a_refused_delivery_is_tried_again(
    receiver: Receiver, notifier: Notifier, wait_for: Callable[..., None]
) -> None:
    """Two server errors cost two retries, then the message arrives."""
    receiver.codes = [500, 503]
    notifier.send(Message("info", "title", "body"))
    wait_for(lambda: notifier.counters.sent == 1)

    assert 3 == len(receiver.received)
    assert 2 == notifier.counters.retried


def test_a_dead_webhook_delays_nobody(receiver: Receiver, wait_for: Callable[..., None]) -> None:
    """With one address dead, sending returns at once, the other receives everything, and the dead one gives up."""
    notifier = Notifier(["http://127.0.0.1:1/dead", receiver.url], retry_s=0.001)
    for number in range(5):
        notifier.send(Message("ticket", f"title {number}", "body"))
    wait_for(lambda: notifier.counters.sent == 5)
    wait_for(lambda: notifier.counters.failed == 5)
    notifier.close(5.0)

    assert {f"title {number}" for number in range(5)} == {body["title"] for _, body in receiver.received}


def test_the_queue_is_bounded_and_drops_are_counted() -> None:
    """What does not fit while a webhook hangs is dropped and counted; `send` never waits."""
    notifier = Notifier(["http://127.0.0.1:1/dead"], retry_s=1000.0, capacity=10)
    for number in range(200):
        notifier.send(Message("ticket", f"title {number}", "body"))
    counters = notifier.counters
    notifier.close(5.0)

    assert counters.dropped >= 100


def test_closing_does_not_wait_for_retries() -> None:
    """A message that waits for its next attempt does not hold up the end of the process."""
    notifier = Notifier(["http://127.0.0.1:1/dead"], retry_s=1000.0)
    notifier.send(Message("ticket", "title", "body"))
    notifier.close(10.0)

    assert not notifier._thread.is_alive()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://host:8080/a/b", "json://host:8080/a/b"),
        ("https://host", "jsons://host/"),
        ("https://user:pw@host/x?a=1&b=", "jsons://user:pw@host/x?-a=1&-b="),
        ("slack://token/a/b", "slack://token/a/b"),
    ],
)
def test_plain_addresses_become_json_posts(given: str, expected: str) -> None:
    """http and https map to Apprise's JSON targets, arguments kept; other URLs are Apprise's own."""
    assert expected == apprise_url(given)


def test_secrets_of_an_address_are_not_shown() -> None:
    """Only scheme and host of a webhook address may be logged."""
    assert "https://hooks.example" == shown_url("https://user:pw@hooks.example/services/T0/B0/secret?token=x")


def test_an_unusable_address_is_left_out(receiver: Receiver, wait_for: Callable[..., None]) -> None:
    """A URL that Apprise does not know is reported and skipped; the others work."""
    notifier = Notifier(["nonsense", receiver.url])
    notifier.send(Message("page", "title", "body"))
    wait_for(lambda: notifier.counters.sent == 1)
    notifier.close(5.0)

    assert "failure" == receiver.received[0][1]["type"]
