"""The target's chat template: rendered as transformers renders it, in a sandbox.

Knows neither token ids nor requests.  `TargetText` reads the source and asks for text.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serving.api.errors import ApiError

TOOL_CALL = "<tool_call>"  # the one form of tool calls that is parsed


class ChatTemplate:
    """One chat template and the special tokens it may name."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(source)
        self._special = special
        self.knows_names = _reads_names(environment, source)
        self.knows_tools = "tools" in source
        self.parses_calls = self.knows_tools and TOOL_CALL in source

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt.

        Raises:
            ApiError: 400 when the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt,
                **self._special,
            )  # fmt: skip
        except TemplateError as error:
            raise ApiError(
                400, f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None


def _reads_names(environment: Environment, source: str) -> bool:
    """Say whether a template reads `name` of what it calls a message, which tools and calls have, too."""
    tree = environment.parse(source)
    owners = [found.node for found in tree.find_all(nodes.Getattr) if found.attr == "name"]
    owners += [found.node for found in tree.find_all(nodes.Getitem) if getattr(found.arg, "value", None) == "name"]
    return any(isinstance(owner, nodes.Name) and owner.name in ("message", "msg", "m") for owner in owners)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **more: Any) -> str:
    """Write JSON as transformers does in templates; jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _raise(message: str) -> None:
    raise TemplateError(message)
