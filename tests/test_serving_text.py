"""Tokens to text one at a time: nothing lost, nothing doubled, stop strings cut wherever tokens end."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny_pair import END, write_spaced_tokenizer, write_tokenizer
from tokenizers import decoders

from adapter.contracts import SettingsError
from serving.api.answer import AnswerText
from serving.api.errors import ApiError
from serving.api.text import TargetText

ALL = st.lists(st.integers(3, 119), max_size=30)
SPELLINGS = ("byte_level", "byte_fallback", "metaspace")
UNKNOWN = 5000  # no token of any vocabulary here


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TargetText:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return TargetText(folder)


@pytest.fixture(scope="module")
def spelled(text, tmp_path_factory) -> dict[str, TargetText]:
    """Tokenizers by how they spell a space; all but the first drop the one that a text begins with."""
    written = {"byte_level": text}
    for name, decoder in (("byte_fallback", None), ("metaspace", decoders.Metaspace(prepend_scheme="always"))):
        folder = tmp_path_factory.mktemp(name)
        write_spaced_tokenizer(folder, decoder)
        written[name] = TargetText(folder)
    return written


def _bytes(text: TargetText, said: str) -> list[int]:
    """The byte tokens of a text."""
    return text.encode(said) if text.token_text(3) != "<0x00>" else [3 + byte for byte in said.encode()]


def _continue(text: TargetText, prompt: list[int], ids: list[int], *, skip_special: bool = True) -> str:
    answer = AnswerText(text, [], prompt=prompt, skip_special=skip_special)
    return "".join([*map(answer.push, ids), answer.finish()])


def _read(text: TargetText, ids: list[int], stops: list[str]) -> tuple[str, int, bool]:
    answer = AnswerText(text, stops)
    out = "".join(answer.push(token) for token in ids)
    return out + answer.finish(), answer.num_tokens, answer.stopped


@given(ids=ALL)
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_whole_text(text, ids):
    """Any tokens, broken UTF-8 included, read one at a time give what decoding them at once gives."""
    assert _read(text, ids, [])[0] == text.decode(ids)


# Negative ones count from the vocabulary's end, where its pieces are; texts are spelled byte by byte.
_ATOMS = st.lists(st.integers(-12, -1) | st.sampled_from([0, 1, 2, UNKNOWN, "€", "🙂", " "]), max_size=12)


@pytest.mark.parametrize("spelling", SPELLINGS)
@given(prompt=_ATOMS, said=_ATOMS, skip=st.booleans())
@example(prompt=[1, -1], said=[-1, -4], skip=True)
@example(prompt=[-1, 1, 2, 1, 2, 1, 2], said=[-1], skip=True)  # special tokens end the prompt
@example(prompt=[-1, *[UNKNOWN] * 9], said=[-1], skip=True)
@example(prompt=[1], said=[-12, -1], skip=True)  # nothing but a space is said at first
@example(prompt=["€", "€", "€"], said=["€", -1], skip=True)
@example(prompt=["🙂", "🙂", "🙂"], said=["🙂", "🙂", -1], skip=True)
@settings(max_examples=300, deadline=None)
def test_answers_add_to_their_prompts_text(spelled, spelling, prompt, said, skip):
    """What is read, token by token, is what the answer adds to the decoded prompt: spaces and characters whole."""
    text = spelled[spelling]

    def tokens(atoms: list[int | str]) -> list[int]:
        lists = [_bytes(text, a) if isinstance(a, str) else [a + text.vocab_size if a < 0 else a] for a in atoms]
        return [token for part in lists for token in part]

    before = text.decode(tokens(prompt), skip_special=skip)
    whole = text.decode(tokens(prompt + said), skip_special=skip)
    assert whole.startswith(before)
    assert _continue(text, tokens(prompt), tokens(said), skip_special=skip) == whole[len(before) :]


@given(prompt=ALL, said=ALL)
@settings(max_examples=300, deadline=None)
def test_broken_characters_of_a_prompt_stay_its_own(text, prompt, said):
    """Tokens that are any bytes: wherever decoding only adds to the prompt's text, the answer is what it adds."""
    before, whole = text.decode(prompt), text.decode(prompt + said)
    assume(whole.startswith(before))
    assert _continue(text, prompt, said) == whole[len(before) :]


@pytest.mark.parametrize("spelling", ["byte_level", "byte_fallback"])
def test_characters_broken_off_are_whole_where_they_can_be(spelled, spelling):
    """An answer completes its prompt's last character; broken bytes take nothing from the characters beside them."""
    text = spelled[spelling]
    euro, smile, letter = _bytes(text, "€"), _bytes(text, "🙂"), text.encode("a")[-1:]
    assert _continue(text, [*letter, *euro, *euro[:2]], [*euro[2:], *letter]) == "€a"
    assert AnswerText(text, [], prompt=[*letter, *smile[:3]]).push(smile[3]) == "🙂"
    assert _continue(text, [*letter, *smile[:3]], [*smile[3:], *euro]) == "🙂€"
    assert _continue(text, euro[:2], letter) == "a"
    for whole in (letter, euro):
        said = _continue(text, letter, [*whole, *euro[:1], *letter])
        assert said == text.decode(whole) + "�a"
        cut = _continue(text, letter, [*whole, *smile[:2]])
        assert cut.rstrip("�") == text.decode(whole)
        assert 1 <= cut.count("�") <= 2


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


def test_token_bytes_of_a_metaspace_vocabulary(spelled):
    """A token that begins a word is told with its space, also where the decoder drops a text's first one."""
    told = spelled["metaspace"]
    words = [number for number in range(told.vocab_size) if told.token_text(number).startswith("▁")]
    assert words
    assert all(told.token_bytes(number) == told.token_text(number).replace("▁", " ").encode() for number in words)
    assert any(told.decode([number]) == told.token_text(number)[1:] for number in words)
