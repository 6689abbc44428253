"""Requests at the edge of what the API takes: refused with a sentence, never passed on to hurt the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from tiny_pair import write_target

from serving.api.errors import ApiError, validation_error
from serving.api.schema import Speculative, StreamOptions
from serving.api.schema_chat import ChatRequest
from serving.api.schema_completion import CompletionRequest
from serving.api.text import TargetText
from serving.api.tokens import DetokenizeRequest, TokenizeRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("top_k", [1 << 31, 1 << 63, 10**20])
def test_a_top_k_beyond_every_vocabulary_is_refused(top_k: int) -> None:
    """A number that no tensor can hold is a 400, not the end of the engine."""
    with pytest.raises(ValidationError, match="top_k"):
        ChatRequest.model_validate({**CHAT, "top_k": top_k})


def test_what_clients_send_back_is_accepted() -> None:
    """Labels, and the nulls and empty lists of an earlier answer, ask for nothing."""
    answer = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "annotations": []}

    request = ChatRequest.model_validate({**CHAT, "messages": [answer], "metadata": {"team": "a"}, "n": 1})

    assert request.messages[0].text == "yes"


def test_errors_name_the_field_as_the_client_wrote_it() -> None:
    """The branches of a union that the library tried are not shown."""
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"model": "m", "prompt": {"text": "x"}})

    error = validation_error(list(RequestValidationError(caught.value.errors()).errors()))

    assert error.param == "prompt"
    assert "list[int]" not in (error.param or "")


def test_a_lone_surrogate_is_refused(tmp_path: Path) -> None:
    """Text that is no Unicode is a 400 for plain prompts and chats alike."""
    write_target(tmp_path / "target")
    text = TargetText(tmp_path / "target")

    for encode in (lambda: text.encode("\ud800"), lambda: text.encode_chat([{"role": "user", "content": "\ud800"}])):
        with pytest.raises(ApiError, match="surrogate") as caught:
            encode()
        assert caught.value.status == 400


def test_every_field_is_documented() -> None:
    """docs/api.md names each field that a body may have."""
    page = (Path(__file__).resolve().parent.parent / "docs/api.md").read_text(encoding="utf-8")
    for model in (ChatRequest, CompletionRequest, StreamOptions, Speculative, TokenizeRequest, DetokenizeRequest):
        hidden = {"include_obfuscation", "continue_final_message"}  # accepted at the value that asks for nothing
        for name in model.model_fields.keys() - hidden:
            assert f"`{name}`" in page, f"{model.__name__}.{name}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
def test_numbers_that_are_none_are_refused(field: str, value: float) -> None:
    """JSON as Python reads it knows NaN; no tensor should."""
    with pytest.raises(ValidationError, match=field):
        ChatRequest.model_validate({**CHAT, field: value})


def test_neutral_extras_are_dropped() -> None:
    """`best_of` equal to n, and fields of the other endpoint at rest, ask for nothing."""
    body = {"model": "m", "prompt": "x", "n": 3, "best_of": 3, "logprobs": False, "top_logprobs": 0, "tools": []}
    assert CompletionRequest.model_validate(body).n == 3
    with pytest.raises(ValidationError, match="best_of"):
        CompletionRequest.model_validate(body | {"best_of": 4})
