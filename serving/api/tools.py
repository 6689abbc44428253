"""Tool calls in the text of an answer: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

Text comes in pieces of any size; what is found never depends on how it was cut, because a call is
given out only when it is complete and nothing that may become a tag or the space before one is
given out early.  Knows neither tokens nor how a response wraps a call.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from serving.api.template import TOOL_CALL

_CLOSE = "</tool_call>"


@dataclass(frozen=True, slots=True)
class Call:
    """One call: a function's name and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(slots=True)
class Found:
    """What a stretch of text held: plain content, and the calls that became complete in it."""

    content: str = ""
    calls: list[Call] = field(default_factory=list)


class ToolParser:
    """Split one answer into content and calls.

    White space between content and a call, and between calls, belongs to neither.  What stands
    between the tags and is no call stays content, tags included.
    """

    def __init__(self) -> None:
        self._rest = ""
        self._inside = False
        self._space = ""  # before the tag that is open
        self.num_calls = 0

    def push(self, text: str) -> Found:
        """Take the next stretch of text."""
        self._rest += text
        found = Found()
        while self._step(found):
            pass
        return found

    def finish(self) -> Found:
        """Take the end of the answer; a last call whose closing tag is missing counts when it is whole."""
        rest, self._rest = self._rest, ""
        found = Found()
        if self._inside:
            self._close(rest, "", found)
        elif not self.num_calls or rest.strip():
            found.content = rest
        return found

    def _step(self, found: Found) -> bool:
        """Consume up to the next tag; False when more text is needed."""
        tag = _CLOSE if self._inside else TOOL_CALL
        before, seen, after = self._rest.partition(tag)
        if not seen:
            if not self._inside:
                self._give(found)
            return False
        self._rest = after
        if self._inside:
            self._close(before, _CLOSE, found)
        else:
            plain = before.rstrip()
            found.content += plain
            self._space = before[len(plain) :]
            self._inside = True
        return True

    def _give(self, found: Found) -> None:
        """Give out what can be neither part of a tag nor the space before one."""
        keep = next((size for size in range(len(TOOL_CALL) - 1, 0, -1) if self._rest.endswith(TOOL_CALL[:size])), 0)
        plain = self._rest[: len(self._rest) - keep].rstrip()
        found.content += plain
        self._rest = self._rest[len(plain) :]

    def _close(self, body: str, tag: str, found: Found) -> None:
        self._inside = False
        call = _parse(body)
        if call is None:
            found.content += self._space + TOOL_CALL + body + tag
            return
        found.calls.append(call)
        self.num_calls += 1


def _parse(body: str) -> Call | None:
    try:
        said = json.loads(body)
    except ValueError:
        return None
    if not isinstance(said, dict) or not isinstance(said.get("name"), str) or not said["name"]:
        return None
    arguments = said.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            return None
    if not isinstance(arguments, dict):
        return None
    return Call(said["name"], json.dumps(arguments, ensure_ascii=False))
