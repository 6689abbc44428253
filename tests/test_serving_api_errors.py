"""Sentences of refusals: what was wrong, what is valid, what was probably meant, in JSON's words."""

from __future__ import annotations

import json

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from serving.api.errors import install_error_handlers
from serving.api.schema_chat import ChatRequest
from serving.api.schema_completion import CompletionRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def client() -> TestClient:
    """An application with the bodies of the API and nothing behind them."""
    app = FastAPI()
    install_error_handlers(app)

    @app.post(PATH)
    async def _chat(_body: ChatRequest) -> dict[str, str]:
        return {}

    @app.post("/v1/completions")
    async def _complete(_body: CompletionRequest) -> dict[str, str]:
        return {}

    return TestClient(app)


def message(client: TestClient, body: bytes, path: str = PATH) -> str:
    """The sentence that a body is refused with."""
    response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert 400 == response.status_code, response.text
    return str(response.json()["error"]["message"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is empty or null; send a JSON object"), (b"null", "the body is empty or null"),
        (b"[]", "the body is a list; send a JSON object"), (b'"x"', "the body is a string"), (b"7", "is a number"),
        (b"true", "the body is true or false"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_object_is_named(client: TestClient, body: bytes, said: str) -> None:
    """Nobody who sends JSON should read of dictionaries and fields to extract."""
    assert said in message(client, body)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": []}, "'messages': expected at least 1, found 0"),
        ({"speculative": 3}, "'speculative': expected a JSON object (got 3)"),
        ({"speculative": {"gama": 3}}, "'speculative.gama' is not supported by this server; did you mean "
         "'speculative.gamma'?"),
        ({"temprature": 1}, "did you mean 'temperature'?"),
        ({"messages": [{"role": "user", "contnt": "x"}]}, "did you mean 'messages.0.content'?"),
        ({"prompt_logprobs": 1}, "'prompt_logprobs' is not supported by this server; leave it out"),
        ({"stream_options": {"x": 1}}, "'stream_options.x' is not supported by this server; leave it out"),
    ],
)  # fmt: skip
def test_a_field_is_told_what_it_could_be(client: TestClient, fields: dict[str, object], said: str) -> None:
    """Names near a served one are told which, at any depth; names that only resemble one are not."""
    assert said in message(client, json.dumps(CHAT | fields).encode())


def test_fields_of_another_body_are_not_suggested(client: TestClient) -> None:
    """What is meant is looked for in the body of this path: a chat has no `prompt`."""
    assert "leave it out" in message(client, json.dumps(CHAT | {"promt": "x"}).encode())
    assert "did you mean 'prompt'?" in message(client, b'{"model": "m", "promt": "x"}', "/v1/completions")


def test_a_wrong_method_names_the_right_one(client: TestClient) -> None:
    """A GET where a POST belongs says so, in the header as well; an unknown path is quoted."""
    response = client.get(PATH)
    assert (405, "POST") == (response.status_code, response.headers["Allow"])
    assert f"{PATH} does not take GET; use POST" == response.json()["error"]["message"]
    response = client.get("/v1/nothing")
    assert (404, "there is no /v1/nothing on this server") == (
        response.status_code,
        response.json()["error"]["message"],
    )
