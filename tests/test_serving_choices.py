"""Answers in the making: what a client gets is a function of the tokens, never of the rounds they came in."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pair import END, write_tokenizer

from adapter.contracts import Counts, FinishReason, Sampling, TokenLogprob
from serving import ipc
from serving.api.answer import AnswerText
from serving.api.choices import Choice, Choices, Piece, derived_seed
from serving.api.errors import ApiError
from serving.api.logprobs import chat_logprobs, completion_logprobs
from serving.api.shapes import ChatShape, TextShape, Whole, Wishes
from serving.api.speculation import spec_metrics
from serving.api.text import TargetText


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TargetText:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return TargetText(folder)


def _choice(text: TargetText, stops: list[str], *, index: int = 0, min_tokens: int = 0, keep: bool = False) -> Choice:
    submit = ipc.Submit(
        request_id="r", token_ids=[5], max_tokens=99, sampling=Sampling(), end_tokens=[END, 7], segment="s", gamma=None
    )
    answer = AnswerText(text, stops, min_tokens=min_tokens, keep_stop=keep)
    return Choice(index, submit, answer, frozenset({7}), keep)


def _rounds(ids: list[int], cuts: list[int], reason: FinishReason) -> list[ipc.Tokens]:
    """The same tokens in rounds that end at `cuts`; token i has log-prob -i."""
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(ids)}), len(ids)]
    return [
        ipc.Tokens(
            request_id="r", token_ids=ids[start:end], finish_reason=reason if end == len(ids) else None,
            logprobs=[TokenLogprob(logprob=-float(place)) for place in range(start, end)],
        )
        for start, end in pairwise(edges)
    ]  # fmt: skip


def _read(choice: Choice, rounds: list[ipc.Tokens]) -> Whole:
    whole = Whole()
    for tokens in rounds:
        piece = choice.take(tokens)
        assert len(piece.token_ids) == len(piece.offsets) == len(piece.logprobs)
        whole.add(piece)
        if choice.finished:
            break
    return whole


@given(
    said=st.text(alphabet="ab é🙂then", min_size=1, max_size=20),
    stops=st.lists(st.text("ab é🙂the", min_size=1), max_size=3),
    cuts=st.lists(st.integers(1, 60), max_size=20), reason=st.sampled_from(["stop", "length"]),
    early=st.integers(0, 5), keep=st.booleans(), end=st.sampled_from([END, 7]),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_serving_s2_n1_answers_do_not_depend_on_rounds(text, said, stops, cuts, reason, early, keep, end):
    """Text, token ids, log-probs, offsets, reasons and counts are equal for every cut into rounds (S2, S3, N1, L1)."""
    ids = text.encode(said) + ([end] if reason == "stop" else [])
    one_by_one = _choice(text, stops, min_tokens=early, keep=keep)
    expected = _read(one_by_one, _rounds(ids, list(range(len(ids))), reason))
    choice = _choice(text, stops, min_tokens=early, keep=keep)

    got = _read(choice, _rounds(ids, cuts, reason))

    assert got == expected
    assert choice.num_tokens == one_by_one.num_tokens == len(got.token_ids) == len(got.logprobs) == len(got.offsets)
    assert got.token_ids == ids[: len(got.token_ids)]
    assert [value.logprob for value in got.logprobs] == [-float(place) for place in range(len(got.token_ids))]


def test_serving_s3_stop_and_cap_in_one_block_both_orders(text):
    """A stop string inside the last block wins over the cap; a cap before it is complete wins over it (S3)."""
    ids = text.encode("abcdef")
    late = _read(_choice(text, ["de"]), _rounds(ids, [], "length"))
    assert (late.text, late.finish_reason, late.stop_reason) == ("abc", "stop", "de")
    assert len(late.token_ids) == 5
    early = _read(_choice(text, ["de"]), _rounds(ids[:4], [], "length"))
    assert (early.text, early.finish_reason, early.stop_reason) == ("abcd", "length", None)


def test_serving_s2_the_stop_that_is_complete_first_wins(text):
    """Neither the order of the list nor where a stop begins decides, only where it ends (S2)."""
    ids = text.encode("abcdef")
    for stops in (["abcdef", "cd"], ["cd", "abcdef"], ["bcde", "cd"]):
        assert _read(_choice(text, stops), _rounds(ids, [], "length")).text == "ab"


def test_end_tokens_are_tokens_and_no_text(text):
    """An end token counts; one that is ordinary text is shown only when asked for, and named only if the client did."""
    ids = text.encode("on")
    hidden = _read(_choice(text, []), _rounds([*ids, 7], [], "stop"))
    assert (hidden.text, hidden.stop_reason, len(hidden.token_ids)) == ("on", 7, len(ids) + 1)
    shown = _read(_choice(text, [], keep=True), _rounds([*ids, 7], [], "stop"))
    assert shown.text == text.decode([*ids, 7])
    own = _read(_choice(text, []), _rounds([*ids, END], [], "stop"))
    assert (own.text, own.stop_reason) == ("on", None)


def test_an_engine_that_gives_up_is_an_error(text):
    """A request that the engine ended by itself is no answer."""
    with pytest.raises(ApiError, match="ended this request"):
        _choice(text, []).take(ipc.Tokens(request_id="r", token_ids=[5], finish_reason="error"))


def test_serving_n1_n2_usage_adds_up(text):
    """Each prompt counts once, each delivered token counts, cached tokens are the first answers' (N1, N2)."""
    summary = ipc.Summary(cached_tokens=2, counts=Counts(), accepted_by_position=[], plain_rounds=0)
    choices = Choices([[5, 6, 8], [9, 9]], 2, [_choice(text, [], index=index) for index in range(4)])
    for choice, length in zip(choices.items, (1, 2, 3, 4), strict=True):
        for tokens in _rounds([20] * length, [2], "length"):
            choice.take(tokens)
        choice.summary = summary
    assert choices.usage() == {
        "prompt_tokens": 5, "completion_tokens": 10, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 4}
    }  # fmt: skip


def test_seeds_of_several_answers():
    """Answer 0 keeps the seed, the others get fixed ones of their own, and negative seeds are 64-bit patterns."""
    assert derived_seed(7, 0) == 7
    assert derived_seed(-1, 0) == (1 << 64) - 1
    seeds = [derived_seed(seed, number) for seed in range(50) for number in range(50)]
    assert len(set(seeds[50:])) > 2400
    assert derived_seed(7, 1) == derived_seed(7, 1) != derived_seed(8, 1)


# -- shapes ----------------------------------------------------------------------------------


def test_serving_l1_logprobs_have_openais_shapes(text):
    """Chats list objects with bytes; completions parallel lists, the chosen token among its alternatives (L1)."""
    first, half = text.encode("🙂")[0], text.encode("a")[0]
    values = [
        TokenLogprob(logprob=-1.5, top_ids=(half, first), top_logprobs=(-0.5, -1.5)),
        TokenLogprob(logprob=float("-inf"), top_ids=(first,), top_logprobs=(-0.25,)),
    ]
    chat = chat_logprobs(text, [first, half], values, 1)
    assert chat == {
        "content": [
            {"token": "\\xf0", "bytes": [240], "logprob": -1.5,
             "top_logprobs": [{"token": "a", "bytes": [97], "logprob": -0.5}]},
            {"token": "a", "bytes": [97], "logprob": -9999.0,
             "top_logprobs": [{"token": "\\xf0", "bytes": [240], "logprob": -0.25}]},
        ],
        "refusal": None,
    }  # fmt: skip
    assert completion_logprobs(text, [first, half], values, [0, 0], 1) == {
        "text_offset": [0, 0], "token_logprobs": [-1.5, -9999.0], "tokens": ["bytes:\\xf0", "a"],
        "top_logprobs": [{"a": -0.5, "bytes:\\xf0": -1.5}, {"bytes:\\xf0": -0.25, "a": -9999.0}],
    }  # fmt: skip
    alone = completion_logprobs(text, [half], [TokenLogprob(logprob=-2.0)], [3], 0)
    assert alone["top_logprobs"] == [{"a": -2.0}]


SAID = 'the one \n<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>\n'


@given(cuts=st.lists(st.integers(1, 200), max_size=60))
@settings(max_examples=100, deadline=None)
def test_serving_t1_streamed_tool_calls_are_the_whole_ones(text, cuts):
    """Deltas of a stream, in any rounds, add up to the message of the whole answer (T1)."""
    ids = [*text.encode(SAID), END]
    wishes = Wishes(tools=True)
    choices = Choices([[5]], 1, [_choice(text, [])])
    whole = ChatShape("c", "m", text, wishes, choices).whole([_read(_choice(text, []), _rounds(ids, [], "stop"))])
    message = whole["choices"][0]["message"]
    assert message["content"] == "the one"
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": "é"}'}
    assert whole["choices"][0]["finish_reason"] == "tool_calls"

    choice, shape = _choice(text, []), ChatShape("c", "m", text, wishes, choices)
    events = [event for tokens in _rounds(ids, cuts, "stop") for event in shape.chunks(choice.take(tokens))]

    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == "the one"
    [call] = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert (call["index"], call["function"]) == (0, message["tool_calls"][0]["function"])
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "tool_calls"


def test_a_length_stays_a_length_with_tools(text):
    """An answer that was cut is not called complete because a tool call was in it."""
    choices = Choices([[5]], 1, [_choice(text, [])])
    whole = _read(_choice(text, []), _rounds(text.encode(SAID), [], "length"))
    body = ChatShape("c", "m", text, Wishes(tools=True), choices).whole([whole])
    assert body["choices"][0]["finish_reason"] == "length"


def test_chunks_show_only_what_was_asked_for(text):
    """Held-back text makes no chunk, unless log-probs, token ids or running usage were asked for."""
    choices = Choices([[5]], 1, [_choice(text, [])])
    silent = Piece(0, "", [5], [0], [TokenLogprob(logprob=-1.0)])
    assert not TextShape("c", "m", text, Wishes(), choices).chunks(silent)
    for wishes in (Wishes(num_logprobs=0), Wishes(token_ids=True), Wishes(running_usage=True)):
        assert len(TextShape("c", "m", text, wishes, choices).chunks(silent)) == 1
    [last] = TextShape("c", "m", text, Wishes(usage=True), choices).chunks(replace(silent, finish_reason="length"))
    assert last["usage"] is None


def test_serving_n3_n4_speculation_is_reported_in_vllms_shape():
    """Rates divide by what was drafted, the histogram by what each round accepted; answers add up (N3, N4)."""
    one = ipc.Summary(
        cached_tokens=0, counts=Counts(num_rounds=4, num_drafted=10, num_examined=8, num_accepted=5),
        accepted_by_position=[3, 2], plain_rounds=1,
    )  # fmt: skip
    told = spec_metrics([one], 3)
    assert told == {
        "mean_acceptance_length": 2.25, "draft_acceptance_rate": 0.5, "acceptance_histogram": [1, 1, 2, 0],
        "num_spec_steps": 4, "num_accepted_draft_tokens": 5, "num_draft_tokens": 10, "num_spec_tokens": 3,
        "num_accepted_tokens_per_pos": [3, 2], "num_plain_steps": 1,
    }  # fmt: skip
    both = spec_metrics([one, one], 3)
    assert both["acceptance_histogram"] == [2, 2, 4, 0]
    assert sum(place * count for place, count in enumerate(both["acceptance_histogram"])) == 10
    nothing = spec_metrics([], 3)
    assert (nothing["mean_acceptance_length"], nothing["draft_acceptance_rate"]) == (None, None)
    assert nothing["acceptance_histogram"] == [0, 0, 0, 0]
