"""What POST /v1/completions takes beyond the fields every generation request has."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from serving.api.errors import FieldError
from serving.api.schema import MAX_LOGPROBS, Generation

_DEFAULT_MAX_TOKENS = 16  # what OpenAI's API does when nothing is said
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields of chats that clients send along
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
}

TokenIds = list[Annotated[int, Field(strict=True)]]


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    echo: bool = False
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] | None = None

    @classmethod
    def _neutral(cls, name: str) -> tuple[Any, ...]:
        return _NEUTRAL.get(name) or super()._neutral(name)

    @model_validator(mode="after")
    def _no_echoed_logprobs(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise FieldError(
                "echo",
                "it cannot be combined with logprobs, because the engine reports generated tokens only and not the "
                "prompt's; leave one of them out",
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and not isinstance(self.prompt[0], int):
            return list(self.prompt)  # type: ignore[arg-type]
        return [self.prompt]  # type: ignore[list-item]

    @property
    def token_limit(self) -> int | None:
        """The most tokens an answer may have."""
        return self.max_tokens or max(_DEFAULT_MAX_TOKENS, self.min_tokens)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives reported a token; None reports nothing."""
        return self.logprobs
