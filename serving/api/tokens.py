"""POST /tokenize and POST /detokenize, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, model_validator

from serving.api.errors import FieldError
from serving.api.generation import Generator
from serving.api.routes import check_model, check_tools
from serving.api.schema import Strict
from serving.api.schema_chat import Message, Tools, spelled_tools
from serving.api.schema_completion import TokenIds

router = APIRouter()


class TokenizeRequest(Strict):
    """A text, or a chat as the chat template renders it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: Tools = Field(default_factory=list)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: Literal[False] = False
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("prompt", "give either prompt or messages")
        if self.prompt is not None and self.tools:
            raise FieldError("tools", "they belong to messages")
        if self.messages is not None and self.add_special_tokens:
            raise FieldError("add_special_tokens", "the chat template adds its own; leave it out")
        return self


class DetokenizeRequest(Strict):
    """Token ids."""

    model: str | None = None
    tokens: TokenIds


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Turn a text or a chat into token ids."""
    generator = _checked(request, body.model)
    text = generator.text
    if body.messages is None:
        special = body.add_special_tokens is not False
        ids = await asyncio.to_thread(text.encode, body.prompt or "", special=special)
    else:
        check_tools(request, body.messages, shown=bool(body.tools))
        messages = [message.for_template() for message in body.messages]
        tools = spelled_tools(body.tools) or None
        ids = await asyncio.to_thread(
            text.encode_chat, messages, tools, add_generation_prompt=body.add_generation_prompt
        )  # fmt: skip
    strings = [text.token_text(token) for token in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": generator.engine.max_model_len, "tokens": ids, "token_strs": strings}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    """Turn token ids into text, special tokens included."""
    generator = _checked(request, body.model)
    return {"prompt": await asyncio.to_thread(_text_of, body.tokens, generator)}


def _text_of(token_ids: list[int], generator: Generator) -> str:
    for token in token_ids:
        generator.check_token(token, "tokens")
    return generator.text.decode(token_ids, skip_special=False)


def _checked(request: Request, model: str | None) -> Generator:
    """Return the generator, after the model's name, if one was given.

    Raises:
        ApiError: 404 for another model.
    """
    if model is not None:
        check_model(request, model)
    generator: Generator = request.app.state.generator
    return generator
