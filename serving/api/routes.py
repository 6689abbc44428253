"""POST /v1/chat/completions and POST /v1/completions: from a body to one response or a stream."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from serving.api.choices import Choices, Piece
from serving.api.errors import ApiError
from serving.api.generation import Generator
from serving.api.origin import origin_of
from serving.api.schema import Generation
from serving.api.schema_chat import ChatRequest, Message
from serving.api.schema_completion import CompletionRequest
from serving.api.shapes import ChatShape, Shape, TextShape, Whole, Wishes
from serving.api.speculation import spec_metrics

_T = TypeVar("_T")
router = APIRouter()

SPEC_METRICS_HEADER = "x-draftsmith-spec-metrics"
_LONG = 20_000  # characters or token ids; more is read beside the event loop
# Clients that split lines as Python's str.splitlines does would cut an event in two at these.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a chat."""
    generator = _generator(request)
    check_model(request, body.model)
    check_tools(request, body.messages, shown=body.calls_tools)
    generator.check_count(body, 1)
    ids = await asyncio.to_thread(_read_chat, body, generator)
    return await _answer(body, request, [ids], ChatShape, _wishes(body, request))


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue one text or several."""
    generator = _generator(request)
    check_model(request, body.model)
    given = body.prompts
    generator.check_count(body, len(given))
    long = sum(map(len, given)) > _LONG
    prompts = await asyncio.to_thread(generator.read_prompts, given) if long else generator.read_prompts(given)
    wishes = _wishes(body, request)
    if body.echo:
        echoes = tuple(
            prompt if isinstance(prompt, str) else generator.text.decode(prompt, skip_special=body.skip_special_tokens)
            for prompt in given
        )
        wishes = replace(wishes, echoes=echoes)
    return await _answer(body, request, prompts, TextShape, wishes)


def _read_chat(body: ChatRequest, generator: Generator) -> list[int]:
    messages = [message.for_template() for message in body.messages]
    return generator.text.encode_chat(
        messages, body.tools_for_template(), max_tokens=generator.engine.max_model_len
    )  # fmt: skip


def check_tools(request: Request, messages: list[Message], *, shown: bool) -> None:
    """Refuse names and tools that the served model's chat template does not know, or whose calls it spells otherwise.

    Args:
        shown: whether tools are shown to the model.

    Raises:
        ApiError: 400, naming the field.
    """
    template = _generator(request).text.template
    knows = template is not None and template.knows_tools
    if shown and not (template is not None and template.parses_calls):
        why = "spells tool calls in a form that is not parsed here" if knows else "does not know tools"
        raise ApiError(400, f"'tools' is not supported with this model: its chat template {why}", param="tools")
    for place, message in enumerate(messages):
        if message.name is not None and not (template is not None and template.knows_names):
            where = f"messages.{place}.name"
            raise ApiError(
                400, f"'{where}' is not supported with this model: its chat template shows no names; leave it out or "
                "write it into the content", param=where, code="invalid_value",
            )  # fmt: skip
        if message.needs_tools and not knows:
            field = "role" if message.role == "tool" else "tool_calls"
            raise ApiError(
                400, f"'messages.{place}.{field}' is not supported with this model: its chat template does not know "
                "tools", param=f"messages.{place}.{field}",
            )  # fmt: skip


async def _answer(
    body: Generation, request: Request, prompts: list[list[int]], form: type[Shape], wishes: Wishes
) -> Response:
    generator = _generator(request)
    request_id = f"{form.prefix}-{request.state.request_id}"
    # A client may send its id twice; the engine may not hear it twice.
    unique = f"{request_id}-{secrets.token_hex(4)}" if request.state.request_id_is_clients else request_id
    choices = generator.choices_for(body, prompts, unique, origin_of(request, body.user), show_special=wishes.tools and
                                    generator.text.calls_are_special)  # fmt: skip
    shape = form(request_id, body.model, generator.text, wishes, choices)
    pieces = generator.pieces(choices)
    if body.stream:
        first = await _unless_gone(_first(pieces), request)
        return StreamingResponse(_events(shape, first, pieces, choices, wishes), media_type="text/event-stream")
    wholes = await _unless_gone(_collect(pieces, choices), request)
    answer = shape.whole(wholes)
    metrics = _metrics(choices, wishes)
    return JSONResponse(answer if metrics is None else answer | {"metrics": metrics})


def check_model(request: Request, name: str) -> None:
    """Refuse a model that is not the served one.

    Raises:
        ApiError: 404.
    """
    served = request.app.state.model_name
    if name != served:
        raise ApiError(404, f"model {name!r} is not served here; this server has {served!r}", param="model",
                       code="model_not_found")  # fmt: skip


def _generator(request: Request) -> Generator:
    generator: Generator = request.app.state.generator
    return generator


def _wishes(body: Generation, request: Request) -> Wishes:
    options = body.stream_options
    generator = _generator(request)
    header = request.headers.get(SPEC_METRICS_HEADER)
    if header not in (None, "none", "summary"):
        raise ApiError(
            400, f"header {SPEC_METRICS_HEADER} is {header!r:.80}; use none or summary", param=SPEC_METRICS_HEADER
        )
    spec = body.spec_metrics or header or generator.api.spec_metrics
    return Wishes(
        num_logprobs=body.num_logprobs, token_ids=body.return_token_ids,
        tools=isinstance(body, ChatRequest) and body.calls_tools,
        usage=bool(options and options.include_usage),
        running_usage=bool(options and options.continuous_usage_stats),
        spec_tokens=generator.most_drafted(body) if spec == "summary" else None,
    )  # fmt: skip


def _metrics(choices: Choices, wishes: Wishes) -> dict[str, Any] | None:
    """Return what speculation did for the whole request, when asked for."""
    if wishes.spec_tokens is None:
        return None
    summaries = [choice.summary for choice in choices.items if choice.summary is not None]
    return {"speculative_decoding": spec_metrics(summaries, wishes.spec_tokens)}


async def _events(
    shape: Shape, first: Piece | None, pieces: AsyncGenerator[Piece, None], choices: Choices, wishes: Wishes
) -> AsyncIterator[str]:
    async with aclosing(pieces):
        try:
            for event in shape.openings():
                yield _event(event)
            for event in shape.chunks(first) if first is not None else []:
                yield _event(event)
            async for piece in pieces:
                for event in shape.chunks(piece):
                    yield _event(event)
            metrics = _metrics(choices, wishes)
            if wishes.usage or metrics is not None:
                yield _event(shape.usage_chunk(metrics))
        except ApiError as error:
            yield _event(error.body())
        yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':')).translate(_LINE_ENDS)}\n\n"


async def _collect(pieces: AsyncGenerator[Piece, None], choices: Choices) -> list[Whole]:
    """Read all answers to their ends."""
    wholes = [Whole() for _ in choices.items]
    async with aclosing(pieces):
        async for piece in pieces:
            wholes[piece.index].add(piece)
    return wholes


async def _first(pieces: AsyncGenerator[Piece, None]) -> Piece | None:
    """Read the first piece before the response begins, so that a refusal still has its own status."""
    return await anext(pieces, None)


async def _unless_gone(work: Coroutine[Any, Any, _T], request: Request) -> _T:
    """Do `work`, but give up when the client leaves, which frees its place in the engine."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
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
