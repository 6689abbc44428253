"""Tool calls in text: the same ones however the text was cut, and nothing lost that is none."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serving.api.tools import Call, ToolParser

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TEXTS = [
    CALL, f"Let me see.\n{CALL}", f"{CALL}\n{CALL}\n", f"{CALL} and then", "<tool_call>not json</tool_call> text",
    "a < b, <tool and <tool_cal", "  spaces  \n", '<tool_call>{"name": "f"}', "<tool_call>{",
    f"x {CALL}\n<tool_call>[1]</tool_call>\n y ",
    '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "</tool_call> alone", "",
    "a  <tool_call>bad</tool_call>  b", f"<tool_call>{CALL}",
]  # fmt: skip


def _parse(pieces: list[str]) -> tuple[str, list[Call]]:
    parser = ToolParser()
    found = [parser.push(piece) for piece in pieces] + [parser.finish()]
    return "".join(item.content for item in found), [call for item in found for call in item.calls]


@pytest.mark.parametrize("said", TEXTS)
def test_serving_t1_every_cut_in_two_and_every_size(said):
    """Cut at every place, and into pieces of every size: the same content and calls (T1)."""
    whole = _parse([said])
    for place in range(len(said) + 1):
        assert _parse([said[:place], said[place:]]) == whole
    for size in range(1, len(said) + 1):
        assert _parse([said[start : start + size] for start in range(0, len(said), size)]) == whole


@given(
    parts=st.lists(st.sampled_from([CALL, " ", "\n", "a", "<", "<tool_call>", "</tool_call>", "{", "é"]), max_size=12),
    cuts=st.lists(st.integers(0, 400), max_size=30),
)
@example(parts=["a", " ", CALL, " ", "<"], cuts=[2, 3, 60])
@settings(max_examples=400, deadline=None)
def test_serving_t1_random_texts_and_cuts(parts, cuts):
    """Texts made of tags, calls and spaces give the same content and calls in any pieces (T1)."""
    said = "".join(parts)
    edges = [0, *sorted({cut for cut in cuts if cut < len(said)}), len(said)]
    assert _parse([said[a:b] for a, b in pairwise(edges)]) == _parse([said])


@pytest.mark.parametrize(
    ("said", "content", "calls"),
    [
        (CALL, "", 1), (f"Let me see.\n{CALL}", "Let me see.", 1), (f"{CALL}\n{CALL}\n", "", 2),
        ("<tool_call>not json</tool_call> text", "<tool_call>not json</tool_call> text", 0),
        ("  spaces  \n", "  spaces  \n", 0), ('<tool_call>{"name": "f"}', "", 1), ("<tool_call>{", "<tool_call>{", 0),
        ("a  <tool_call>bad</tool_call>  b", "a  <tool_call>bad</tool_call>  b", 0), ("", "", 0),
        ('<tool_call>{"name": "", "arguments": {}}</tool_call>', None, 0),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, 0),
    ],
)  # fmt: skip
def test_what_is_content_and_what_is_a_call(said, content, calls):
    """White space around calls belongs to nobody; what only looks like a call stays text."""
    found_content, found_calls = _parse([said])
    assert found_content == (said if content is None else content)
    assert len(found_calls) == calls


def test_arguments_are_json_text():
    """Objects, and objects that were written as text, come out as JSON text; none is an empty object."""
    _, [call] = _parse(['<tool_call>{"name": "f", "arguments": {"city": "Zürich"}}</tool_call>'])
    assert call == Call("f", '{"city": "Zürich"}')
    _, [call] = _parse([TEXTS[10]])
    assert json.loads(call.arguments) == {"x": 1}
    _, [call] = _parse(['<tool_call>{"name": "f"}</tool_call>'])
    assert call.arguments == "{}"
