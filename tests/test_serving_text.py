"""Tokens to text one at a time: nothing lost, nothing doubled, stop strings cut wherever tokens end."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_pair import END, write_tokenizer

from adapter.contracts import SettingsError
from serving.api.answer import AnswerText
from serving.api.errors import ApiError
from serving.api.text import TargetText

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


@pytest.mark.parametrize("keep", [False, True])
@given(said=st.text(alphabet="abc", min_size=1, max_size=14), stop=st.text(alphabet="abc", min_size=1, max_size=4),
       early=st.integers(0, 8))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_serving_s5_stop_strings_wait_for_min_tokens(text, keep, said, stop, early):
    """A stop string counts from the first token after min_tokens that completes it, and is kept when asked for (S5)."""
    ids = text.encode(said)
    answer = AnswerText(text, [stop], min_tokens=early, keep_stop=keep)
    out = "".join(answer.push(token) for token in ids) + answer.finish()
    ends = [len(text.decode(ids[:count])) for count in range(1, len(ids) + 1)]
    places = [end for end in range(len(stop), len(said) + 1) if said[end - len(stop) : end] == stop]
    late = [end for end in places if next(n for n, upto in enumerate(ends, 1) if upto >= end) > early]
    if not late:
        assert (out, answer.stop) == (said, None)
        return
    assert out == said[: late[0] if keep else late[0] - len(stop)]
    assert answer.num_tokens == next(n for n, upto in enumerate(ends, 1) if upto >= late[0])


def test_serving_s5_a_stop_that_came_too_early_is_not_found_later(text):
    """A stop string passed by within min_tokens stays text, although another one's beginning holds it back (S5)."""
    answer = AnswerText(text, ["abcd", "b"], min_tokens=2)
    out = "".join(answer.push(token) for token in text.encode("abce"))
    assert (out + answer.finish(), answer.stop) == ("abce", None)


def test_serving_s2_one_token_that_completes_two_stops(text):
    """Inside one token, too, the stop string that ends first decides (S2)."""
    [token] = text.encode(" the")
    answer = AnswerText(text, [" the", "th"])
    assert (answer.push(token), answer.stop) == (" ", "th")


@pytest.mark.parametrize("token", range(120))
def test_token_bytes_join_to_the_text(text, token):
    """Every token's bytes are those it decodes to between other tokens."""
    if token < text.vocab_size:
        around = text.encode("on")
        whole = text.decode([*around, token, *around], skip_special=False).encode()
        assert whole.decode() == (b"on" + text.token_bytes(token) + b"on").decode(errors="replace")


def test_bytes_of_broken_characters_join_to_them(text):
    """Tokens that are parts of a character have exactly its bytes between them."""
    said = "é€🙂 the\n"
    ids = text.encode(said)
    assert len(ids) > len(said) - 4
    assert b"".join(text.token_bytes(token) for token in ids) == said.encode()


def test_token_bytes_of_byte_fallback_vocabularies(tmp_path):
    """Vocabularies that spell bytes as <0xE2> and spaces as ▁ give the same bytes."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, "▁the": 1, "<0xE2>": 2, "é": 3}, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    told = TargetText(tmp_path)
    assert [told.token_bytes(token) for token in (1, 2, 3)] == [b" the", b"\xe2", "é".encode()]


def test_templates_write_json_as_transformers_does(tmp_path):
    """Tools reach the prompt as transformers' own rendering writes them, signs and umlauts unescaped."""
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    template = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ messages[0].content }}<tool_call>"
    (tmp_path / "chat_template.jinja").write_text(template)
    tools = [{"type": "function", "function": {"name": "f", "description": "a < b & 'é'"}}]
    messages = [{"role": "user", "content": "on"}]
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tools=tools, tokenize=False)
    template_here = TargetText(tmp_path).template
    assert template_here is not None
    assert template_here.render(messages, tools) == expected
    assert template_here.parses_calls
