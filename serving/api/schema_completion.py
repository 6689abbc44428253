"""What POST /v1/completions takes beyond the fields every generation request has."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from adapter.sections import MOST_CHOICES
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

# One bad item is enough, and no server gives more answers than that: a long body must not be checked for long.
TokenIds = Annotated[list[Annotated[int, Field(strict=True)]], Field(fail_fast=True)]
_Texts = Annotated[list[str], Field(fail_fast=True, max_length=MOST_CHOICES)]
_Lists = Annotated[list[TokenIds], Field(fail_fast=True, max_length=MOST_CHOICES)]


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | TokenIds | _Texts | _Lists
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
    def default_limit(self) -> int | None:
        """What stands for a limit that was not given, as far as the context has room."""
        return max(_DEFAULT_MAX_TOKENS, self.min_tokens)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives reported a token; None reports nothing."""
        return self.logprobs
