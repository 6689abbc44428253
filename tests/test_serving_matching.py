"""Matching without an engine: what is found in a text, what is remembered, for whom, and at what price."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_rig import request
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.proposers.base import Proposal
from serving.engine.proposers.ngram import SHORTEST, NgramProposer
from serving.engine.proposers.past import PastOutputs
from serving.engine.proposers.suffix import SEPARATOR, SuffixAutomaton
from serving.engine.sequence import Sequence

N = 32


def _lines(action: Callable[[], object]) -> int:
    """Count the lines of our modules that an action executes."""
    lines = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal lines
        if "proposers" not in frame.f_code.co_filename:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return lines


# -- the automaton ---------------------------------------------------------------------------


def _occurs(text: list[int], wanted: list[int]) -> list[int]:
    """Where `wanted` ends in `text`."""
    return [i + len(wanted) - 1 for i in range(len(text) - len(wanted) + 1) if text[i : i + len(wanted)] == wanted]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4).flatmap(lambda top: st.lists(st.integers(0, top), max_size=40)))
def test_the_index_finds_what_a_search_finds(tokens):
    """After every token the match is the longest suffix that occurs before, at a place where it does."""
    index = SuffixAutomaton()
    for end, token in enumerate(tokens):
        index.append(token)
        text = tokens[: end + 1]
        longest = max((n for n in range(end + 1) if len(_occurs(text, text[end + 1 - n :])) > 1), default=0)
        assert index.match_tokens == longest
        if longest:
            assert index.match_end in _occurs(text, text[-longest:])[:-1]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-1, 2)), min_size=20, max_size=70))
def test_following_another_text_while_the_tree_grows(steps):
    """A match is true at every step, and what it is continued by did follow it; without growth it is the longest."""
    tree, text, query = SuffixAutomaton(), [], []
    state = length = 0
    for learns, token in steps:
        if learns or token == SEPARATOR:
            tree.append(token)
            text.append(token)
            continue
        query.append(token)
        state, length = tree.follow(state, length, token)
        assert not length or _occurs(text, query[-length:])
        likely = tree.likely(state, length, 3, 1)
        if likely:
            assert SEPARATOR not in likely
            assert any(_occurs(text, [*query[-n:], likely[0]]) for n in range(1, length + 1))
    state = length = 0
    for end, token in enumerate(query):
        state, length = tree.follow(state, length, token)
        assert length == max(n for n in range(end + 2) if not n or _occurs(text, query[end + 1 - n : end + 1]))


def test_the_most_frequent_continuation_wins():
    """Of what followed a context the most frequent token is proposed, of equals the newer; texts stay apart."""
    tree = SuffixAutomaton()
    for text in ([1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6], [9, 2, 5], [9, 2, 5]):
        for token in [*text, SEPARATOR]:
            tree.append(token)

    def after(*context: int) -> list[int]:
        state = length = 0
        for token in context:
            state, length = tree.follow(state, length, token)
        return tree.likely(state, length, 4, 1)

    assert after(1, 2) == [3, 6]
    assert after(9, 2) == [5]
    assert after(2) == [5]
    assert after(1, 2, 5) == []


# -- a request's own text --------------------------------------------------------------------


def test_a_match_is_continued_and_a_repetition_repeated():
    """What followed the longest match is copied; a match that reaches the end of the text goes round."""
    proposer = NgramProposer()
    text = request("a", [1, 2, 3, 4, 5, 6, 7, 9, 3, 4, 8, 0, 2, 3, 4], N)
    assert proposer.offer(text, 4).match_tokens == 3
    assert proposer.propose([text], [4])[0].tokens == [5, 6, 7, 9]
    loop = request("b", [9, 1, 2, 3, 1, 2, 3, 1, 2], N)
    assert proposer.offer(loop, 7).match_tokens == 5
    assert proposer.propose([loop], [7])[0].tokens == [3, 1, 2, 3, 1, 2, 3]
    assert proposer.offer(request("c", [1, 2, 3, 1], N), 4).num_tokens == 0, f"one token is less than {SHORTEST}"
    assert proposer.offer(request("d", [1, 2, 1, 2], N, gamma=0), 4).num_tokens == 0
    for name in "abcd":
        proposer.ended(request(name, [1], N))
    assert not proposer._read


def test_a_long_prompt_is_read_in_parts():
    """A prompt of five thousand tokens is offered nothing until it is read, and no round reads it all."""
    proposer, item = NgramProposer(), request("a", [*range(2500)] * 2, N)
    rounds = 0
    while not proposer.offer(item, 4).num_tokens:
        rounds += 1
        assert rounds < 20
    assert rounds >= 5
    assert proposer.propose([item], [3])[0].tokens == [0, 1, 2]


@pytest.mark.parametrize("kind", ["words", "loop"])
def test_a_round_costs_the_same_at_any_length(kind):
    """Lines executed in forty rounds after 20 000 tokens are at most twice those after 1 000, own text or past."""
    generator = random.Random(1)
    if kind == "words":
        tokens = [min(int(generator.paretovariate(0.6)), 5000) for _ in range(20_200)]
    else:
        tokens = [i % 7 for i in range(20_200)]
    own, past = NgramProposer(), PastOutputs(max_tokens=200_000)
    costs = []
    item = request("a", tokens[:1000], 1 << 20)
    for length in (1000, 20_000):
        learned = request("b", tokens[:length], 1 << 20)
        learned.prompt_tokens = 0
        past.ended(learned)
        item.tokens = tokens[:length]
        while past._waiting or not own._match(item):
            past.committed(item, 0, Proposal(), 0)

        def forty_rounds(length: int = length) -> None:
            for i in range(40):
                item.tokens.append(tokens[length + i])
                for proposer in (own, past):
                    proposer.offer(item, 4)
                    proposed = proposer.propose([item], [4])[0]
                    proposer.committed(item, len(item.tokens) - 1, proposed, 0)

        costs.append(_lines(forty_rounds))
    assert 0 < costs[1] < 2 * costs[0]


# -- past outputs ----------------------------------------------------------------------------


def _ended(name: str, prompt: list[int], output: list[int], *, salt: str = "", segment: str = "test") -> Sequence:
    item = request(name, [*prompt, *output], len(output))
    item.prompt_tokens, item.cache_salt, item.segment = len(prompt), salt, segment
    return item


def test_an_answer_is_proposed_to_the_next_one_who_asks():
    """From the prompt's last tokens on, what was answered before is proposed, as long as it lasts."""
    past = PastOutputs(max_tokens=4096)
    prompt, answer = [7, 8, 9], [20, 21, 22, 23]
    assert past.offer(request("a", prompt, N), 8).num_tokens == 0
    past.ended(_ended("a", prompt, answer))
    item = request("b", [5, *prompt], N)
    assert past.offer(item, 8).match_tokens == 3
    assert past.propose([item], [8])[0].tokens == answer
    assert past.propose([item], [2])[0].tokens == answer[:2]
    item.tokens += answer[:3]
    assert past.offer(item, 8).match_tokens == 6
    assert past.propose([item], [8])[0].tokens == answer[3:]
    item.tokens += answer[3:]
    assert past.offer(item, 8).num_tokens == 0, "nothing ever followed"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_no_tenant_is_proposed_what_another_was_told(seed):
    """Whatever four tenants say, in any order, each is only proposed tokens that only it ever said.

    Salt and segment are told apart: ("a", "bc") is not ("ab", "c").
    """
    generator = random.Random(seed)
    past = PastOutputs(max_tokens=1024)
    tenants = [("a", "bc"), ("ab", "c"), ("", "abc"), ("abc", "")]
    running: dict[str, Sequence] = {}
    proposed = 0
    for step in range(120):
        who = generator.randrange(4)
        salt, segment = tenants[who]
        name = f"{who}-{generator.randrange(2)}"
        if name not in running:
            running[name] = _ended(name, [1, 2, 3], [], salt=salt, segment=segment)  # all prompts are equal
            running[name].max_tokens = 1 << 20
        item = running[name]
        if past.offer(item, 4).num_tokens:
            tokens = past.propose([item], [4])[0].tokens
            proposed += len(tokens)
            assert all(token // 100 == who + 1 or token <= 3 for token in tokens)
        item.tokens += [100 * (who + 1) + generator.randrange(3), generator.randrange(1, 4)]
        past.committed(item, 0, Proposal(), 0)
        if step % 11 == 10:
            past.ended(running.pop(name))
    assert proposed


def test_memory_is_bounded():
    """After ten thousand requests of a hundred tenants no more than the limit is held, and nothing of a request."""
    generator, past, own = random.Random(3), PastOutputs(max_tokens=5000), NgramProposer()
    for i in range(10_000):
        item = _ended(
            str(i), [1, 2], [generator.randrange(50) for _ in range(8)], segment=str(i % 2 and generator.randrange(100))
        )
        for proposer in (past, own):
            proposer.offer(item, 4)
            proposer.committed(item, 2, Proposal(), 0)
            proposer.ended(item)
        trees = [tree for trees in past._tenants.values() for tree in trees]
        assert past.num_tokens == sum(len(tree.text.text) for tree in trees) <= 5000
        assert past.num_tenants <= 64
    assert past.num_tokens > 1250
    assert not past._cursors
    assert not past._waiting
    assert not own._read


def test_a_tenant_forgets_its_oldest_outputs_first():
    """One tenant keeps between a quarter and half of all tokens: the newest; a cursor into what is gone is dropped."""
    past = PastOutputs(max_tokens=4096)
    item = request("watch", [1, 2], 1 << 20)
    for i in range(400):
        past.ended(_ended(str(i), [1, 2], [1000 + i, 2000 + i, 3000 + i]))
        past.offer(item, 4)
        assert past.num_tokens <= 2048
        assert len(past._cursors["watch"]) <= 2
    newest, oldest = (request(f"q{i}", [1000 + i, 2000 + i], N) for i in (399, 0))
    assert past.propose([newest], [1])[0].tokens == [3399]
    assert past.offer(oldest, 4).num_tokens == 0


def test_a_long_answer_is_learned_over_several_rounds():
    """The end of a long answer is not learned in one step, and waits for no more than the rounds that follow."""
    past = PastOutputs(max_tokens=40_000)
    past.ended(_ended("a", [1], list(range(2, 2000))))
    assert past.num_tokens < 500
    item = request("b", [1997, 1998], N)
    for _ in range(100):
        past.committed(item, 0, Proposal(), 0)
    assert past.propose([item], [4])[0].tokens == [1999]


# -- under the maximal coupling ---------------------------------------------------------------


def test_one_hot_laws():
    """A matched proposal carries one law a token under the maximal coupling, all of it on that token, and else none."""
    item = request("a", [1, 2, 3, 1, 2], N)
    assert NgramProposer().propose([item], [2])[0].scaled == []
    proposal = NgramProposer(vocab=10).propose([item], [2])[0]
    assert proposal.tokens == [3, 1]
    assert torch.softmax(torch.stack(proposal.scaled), -1).equal(torch.nn.functional.one_hot(torch.tensor([3, 1]), 10))
    assert (proposal.proposer, proposal.version, proposal.logprobs) == ("ngram", None, [])
