"""Keys, limits, clients that reset the connection, and servers that leave in good order, over real processes."""

from __future__ import annotations

import json
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from deployment import alive, tiny_deployment
from processes import Processes, get, serving_tiny

from adapter.sections import ApiSettings, LogSettings

MODEL = "tiny-target"
KEY = "sesame-open"
LONG = 440


@pytest.fixture(scope="module")
def service(_valkey_server) -> Iterator[Processes]:
    """Engine and API with a key, small bodies, and half a minute to leave."""
    _valkey_server.start()
    with serving_tiny(
        redis_url=_valkey_server.url, log=LogSettings(enabled=False),
        engine={"max_batch": 2, "max_waiting": 8, "max_model_len": 500, "kv_tokens": 4096},
        api=ApiSettings(keys=(KEY,), max_body_bytes=4096, drain_s=120.0),
    ) as service:  # fmt: skip
        yield service


def _headers(**more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"} | more


def _body(prompt: str, stream: bool = True) -> dict[str, object]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": LONG, "temperature": 0, "stream": stream,
            "speculative": {"enabled": False}}  # fmt: skip


def _engine(service: Processes) -> dict[str, object]:
    return dict(httpx.get(f"{service.url}/debug/engine", headers=_headers()).json())


def _idle(service: Processes) -> bool:
    seen = _engine(service)
    return seen["running"] == seen["waiting"] == 0


@contextmanager
def _frozen(service: Processes) -> Iterator[None]:
    """Stop the engine for the moment, so that what runs cannot end by itself."""
    assert service.engine is not None
    service.engine.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        service.engine.send_signal(signal.SIGCONT)


def test_only_a_key_opens_the_api(service):
    """The official client raises its authentication error without the key and is served with it."""
    base = f"{service.url}/v1"
    with openai.OpenAI(base_url=base, api_key="wrong-key", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="no valid API key"):
            client.completions.create(model=MODEL, prompt="a", max_tokens=1)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    with openai.OpenAI(base_url=base, api_key=KEY, max_retries=0, timeout=60) as client:
        assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).usage.completion_tokens == 1
    for path in ("/health", "/ready", "/metrics", "/version"):
        assert get(service.url + path)[0] == 200
    assert get(service.url + "/debug/engine")[0] == 401


def test_a_long_body_is_a_413(service):
    """The body limit answers by name, to announced and chunked bodies, and the server serves on."""
    body = json.dumps({"model": MODEL, "prompt": "a" * 5000}).encode()
    for content in (body, iter([body[:100], body[100:]])):
        response = service.post("/v1/completions", content=content, headers=_headers())
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert "4096" in response.json()["error"]["message"]
    assert get(f"{service.url}/ready")[0] == 200


@pytest.mark.parametrize(("stream", "read"), [(True, True), (True, False), (False, False)])
def test_serving_a4_a_reset_connection_frees_its_slot(service, endless, wait_for, stream, read):
    """RST mid-stream, before the first byte, and while a whole answer is awaited: the engine drops the request (A4)."""
    before = dict(_engine(service)["finished_by_reason"]).get("cancelled", 0)
    payload = json.dumps(_body(endless, stream)).encode()
    at = urlsplit(service.url)
    with socket.create_connection((at.hostname, at.port), timeout=60) as raw:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        if read:
            raw.sendall(head.encode() + payload)
            assert raw.recv(64).startswith(b"HTTP/1.1 200")
        with _frozen(service):
            if not read:
                raw.sendall(head.encode() + payload)
                assert [get(f"{service.url}/health")[0] for _ in range(5)] == [200] * 5  # the request is read before
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.close()
    wait_for(lambda: dict(_engine(service)["finished_by_reason"]).get("cancelled", 0) == before + 1)
    wait_for(lambda: _idle(service))


def test_sigterm_lets_answers_end(service, endless, wait_for):
    """While draining: not ready, new requests get a 503 with Retry-After, the running stream ends well, then exit 0."""
    texts: list[str] = []
    started, api = threading.Event(), service.api
    assert api is not None

    def stream() -> None:
        with service.stream("/v1/completions", _body(endless), headers=_headers()) as response:
            lines = []
            for line in response.iter_lines():
                lines.append(line)
                started.set()
        texts.append("\n".join(lines))

    url = service.url
    thread = threading.Thread(target=stream)
    thread.start()
    assert started.wait(60)
    with _frozen(service):
        api.send_signal(signal.SIGTERM)
        wait_for(lambda: get(f"{url}/ready")[0] == 503)
        refused = httpx.post(f"{url}/v1/completions", json=_body("a"), headers=_headers())
        assert refused.status_code == 503
        assert refused.headers["Retry-After"]
        assert refused.json()["error"]["code"] == "shutting_down"
        assert get(f"{url}/health")[0] == 200
    thread.join(120)
    assert texts[0].rstrip().endswith("data: [DONE]")
    assert '"finish_reason":"length"' in texts[0]
    assert api.wait(30) == 0
    service.start_api()
    service.wait_ready()


def test_a_second_signal_ends_them_in_words(service, endless, wait_for):
    """Told twice, the server ends what runs with an error event and leaves; the engine's slot is free."""
    api = service.api
    assert api is not None
    with service.stream("/v1/completions", _body(endless), headers=_headers(), timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        with _frozen(service):
            api.send_signal(signal.SIGTERM)
            wait_for(lambda: get(f"{service.url}/ready")[0] == 503)
            api.send_signal(signal.SIGINT)
            rest = "\n".join(lines)
    assert "shutting down" in rest
    assert rest.rstrip().endswith("data: [DONE]")
    assert api.wait(30) == 0
    service.start_api()
    service.wait_ready()
    wait_for(lambda: _idle(service))


def test_a_supervisor_keeps_the_engine_for_the_last_answers(endless):
    """SIGTERM to `draftsmith serve` while a stream runs: the stream is complete, the end is clean, nothing is left."""
    engine = {"max_batch": 2, "max_model_len": 500, "kv_tokens": 4096, "threads": 1}
    with tiny_deployment("serve", engine=engine) as deployment:
        deployment.start()
        pids = set(deployment.pids().values())
        with httpx.stream("POST", f"{deployment.url}/v1/completions", json=_body(endless), timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            assert deployment.process is not None
            deployment.process.send_signal(signal.SIGTERM)
            rest = "\n".join(lines)
        assert '"finish_reason":"length"' in rest
        assert deployment.process.wait(60) == 0
        assert not alive(pids)
