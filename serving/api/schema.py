"""What the API accepts in every generation request.  Nothing that would change an answer is ignored.

A field that is not served is refused by name, because unknown fields are forbidden.  Some clients
always send such a field at the value that asks for nothing; those values are accepted.  Knows
neither tokens nor the engine; chat and plain completions add their own fields to `Generation`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serving.api.errors import FieldError

MAX_STOPS = 16
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_BIASED_TOKENS = 1024
_SEEDS = 1 << 64
_INT32 = 1 << 31

# Fields of OpenAI's and vLLM's APIs that are not served, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "bad_words": ([],),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "return_tokens_as_token_ids": (False,),
    "include_reasoning": (True,),
}


class Strict(BaseModel):
    """Unknown fields and numbers that are none are refused."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)


class StreamOptions(Strict):
    """When usage is sent: in a last chunk without choices, in every chunk, or not at all."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class Speculative(Strict):
    """Per-request speculation: off, with this many drafted tokens a round, by this draft version."""

    enabled: bool = True
    gamma: int | None = Field(None, ge=0)
    version: Annotated[int, Field(ge=0, strict=True)] | Literal["live", "previous", "floor"] | None = None

    @model_validator(mode="after")
    def _off_is_off(self) -> Speculative:
        if not self.enabled and (self.gamma or self.version is not None):
            raise FieldError("enabled", "gamma and version mean nothing with enabled = false; leave them out")
        return self


class JsonSchema(Strict):
    """A named JSON schema; answers always follow it, so `strict` true and false are served alike."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    name: str = Field("answer", min_length=1, max_length=64)
    description: str | None = None
    content: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer must be: any text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_when_needed(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise FieldError("json_schema", "it is given exactly when type is 'json_schema'")
        return self


def _as_list(value: object) -> object:
    if value == "":
        raise ValueError("an empty string would stop at once; leave it out")
    return [value] if isinstance(value, str) else value


def _off_is_zero(value: object) -> object:
    return 0 if value == -1 else value


def _same(value: object, neutral: object) -> bool:
    """Compare without taking 0 for False."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


class Generation(Strict):
    """Fields shared by chat and plain completions."""

    model: str
    n: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: Annotated[int, BeforeValidator(_off_is_zero)] = Field(0, ge=0, lt=_INT32)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=2)
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=MAX_BIASED_TOKENS
    )
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)] = Field(
        default_factory=list, max_length=MAX_STOPS
    )
    stop_token_ids: list[int] = Field(default_factory=list, max_length=MAX_STOP_TOKENS)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = Field(None, ge=-(1 << 63), lt=_SEEDS)
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    priority: int = Field(0, ge=-_INT32, lt=_INT32)
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    user: str | None = None
    metadata: dict[str, str] | None = None  # labels; they change nothing
    speculative: Speculative = Speculative()
    spec_metrics: Literal["none", "summary"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: object) -> object:
        """Remove nulls and fields that ask for nothing; what is left is served or refused."""
        if not isinstance(data, dict):
            return data
        sent = {name: value for name, value in data.items() if value is not None}
        if "best_of" in sent and _same(sent["best_of"], sent.get("n", 1)):
            del sent["best_of"]  # the best n of n answers are all of them
        return {
            name: value
            for name, value in sent.items()
            if not any(_same(value, neutral) for neutral in cls._neutral(name))
        }

    @classmethod
    def _neutral(cls, name: str) -> tuple[Any, ...]:
        """Values of a field that ask for nothing."""
        return NEUTRAL.get(name, ())

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "it is only allowed with stream = true")
        if self.token_limit is not None and self.min_tokens > self.token_limit:
            text = f"{self.min_tokens} is more than {self.limit_name}, which is {self.token_limit}"
            raise FieldError("min_tokens", text)
        return self

    @property
    def token_limit(self) -> int | None:
        """The most tokens an answer may have; None leaves it to the model's context."""
        return self.max_tokens

    @property
    def limit_name(self) -> str:
        """The field that `token_limit` comes from."""
        return "max_tokens"

    @property
    def default_limit(self) -> int | None:
        """What stands for a limit that was not given, as far as the context has room; None fills the context."""
        return None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives reported a token; None reports nothing."""
        return None
