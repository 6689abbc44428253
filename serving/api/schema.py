"""What the API accepts.  A field that would change the output and is not served is refused by name.

Some clients always send a field at the value that means nothing; those values are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_STOPS = 16
_SEEDS = 1 << 64

# Fields of the OpenAI API that are not served, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)


class StreamOptions(_Strict):
    """`include_usage` adds a last chunk with the token counts and no choices."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Speculative(_Strict):
    """Per-request speculation: off, or with this many drafted tokens a round."""

    enabled: bool = True
    gamma: int | None = Field(None, ge=0)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _off_is_zero(value: object) -> object:
    return 0 if value == -1 else value


def _same(value: object, neutral: object) -> bool:
    """Compare without taking 0 for False: `logprobs: 0` asks for something, `logprobs: false` does not."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


class Generation(_Strict):
    """Fields shared by chat and plain completions."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: Annotated[int, BeforeValidator(_off_is_zero)] = Field(0, ge=0, lt=1 << 31)
    max_tokens: int | None = Field(None, ge=1)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)] = Field(
        default_factory=list, max_length=MAX_STOPS
    )
    seed: int | None = Field(None, ge=-(1 << 63), lt=_SEEDS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None  # labels; they change nothing
    speculative: Speculative = Speculative()

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: object) -> object:
        """Remove nulls and fields that ask for nothing; what is left is served or refused."""
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None and not (name in NEUTRAL and any(_same(value, neutral) for neutral in NEUTRAL[name]))
        }

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream = true")
        return self


class TextPart(_Strict):
    """A piece of text inside a message; images and sound are refused."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One chat message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: object) -> object:
        """Remove nulls and empty lists, which clients send back with an earlier answer."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None and value != []}

    @property
    def text(self) -> str:
        """The message's text, parts joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def token_limit(self) -> int | None:
        """The newer name wins where both are given."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | list[int]

    @property
    def token_limit(self) -> int | None:
        """Sixteen is what OpenAI's API does when nothing is said."""
        return self.max_tokens or 16
