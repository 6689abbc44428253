"""A suffix automaton that grows by one token at a time: where did the end of this text occur before?

Amortised constant work a token, whatever the length of the text; about 150 bytes a token of ordinary text.  Knows
nothing about requests, tenants or models.  Used by `ngram` and `past`.  Source: Blumer et al., "The
smallest automaton recognizing the subwords of a text", 1985.

A state stands for all substrings that end at the same places.  State 0 is the empty string.
"""

from __future__ import annotations

from array import array
from itertools import islice

SEPARATOR = -1  # between texts that have nothing to do with each other; no token has this id
_COUNTED = 8  # states whose counts a token brings up to date, longest strings first
_LOOKED_AT = 64  # continuations compared, those seen first


class SuffixAutomaton:
    """All substrings of a text, each with one of its last ends and how often it occurred.

    `match_tokens` is the length of the longest suffix of the text that occurs in it before, and
    `match_end` the index of the last token of such an occurrence; 0 and -1 where there is none.
    Counts are exact but in long repetitions, where those of short strings are too small.
    """

    __slots__ = (
        "_branches", "_child", "_count", "_end", "_last", "_length", "_link", "_token", "match_end", "match_tokens",
        "text",
    )  # fmt: skip

    def __init__(self) -> None:
        self.text = array("i")
        self.match_tokens = 0
        self.match_end = -1
        self._length = array("i", [0])  # of a state's longest string
        self._link = array("i", [-1])  # the state of the longest suffix that ends elsewhere too
        self._end = array("i", [-1])
        self._count = array("i", [0])
        self._token = array("i", [SEPARATOR])  # most states have one continuation: it lies here
        self._child = array("i", [0])
        self._branches: dict[int, dict[int, int]] = {}  # the continuations of states with more than one
        self._last = 0

    def append(self, token: int) -> None:
        """Add a token to the text."""
        index = len(self.text)
        self.text.append(token)
        new = self._state(index + 1, index, 1)
        tokens, children, links, branches = self._token, self._child, self._link, self._branches
        state, child = self._last, 0
        while state >= 0:  # `_next` and its opposite, written out: this is the one loop that costs
            many = branches.get(state)
            if many is not None:
                child = many.get(token, 0)
                if child:
                    break
                many[token] = new
            elif tokens[state] == token and children[state]:
                child = children[state]
                break
            elif children[state]:
                branches[state] = {tokens[state]: children[state], token: new}
            else:
                tokens[state], children[state] = token, new
            state = links[state]
        if child:
            links[new] = child if self._length[child] == self._length[state] + 1 else self._split(child, state, token)
        self._last = new
        self._note(links[new], index)

    def follow(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Return the state and length of the longest suffix of (a match, a token) that occurs in the text.

        `state` and `length` are what the last call returned, or 0 and 0; tokens may have been
        appended since.
        """
        state = self._settled(state, length)
        while not (child := self._next(state, token)):
            if not state:
                return 0, 0
            state = self._link[state]
            length = self._length[state]
        return child, length + 1

    def likely(self, state: int, length: int, num_tokens: int, shortest: int) -> list[int]:
        """Return the most frequent continuation of a match, at most `num_tokens` long.

        It ends where the text most often ended, and where fewer than `shortest` tokens of context
        are known.  Of equally frequent tokens the one seen last wins.
        """
        state = self._settled(state, length)
        tokens: list[int] = []
        while len(tokens) < num_tokens and length >= shortest:
            ranked = [(self._count[child], self._end[child], token, child) for token, child in self._children(state)]
            if not ranked:  # the very end of the text: what a shorter context says
                state = self._link[state]
                length = self._length[state] if state >= 0 else 0
                continue
            _, _, token, state = max(ranked)
            if token == SEPARATOR:
                break
            tokens.append(token)
            length += 1
        return tokens

    def _state(self, length: int, end: int, count: int) -> int:
        self._length.append(length)
        self._link.append(0)
        self._end.append(end)
        self._count.append(count)
        self._token.append(SEPARATOR)
        self._child.append(0)
        return len(self._length) - 1

    def _next(self, state: int, token: int) -> int:
        """Return where a token leads to, 0 where to nowhere."""
        branches = self._branches.get(state)
        if branches is not None:
            return branches.get(token, 0)
        return self._child[state] if self._token[state] == token else 0

    def _children(self, state: int) -> list[tuple[int, int]]:
        """Return the continuations, (token, state) each; of very many only the first."""
        branches = self._branches.get(state)
        if branches is not None:
            return list(islice(branches.items(), _LOOKED_AT))
        return [(self._token[state], self._child[state])] if self._child[state] else []

    def _split(self, child: int, parent: int, token: int) -> int:
        """Give the shorter strings of `child`, those that end at the new token too, a state of their own."""
        short = self._state(self._length[parent] + 1, self._end[child], self._count[child])
        self._link[short] = self._link[child]
        self._link[child] = short
        self._token[short], self._child[short] = self._token[child], self._child[child]
        if child in self._branches:
            self._branches[short] = dict(self._branches[child])
        while parent >= 0 and self._next(parent, token) == child:
            if parent in self._branches:
                self._branches[parent][token] = short
            else:
                self._child[parent] = short
            parent = self._link[parent]
        return short

    def _note(self, state: int, index: int) -> None:
        """Remember the longest earlier match, then count the new end for it and for shorter ones."""
        ends, counts, links = self._end, self._count, self._link
        self.match_tokens, self.match_end = self._length[state], ends[state]
        for _ in range(_COUNTED):
            if not state:
                break
            counts[state] += 1
            ends[state] = index
            state = links[state]

    def _settled(self, state: int, length: int) -> int:
        """Return the state a string of this length belongs to now: states split as the text grows."""
        while state > 0 and length <= self._length[self._link[state]]:
            state = self._link[state]
        return state
