"""POST /v1/chat/completions and POST /v1/completions."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from serving.api.errors import ApiError
from serving.api.generation import Answer, Generator, Piece
from serving.api.schema import ChatRequest, CompletionRequest, Generation

_T = TypeVar("_T")
router = APIRouter()

SEGMENT_HEADER = "x-draftsmith-segment"
DEFAULT_SEGMENT = "default"
_SEGMENT = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a chat."""
    generator: Generator = request.app.state.generator
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    ids = generator.text.encode_chat(messages)
    return await _answer(body, request, ids, body.token_limit, _ChatShape)


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue a text."""
    generator: Generator = request.app.state.generator
    if isinstance(body.prompt, str):
        ids = generator.text.encode(body.prompt)
    else:
        ids = list(body.prompt)
        bad = [token for token in ids if not 0 <= token < generator.text.vocab_size]
        if bad:
            raise ApiError(400, f"token id {bad[0]} is outside 0..{generator.text.vocab_size - 1}", param="prompt")
    return await _answer(body, request, ids, body.token_limit, _TextShape)


async def _answer(
    body: Generation, request: Request, ids: list[int], limit: int | None, shape: type[_Shape]
) -> Response:
    generator: Generator = request.app.state.generator
    served = request.app.state.model_name
    if body.model != served:
        raise ApiError(404, f"model {body.model!r} is not served here; this server has {served!r}", param="model",
                       code="model_not_found")  # fmt: skip
    form = shape(f"{shape.prefix}-{uuid.uuid4().hex}", served)
    submit = generator.submit_for(body, ids, limit, form.request_id, _segment(request))
    answer = Answer(prompt_tokens=len(ids))
    pieces = generator.pieces(submit, body.stop, answer)
    headers = {"X-Request-Id": form.request_id}
    if body.stream:
        first = await _unless_gone(_first(pieces), request)
        usage = bool(body.stream_options and body.stream_options.include_usage)
        events = _events(form, first, pieces, answer, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    text, reason = await _unless_gone(_collect(pieces), request)
    return JSONResponse(form.whole(text, reason, answer), headers=headers)


def _segment(request: Request) -> str:
    value = request.headers.get(SEGMENT_HEADER, DEFAULT_SEGMENT)
    if not _SEGMENT.fullmatch(value):
        raise ApiError(
            400, f"header {SEGMENT_HEADER} is {value!r:.80}; use 1 to 64 of A-Z a-z 0-9 _ . : -", param=SEGMENT_HEADER
        )
    return value


async def _events(
    form: _Shape, first: Piece | None, pieces: AsyncGenerator[Piece, None], answer: Answer, usage: bool
) -> AsyncIterator[str]:
    async with aclosing(pieces):
        try:
            yield _event(form.opening())
            if first is not None:
                yield _event(form.chunk(first))
            async for piece in pieces:
                yield _event(form.chunk(piece))
            if usage:
                yield _event(form.usage_chunk(answer))
        except ApiError as error:
            yield _event(error.body())
        yield "data: [DONE]\n\n"


def _event(body: dict[str, Any] | None) -> str:
    return "" if body is None else f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _collect(pieces: AsyncIterator[Piece]) -> tuple[str, str | None]:
    """Read a whole answer."""
    parts: list[str] = []
    reason = None
    async with aclosing(pieces):  # type: ignore[type-var]
        async for piece in pieces:
            parts.append(piece.text)
            reason = piece.finish_reason
    return "".join(parts), reason


async def _first(pieces: AsyncIterator[Piece]) -> Piece | None:
    """Read the first piece before the response begins, so that a refusal still has its own status."""
    return await anext(pieces, None)


async def _unless_gone(work: Coroutine[Any, Any, _T], request: Request) -> _T:
    """Do `work`, but give up when the client leaves, which frees its place in the engine."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client closed the connection")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


class _Shape(ABC):
    """How an answer is wrapped: OpenAI's chat or text objects."""

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, request_id: str, model: str) -> None:
        self.request_id = request_id
        self._base = {"id": request_id, "created": int(time.time()), "model": model}

    def opening(self) -> dict[str, Any] | None:
        """The first event of a stream, where the form has one."""
        return None

    @abstractmethod
    def choice(self, piece: Piece) -> dict[str, Any]:
        """One choice of a chunk."""

    def whole(self, text: str, reason: str | None, answer: Answer) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        return {
            **self._base,
            "object": self.whole_object,
            "choices": [self.full_choice(text, reason)],
            "usage": answer.usage(),
        }

    @abstractmethod
    def full_choice(self, text: str, reason: str | None) -> dict[str, Any]:
        """The only choice of a whole answer."""

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """One event of a stream."""
        return {**self._base, "object": self.chunk_object, "choices": [self.choice(piece)]}

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """The last event of a stream that asked for usage."""
        return {**self._base, "object": self.chunk_object, "choices": [], "usage": answer.usage()}


class _ChatShape(_Shape):
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self._base, "object": self.chunk_object, "choices": [choice]}

    def choice(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": piece.finish_reason}

    def full_choice(self, text: str, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}


class _TextShape(_Shape):
    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, piece: Piece) -> dict[str, Any]:
        return {"index": 0, "text": piece.text, "logprobs": None, "finish_reason": piece.finish_reason}

    def full_choice(self, text: str, reason: str | None) -> dict[str, Any]:
        return self.choice(Piece(text, reason))
