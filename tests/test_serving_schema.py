"""Requests at the edge of what the API takes: refused with a sentence, never passed on to hurt the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from tiny_pair import write_target

from serving.api.errors import ApiError, validation_error
from serving.api.schema import ChatRequest, CompletionRequest
from serving.api.text import TargetText

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


def test_a_participant_name_is_refused() -> None:
    """The chat template would drop it silently."""
    with pytest.raises(ValidationError, match="name"):
        ChatRequest.model_validate({**CHAT, "messages": [{"role": "user", "content": "hi", "name": "ana"}]})


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
