"""Tokens to text one at a time: nothing lost, nothing doubled, stop strings cut wherever tokens end."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_pair import END, write_tokenizer

from adapter.contracts import SettingsError
from serving.api.errors import ApiError
from serving.api.text import AnswerText, TargetText

ALL = st.lists(st.integers(3, 119), max_size=30)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TargetText:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return TargetText(folder)


def _read(text: TargetText, ids: list[int], stops: list[str]) -> tuple[str, int, bool]:
    answer = AnswerText(text, stops)
    out = "".join(answer.push(token) for token in ids)
    return out + answer.finish(), answer.num_tokens, answer.stopped


@given(ids=ALL)
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_whole_text(text, ids):
    """Any tokens, broken UTF-8 included, read one at a time give what decoding them at once gives."""
    assert _read(text, ids, [])[0] == text.decode(ids)


@given(
    said=st.text(alphabet="ab é€🙂then\n", max_size=20), stops=st.lists(st.text("ab é🙂the", min_size=1), max_size=3)
)
@example(said="the end", stops=["he e"])
@settings(max_examples=300, deadline=None)
def test_a_stop_string_cuts_where_it_is_complete_first(text, said, stops):
    """The text ends before the stop string that completes first, whatever tokens it is spread over (S2)."""
    ids = text.encode(said)
    out, _, stopped = _read(text, ids, stops)
    found = [(said.index(stop) + len(stop), said.index(stop)) for stop in stops if stop in said]
    assert stopped == bool(found)
    if not found:
        assert out == said
        return
    first_end = min(found)[0]
    assert out in {said[:start] for end, start in found if end <= first_end + 4}  # one token may complete two
    assert not any(stop in out for stop in stops)


@given(said=st.text(alphabet="abc", min_size=1, max_size=12), stop=st.text(alphabet="abc", min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_nothing_is_sent_that_a_stop_string_takes_back(text, said, stop):
    """Every prefix that was released stays a prefix of the final text."""
    answer, sent = AnswerText(text, [stop]), ""
    for token in text.encode(said):
        sent += answer.push(token)
        assert (said + "\0").startswith(sent)
        assert stop not in sent
    assert sent + answer.finish() == said.split(stop)[0]


def test_multibyte_characters_are_held_until_complete(text):
    """An emoji of four byte tokens arrives as one piece, and half of one at the end is shown as broken."""
    ids = text.encode("🙂")
    assert len(ids) == 4
    answer = AnswerText(text, [])
    assert [answer.push(token) for token in ids] == ["", "", "", "🙂"]
    assert _read(text, ids[:2], [])[0] == "�"


def test_special_tokens_are_no_text(text):
    """Turn markers and end tokens count as tokens and add nothing."""
    out, count, _ = _read(text, [*text.encode("on"), END], [])
    assert (out, count) == ("on", len(text.encode("on")) + 1)


def test_end_tokens_come_from_the_generation_config(text, tmp_path):
    """Where generate looks, we look: the generation config first, then the model's."""
    assert text.end_tokens == [END]
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert TargetText(tmp_path).end_tokens == [2, 5]
    (tmp_path / "generation_config.json").unlink()
    assert TargetText(tmp_path).end_tokens == [7]


def test_templates_are_rendered_in_a_sandbox(text, tmp_path):
    """A template that refuses is a 400 in its words; one that reaches for internals gets nothing."""
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(ApiError, match="no system role"):
        TargetText(tmp_path).encode_chat([{"role": "system", "content": "x"}])
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ApiError, match="refuses"):
        TargetText(tmp_path).encode_chat([{"role": "user", "content": "x"}])
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ApiError, match="no chat template"):
        TargetText(tmp_path).encode_chat([{"role": "user", "content": "x"}])
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    assert TargetText(tmp_path).encode_chat([{"role": "user", "content": "on"}]) == text.encode("on")


def test_a_target_without_a_tokenizer_is_refused(tmp_path: Path):
    """The folder is named in the message."""
    with pytest.raises(SettingsError, match=r"no tokenizer\.json"):
        TargetText(tmp_path)
