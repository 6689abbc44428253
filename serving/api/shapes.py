"""How answers are wrapped: OpenAI's chat and text completion objects, whole and as stream chunks.

Knows no engine and no HTTP: pieces and counts in, JSON-ready dicts out.  A field that was not asked
for is left out, except those OpenAI's own answers always carry.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from adapter.contracts import TokenLogprob
from serving.api.choices import Choices, Piece
from serving.api.logprobs import chat_logprobs, completion_logprobs
from serving.api.text import TargetText
from serving.api.tools import Call, ToolParser


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the client asked to see."""

    num_logprobs: int | None = None
    token_ids: bool = False
    tools: bool = False
    usage: bool = False  # in a last chunk
    running_usage: bool = False  # in every chunk
    echoes: tuple[str, ...] | None = None  # the prompts, when they are repeated before the answers
    spec_tokens: int | None = None  # most tokens a round may draft, when speculation is reported


@dataclass(slots=True)
class Whole:
    """All pieces of one answer put together."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, piece: Piece) -> None:
        """Append the next piece."""
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.offsets += piece.offsets
        self.logprobs += piece.logprobs
        self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason


class Shape(ABC):
    """One response in the making."""

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, request_id: str, model: str, text: TargetText, wishes: Wishes, choices: Choices) -> None:
        self._text = text
        self._wishes = wishes
        self._choices = choices
        self._sent_tokens = 0
        self._base = {"id": request_id, "created": int(time.time()), "model": model}

    def whole(self, wholes: list[Whole]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self._full(index, whole) for index, whole in enumerate(wholes)]
        return {**self._base, "object": self.whole_object, "choices": choices, "usage": self._choices.usage()}

    @abstractmethod
    def openings(self) -> list[dict[str, Any]]:
        """Events before the first piece."""

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Events of one piece: none where it holds nothing a client asked to see."""
        self._sent_tokens += len(piece.token_ids)
        choice = self._delta(piece)
        visible = choice.pop("visible") or piece.finish_reason is not None
        asked = self._wishes.num_logprobs is not None or self._wishes.token_ids or self._wishes.running_usage
        return [self._chunk([choice])] if visible or (asked and piece.token_ids) else []

    def usage_chunk(self, metrics: dict[str, Any] | None) -> dict[str, Any]:
        """The last event of a stream that asked for usage or for what speculation did."""
        chunk = {**self._base, "object": self.chunk_object, "choices": []}
        if self._wishes.usage or self._wishes.running_usage:
            chunk["usage"] = self._choices.usage()
        return chunk if metrics is None else chunk | {"metrics": metrics}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._base, "object": self.chunk_object, "choices": choices}
        if self._wishes.running_usage:
            chunk["usage"] = self._choices.usage(self._sent_tokens)
        elif self._wishes.usage:
            chunk["usage"] = None
        return chunk

    def _reasons(self, piece: Piece | Whole) -> dict[str, Any]:
        return {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}

    def _prompt_ids(self, index: int) -> list[int]:
        return self._choices.prompts[index // self._choices.num_per_prompt]

    def _token_ids(self, piece: Piece | Whole) -> dict[str, Any]:
        return {"token_ids": piece.token_ids} if self._wishes.token_ids else {}

    @abstractmethod
    def _full(self, index: int, whole: Whole) -> dict[str, Any]:
        """One choice of a whole answer."""

    @abstractmethod
    def _delta(self, piece: Piece) -> dict[str, Any]:
        """One choice of a chunk, with `visible` saying whether it shows anything new."""


class ChatShape(Shape):
    """chat.completion and its chunks."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, request_id: str, model: str, text: TargetText, wishes: Wishes, choices: Choices) -> None:
        super().__init__(request_id, model, text, wishes, choices)
        self._parsers = [ToolParser() for _ in choices.items] if wishes.tools else []

    def whole(self, wholes: list[Whole]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        body = super().whole(wholes)
        return body | {"prompt_token_ids": self._prompt_ids(0)} if self._wishes.token_ids else body

    def openings(self) -> list[dict[str, Any]]:
        """One chunk a choice with the role, the first of them with the prompt's token ids if asked for."""
        events = []
        for index in range(len(self._choices.items)):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            events.append(self._chunk([choice]))
        if self._wishes.token_ids:
            events[0]["prompt_token_ids"] = self._prompt_ids(0)
        return events

    def _full(self, index: int, whole: Whole) -> dict[str, Any]:
        content, calls = self._split(index, whole.text, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": [_call(call) for call in calls]}
        choice = {"index": index, "message": message, "logprobs": self._logprobs(whole), **self._reasons(whole)}
        return self._called(index, choice) | self._token_ids(whole)

    def _delta(self, piece: Piece) -> dict[str, Any]:
        before = self._parsers[piece.index].num_calls if self._parsers else 0
        content, calls = self._split(piece.index, piece.text, last=piece.finish_reason is not None)
        delta: dict[str, Any] = {"content": content} if content else {}
        if calls:
            delta["tool_calls"] = [{"index": before + i, **_call(call)} for i, call in enumerate(calls)]
        choice = {"index": piece.index, "delta": delta, "logprobs": self._logprobs(piece), **self._reasons(piece)}
        return self._called(piece.index, choice) | self._token_ids(piece) | {"visible": bool(delta)}

    def _split(self, index: int, text: str, *, last: bool) -> tuple[str, list[Call]]:
        if not self._parsers:
            return text, []
        found = self._parsers[index].push(text)
        if last:
            rest = self._parsers[index].finish()
            return found.content + rest.content, found.calls + rest.calls
        return found.content, found.calls

    def _called(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        if self._parsers and self._parsers[index].num_calls and choice["finish_reason"] == "stop":
            choice["finish_reason"] = "tool_calls"
        return choice

    def _logprobs(self, piece: Piece | Whole) -> dict[str, Any] | None:
        num = self._wishes.num_logprobs
        return None if num is None else chat_logprobs(self._text, piece.token_ids, piece.logprobs, num)


class TextShape(Shape):
    """text_completion, whole and in chunks."""

    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def openings(self) -> list[dict[str, Any]]:
        """One chunk a choice with the prompt, where it is echoed or its token ids were asked for."""
        if self._wishes.echoes is None and not self._wishes.token_ids:
            return []
        events = []
        for index in range(len(self._choices.items)):
            choice = {"index": index, "text": self._echo(index), "logprobs": None, "finish_reason": None}
            if self._wishes.token_ids:
                choice |= {"prompt_token_ids": self._prompt_ids(index), "token_ids": []}
            events.append(self._chunk([choice]))
        return events

    def _full(self, index: int, whole: Whole) -> dict[str, Any]:
        choice = {"index": index, "text": self._echo(index) + whole.text, "logprobs": self._logprobs(whole),
                  **self._reasons(whole)}  # fmt: skip
        if self._wishes.token_ids:
            choice |= {"prompt_token_ids": self._prompt_ids(index), "token_ids": whole.token_ids}
        return choice

    def _delta(self, piece: Piece) -> dict[str, Any]:
        choice = {"index": piece.index, "text": piece.text, "logprobs": self._logprobs(piece), **self._reasons(piece)}
        return choice | self._token_ids(piece) | {"visible": bool(piece.text)}

    def _echo(self, index: int) -> str:
        return "" if self._wishes.echoes is None else self._wishes.echoes[index // self._choices.num_per_prompt]

    def _logprobs(self, piece: Piece | Whole) -> dict[str, Any] | None:
        num = self._wishes.num_logprobs
        if num is None:
            return None
        return completion_logprobs(self._text, piece.token_ids, piece.logprobs, piece.offsets, num)


def _call(call: Call) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
