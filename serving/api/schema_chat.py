"""What POST /v1/chat/completions takes beyond the fields every generation request has.

Messages and tools are checked here and handed to the chat template as it expects them; whether the
served model's template knows tools at all is the route's question.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from serving.api.errors import FieldError
from serving.api.schema import MAX_LOGPROBS, Generation, Strict

_NEUTRAL: dict[str, tuple[Any, ...]] = {"logprobs": (False,), "echo": (False,), "tools": ([],)}


class TextPart(Strict):
    """A piece of text inside a message; images and sound are refused."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """The function an earlier answer called; `arguments` is a JSON object as text."""

    name: str
    arguments: str = "{}"

    @property
    def parsed(self) -> dict[str, Any]:
        """The arguments as an object."""
        value = json.loads(self.arguments or "{}")
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> CalledFunction:
        try:
            _ = self.parsed
        except ValueError:
            raise FieldError("arguments", f"expected a JSON object as text, got {self.arguments!r:.80}") from None
        return self


class ToolCall(Strict):
    """A tool call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # clients that rebuilt it from a stream send it back


class Message(Strict):
    """One chat message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None
    name: str | None = None  # of the participant

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: object) -> object:
        """Remove nulls and empty lists, which clients send back with an earlier answer."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None and value != []}

    @model_validator(mode="before")
    @classmethod
    def _parts_are_text(cls, data: object) -> object:
        """Refuse images and sound in one sentence, before each form that content may have complains."""
        parts = data.get("content") if isinstance(data, dict) else None
        for index, part in enumerate(parts if isinstance(parts, list) else ()):
            if isinstance(part, dict) and part.get("type") != "text":
                raise FieldError(f"content.{index}.type", f"only 'text' parts are served, got {part.get('type')!r:.80}")
        return data

    @model_validator(mode="after")
    def _roles_have_their_fields(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise FieldError("tool_calls", "only assistant messages have them")
        if self.tool_call_id is not None and self.role != "tool":
            raise FieldError("tool_call_id", "only tool messages have one")
        if self.content is None and not self.tool_calls:
            raise FieldError("content", "it is missing; give the message's text")
        return self

    @property
    def text(self) -> str:
        """The message's text, parts joined."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)

    @property
    def needs_tools(self) -> bool:
        """Whether only a template with tools can render it."""
        return self.role == "tool" or bool(self.tool_calls)

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: call arguments as objects, not as text."""
        out: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.tool_calls:
            out["tool_calls"] = [
                {"id": call.id, "type": "function",
                 "function": {"name": call.function.name, "arguments": call.function.parsed}}
                for call in self.tool_calls
            ]  # fmt: skip
        if self.tool_call_id is not None:
            out["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            out["name"] = self.name
        return out


class Function(Strict):
    """A function the model may call; `parameters` is a JSON schema."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _strict_is_not_served(self) -> Function:
        if self.strict:
            raise FieldError(
                "strict",
                "true is not supported, because tools are shown to the model and its calls are not held to their "
                'schemas; send "strict": false or leave it out (openai.pydantic_function_tool() sets it to true: '
                '`del tool["function"]["strict"]`)',
            )
        return self


class Tool(Strict):
    """A tool the model may call."""

    type: Literal["function"]
    function: Function


Tools = Annotated[list[Tool], Field(max_length=128)]


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Annotated[bool, Field(strict=True)] = False
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] = 0
    tools: Tools = Field(default_factory=list)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool = True

    @classmethod
    def _neutral(cls, name: str) -> tuple[Any, ...]:
        return _NEUTRAL.get(name) or super()._neutral(name)

    @model_validator(mode="after")
    def _tools_fit(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", "it needs logprobs = true")
        if self.tool_choice == "auto" and not self.tools:
            raise FieldError("tool_choice", "'auto' needs tools, and there are none")
        if self.calls_tools and self.response_format is not None and self.response_format.type != "text":
            raise FieldError("response_format", "it cannot be combined with tools, whose calls would break the format")
        if self.calls_tools and not self.parallel_tool_calls:
            raise FieldError("parallel_tool_calls", "false is not supported by this server; leave it out")
        return self

    @property
    def calls_tools(self) -> bool:
        """Whether the model is shown tools and its calls are parsed."""
        return bool(self.tools) and self.tool_choice != "none"

    def tools_for_template(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates expect them, or None."""
        return spelled_tools(self.tools) if self.calls_tools else None

    @property
    def token_limit(self) -> int | None:
        """The newer name wins where both are given."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit_name(self) -> str:
        """The field that `token_limit` comes from."""
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives reported a token; None reports nothing."""
        return self.top_logprobs if self.logprobs else None


def spelled_tools(tools: list[Tool]) -> list[dict[str, Any]]:
    """Return tools as chat templates expect them."""
    return [tool.model_dump(exclude_none=True) for tool in tools]
