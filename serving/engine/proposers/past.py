"""Draft by matching against what was answered before: a bounded memory of past outputs for every tenant.

A tenant is (cache salt, segment): nobody is ever proposed what another tenant was told.  A tree is an
automaton over the outputs of one tenant; each tenant has an old and a young one, and when the young one
is full the old one is dropped and the young one becomes old.  All tenants together hold at most
`max_tokens` tokens, about 150 bytes each; the tenant that was not used for longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import count

from serving.engine.proposers.base import Offer, Proposal
from serving.engine.proposers.matched import matched_proposal
from serving.engine.proposers.ngram import NOTHING, SHORTEST
from serving.engine.proposers.suffix import SEPARATOR, SuffixAutomaton
from serving.engine.sequence import Sequence

Tenant = tuple[str, str]

_LEAD_TOKENS = 8  # of the prompt, learned with its answer, so that an answer's first tokens can be proposed
_LOOK_BACK_TOKENS = 64  # how far back a request is read that is new to a tree
_SHARE = 4  # a tree holds at most this part of all tokens, so one tenant holds at most half
_TENANTS = 64
_LEARN_AT_END = 256  # tokens learned when a request ends, about half a millisecond
_LEARN_A_ROUND = 32  # more than a round can commit, so that what waits stays less than what runs


@dataclass(slots=True)
class _Tree:
    serial: int
    text: SuffixAutomaton = field(default_factory=SuffixAutomaton)


@dataclass(slots=True)
class _Cursor:
    """How far a request was read against one tree, and what of its end was found there."""

    read: int
    state: int = 0
    length: int = 0


@dataclass(frozen=True, slots=True)
class _Found:
    tree: _Tree
    state: int
    length: int


class PastOutputs:
    """Propose the most frequent continuation of the longest suffix that the tenant's past outputs contain.

    Under the maximal coupling only greedy requests are offered anything: a past output of the same
    seed was drawn with the very noise that would judge it, and the law would be wrong.

    Args:
        max_tokens: remembered by all tenants together.
        vocab: width of the target's logits where the coupling is maximal, None where it is gumbel.
    """

    name = "past"

    def __init__(self, *, max_tokens: int, vocab: int | None = None) -> None:
        self._max_tokens = max_tokens
        self._vocab = vocab
        self._tenants: OrderedDict[Tenant, list[_Tree]] = OrderedDict()  # used last comes last; trees: young, old
        self._cursors: dict[str, dict[int, _Cursor]] = {}  # request, then serial of the tree
        self._waiting: deque[tuple[Tenant, deque[int]]] = deque()
        self._serials = count()
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens remembered now."""
        return self._num_tokens

    @property
    def num_tenants(self) -> int:
        """Tenants remembered now."""
        return len(self._tenants)

    def offer(self, request: Sequence, limit: int) -> Offer:
        """Offer a continuation of the longest match; it may turn out shorter where past outputs ended."""
        if request.gamma == 0 or (self._vocab is not None and request.sampling.temperature > 0):
            return NOTHING
        found = self._find(request)
        if found is None or not self._continue(found, 1):
            return NOTHING
        return Offer(limit, match_tokens=found.length)

    def propose(self, requests: list[Sequence], gammas: list[int]) -> list[Proposal]:
        """Say what most often followed."""
        proposals = []
        for request, gamma in zip(requests, gammas, strict=True):
            found = self._find(request)
            tokens = self._continue(found, gamma) if found else []
            proposals.append(matched_proposal(self.name, tokens, self._vocab))
        return proposals

    def committed(self, request: Sequence, before: int, proposal: Proposal, num_accepted: int) -> None:
        """Learn a little of what waits; a round is too short to learn a long answer in."""
        if self._waiting:
            self._learn(_LEARN_A_ROUND)

    def ended(self, request: Sequence) -> None:
        """Remember the output, and forget the request."""
        self._cursors.pop(request.request_id, None)
        if request.num_generated:
            lead = request.tokens[max(0, request.prompt_tokens - _LEAD_TOKENS) :]
            self._waiting.append((_tenant(request), deque([*lead, SEPARATOR])))
        self._learn(_LEARN_AT_END)

    def _find(self, request: Sequence) -> _Found | None:
        """Read what is new of a request against its tenant's trees, and return the longest match."""
        key = _tenant(request)
        trees = self._tenants.get(key)
        if trees is None:
            return None
        self._tenants.move_to_end(key)
        cursors = self._cursors.setdefault(request.request_id, {})
        best: _Found | None = None
        for tree in trees:
            cursor = cursors.setdefault(tree.serial, _Cursor(0))
            self._read(request, tree, cursor)
            if cursor.length >= SHORTEST and (best is None or cursor.length > best.length):
                best = _Found(tree, cursor.state, cursor.length)
        if len(cursors) > len(trees):
            alive = {tree.serial for tree in trees}
            self._cursors[request.request_id] = {serial: item for serial, item in cursors.items() if serial in alive}
        return best

    @staticmethod
    def _read(request: Sequence, tree: _Tree, cursor: _Cursor) -> None:
        end = len(request.tokens)
        if end - cursor.read > _LOOK_BACK_TOKENS:
            cursor.read, cursor.state, cursor.length = end - _LOOK_BACK_TOKENS, 0, 0
        state, length = cursor.state, cursor.length
        for token in request.tokens[cursor.read :]:
            state, length = tree.text.follow(state, length, token)
        cursor.read, cursor.state, cursor.length = end, state, length

    @staticmethod
    def _continue(found: _Found, num_tokens: int) -> list[int]:
        return found.tree.text.likely(found.state, found.length, num_tokens, SHORTEST)

    def _learn(self, num_tokens: int) -> None:
        """Learn so many of the tokens that wait, one output after the other."""
        while num_tokens > 0 and self._waiting:
            key, tokens = self._waiting[0]
            tree = self._young(key)
            for _ in range(min(num_tokens, len(tokens))):
                tree.text.append(tokens.popleft())
                num_tokens -= 1
                self._num_tokens += 1
                if len(tree.text.text) >= self._max_tokens // _SHARE:
                    break
            if not tokens:
                self._waiting.popleft()
        while self._num_tokens > self._max_tokens or len(self._tenants) > _TENANTS:
            self._drop(self._tenants.popitem(last=False)[1])

    def _young(self, key: Tenant) -> _Tree:
        """Return the tree a tenant learns into; a full one grows old and takes its predecessor's place."""
        trees = self._tenants.setdefault(key, [])
        self._tenants.move_to_end(key)
        if not trees or len(trees[0].text.text) >= self._max_tokens // _SHARE:
            self._drop(trees[1:])
            trees[:] = [_Tree(next(self._serials)), *trees[:1]]
        return trees[0]

    def _drop(self, trees: list[_Tree]) -> None:
        self._num_tokens -= sum(len(tree.text.text) for tree in trees)


def _tenant(request: Sequence) -> Tenant:
    return request.cache_salt, request.segment
