"""JSON answers: which tokens may come next so that an answer still fits its grammar.

llguidance does the parsing, on the target's own tokenizer.  A grammar is compiled when its request
arrives, in the decoding thread: most schemas take one to three milliseconds and the worst one found
within the limits below 70, once, so a queue of half-admitted requests would cost more than it
saves.  Whitespace is at most one space, so that no model can fill its answer with blanks.
Used by `serving.engine.admission` and `serving.engine.constraints`.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from adapter.contracts import DraftsmithError, Grammar

log = structlog.get_logger(__name__)

MAX_SCHEMA_BYTES = 32 * 1024
_KEPT = 64  # compiled grammars
_OPTIONS = {"whitespace_pattern": " ?", "lenient": False, "coerce_one_of": False}
_RESTRICTED = "x-guidance"  # would let a schema change the options above


def _limits() -> LLParserLimits:
    """Bounds on compiling, on one mask, and on the memory of one matcher (about 2 kB a lexer state)."""
    return LLParserLimits(
        max_grammar_size=30_000, initial_lexer_fuel=400_000, step_lexer_fuel=100_000, step_max_items=25_000,
        max_lexer_states=25_000, verbose_errors=False,
    )  # fmt: skip


class GrammarError(DraftsmithError):
    """Raised when a grammar cannot be used; the message says why."""


def _read_tokenizer(path: Path, vocab: int) -> LLTokenizer:
    text = path.read_text(encoding="utf-8")
    slices = LLTokenizer.json_slices()
    tokenizer = LLTokenizer(text, n_vocab=vocab, slices=slices)
    if tokenizer.is_special_token(tokenizer.eos_token):
        return tokenizer
    special = next((token for token in range(vocab) if tokenizer.is_special_token(token)), None)
    if special is None:
        raise ValueError("it has no special token")
    return LLTokenizer(text, n_vocab=vocab, eos_token=special, slices=slices)


def _grammar_text(schema: str) -> str:
    """Wrap a JSON schema for llguidance.

    Without `no_forcing` it would allow one spelling only wherever the text is certain; every token
    that fits is allowed instead, so that the law is the target's own over all fitting answers.
    """
    size = len(schema.encode())
    if size > MAX_SCHEMA_BYTES:
        raise GrammarError(f"the schema has {size} bytes; at most {MAX_SCHEMA_BYTES} are compiled")
    if _RESTRICTED in schema:
        raise GrammarError(f"the schema names {_RESTRICTED!r}, which is not part of JSON Schema")
    try:
        read = json.loads(schema)
        if not isinstance(read, dict):
            raise GrammarError(f"the schema is {schema[:40]!r}; expected a JSON object")
        whole = json.dumps(read | {_RESTRICTED: _OPTIONS})
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is not JSON: {error}") from None
    return LLMatcher.grammar_from_lark(f'%llguidance {{"no_forcing": true}}\nstart: %json {whole}')


class _Compiled:
    """A grammar ready for use.  What its matchers learn while they run is shared, limits included."""

    def __init__(self, text: str, tokenizer: LLTokenizer) -> None:
        self._text = text
        self._tokenizer = tokenizer
        self._matcher = LLMatcher(tokenizer, text, log_level=0, limits=_limits())
        if not self._matcher.is_error():
            self._matcher.compute_bitmask()  # a grammar whose very first mask is too much work is refused
        if self._matcher.is_error():
            raise GrammarError(f"the schema cannot be compiled: {self._matcher.get_error().splitlines()[0]}")

    def matcher(self) -> LLMatcher:
        """Return a matcher at the start."""
        return self._matcher.deep_copy()

    def renew(self) -> LLMatcher:
        """Return a matcher that has learnt nothing yet, as later ones will be: one of them hit a limit."""
        self._matcher = LLMatcher(self._tokenizer, self._text, log_level=0, limits=_limits())
        return self._matcher.deep_copy()


class Grammars:
    """The grammars of one target: compiled on demand, the last few kept.

    Args:
        tokenizer: the target's tokenizer.json; read when the first grammar is asked for, or by `preload`.
        vocab: width of the target's logits.
    """

    def __init__(self, tokenizer: Path, vocab: int) -> None:
        self._path = tokenizer
        self._vocab = vocab
        self._read: LLTokenizer | None = None
        self._reading = threading.Lock()
        self._compiled: OrderedDict[Grammar, _Compiled] = OrderedDict()

    def preload(self) -> None:
        """Read the tokenizer in a thread of its own: half a second that no running request should wait for."""
        threading.Thread(target=self._try_tokenizer, name="grammar-tokenizer", daemon=True).start()

    def _try_tokenizer(self) -> None:
        with contextlib.suppress(GrammarError):  # said to whoever asks for a grammar
            self._tokenizer()

    def _tokenizer(self) -> LLTokenizer:
        """Return the target's tokenizer as llguidance reads it; its end token is one that no text holds.

        Raises:
            GrammarError: it cannot be read.
        """
        with self._reading:
            if self._read is None:
                try:
                    self._read = _read_tokenizer(self._path, self._vocab)
                except (OSError, ValueError) as error:
                    raise GrammarError(
                        f"this target's tokenizer cannot be used for structured output: {error}"
                    ) from None
            return self._read

    def open(self, grammar: Grammar, end_tokens: frozenset[int]) -> TokenGrammar:
        """Return a fresh matcher for one request.

        Raises:
            GrammarError: the grammar cannot be compiled, or no end token could close the answer.
        """
        ends = sorted(token for token in end_tokens if 0 <= token < self._vocab)
        if not ends:
            raise GrammarError("a structured answer needs an end token; do not ignore the target's own")
        compiled = self._compiled.get(grammar) or self._compile(grammar)
        self._compiled[grammar] = compiled
        self._compiled.move_to_end(grammar)
        if len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        return TokenGrammar(compiled, ends, self._tokenizer().eos_token, self._vocab)

    def _compile(self, grammar: Grammar) -> _Compiled:
        text = _grammar_text(grammar.schema if grammar.kind == "json_schema" else '{"type": "object"}')
        return _Compiled(text, self._tokenizer())


@dataclass(frozen=True, slots=True)
class _Row:
    """What may come at one place: `banned` [vocab] bool; `over` when only an end token may; `dead` when by force."""

    banned: torch.Tensor
    over: bool
    dead: bool


class _LimitHit(Exception):
    """Raised when the matcher ran into a limit; it is of no use any more."""


class TokenGrammar:
    """The grammar of one request at its committed tokens, with a look ahead along drafted ones.

    The matcher may stand further on than what is committed, on the tokens of the last draft: both
    the draft and the target ask for the same places, so each is computed once.  Where the matcher
    cannot follow (the drafted token before was forbidden or ended the answer, or no token of this
    vocabulary can go on), only end tokens are allowed.
    """

    def __init__(self, compiled: _Compiled, ends: list[int], unused: int, vocab: int) -> None:
        self._compiled = compiled
        self._matcher = compiled.matcher()
        self._ends, self._end_ids = frozenset(ends), torch.tensor(ends)
        self._unused = unused  # what llguidance takes for the end token; the request says what ends it
        self._vocab = vocab
        self._committed: list[int] = []
        self._path: list[int] = []  # tokens after the committed ones that the matcher has taken in
        self._rows: dict[int, _Row] = {}  # by how many tokens of `_path` come before
        self._stuck = False  # a committed token could not be taken in
        self.failed = False  # the answer had to end although it does not fit the grammar

    def restrict(self, logits: torch.Tensor, before: list[int]) -> bool:
        """Forbid in place what cannot follow the committed tokens and `before`; say if only an end can.

        Shapes: logits [vocab].
        """
        row = self._row(before)
        logits.masked_fill_(row.banned, -torch.inf)
        return row.over

    def commit(self, tokens: list[int]) -> None:
        """Move on by tokens that were committed."""
        for index, token in enumerate(tokens):
            if token in self._ends:
                self.failed = self._row(tokens[:index]).dead
                if self.failed:
                    log.warning("structured_answer_failed", after_tokens=len(self._committed) + index)
                return
        self._stuck = self._stuck or not self._reach(tokens)
        self._committed += tokens
        self._rows = {depth - len(tokens): row for depth, row in self._rows.items() if depth >= len(tokens)}
        del self._path[: len(tokens)]

    def _row(self, before: list[int]) -> _Row:
        depth = len(before)
        if depth in self._rows and self._path[:depth] == before:
            return self._rows[depth]
        for _ in range(2):
            if self._stuck or not self._reach(before):
                break
            try:
                row = self._look()
            except _LimitHit:
                self._restore()
                continue
            self._rows[depth] = row
            return row
        banned = torch.ones(self._vocab, dtype=torch.bool)
        banned[self._end_ids] = False
        return _Row(banned, over=True, dead=True)

    def _reach(self, before: list[int]) -> bool:
        """Bring the matcher to the end of `before`; False if it cannot get there."""
        for _ in range(2):
            try:
                return self._follow(before)
            except _LimitHit:  # what a draft or another request used up must not count against this answer
                self._restore()
        return False

    def _follow(self, before: list[int]) -> bool:
        """Roll back to what `before` shares with the tokens taken in, and take in the rest of it."""
        same = 0
        while same < min(len(before), len(self._path)) and before[same] == self._path[same]:
            same += 1
        if same < len(self._path):
            self._matcher.rollback(len(self._path) - same)
            del self._path[same:]
            self._rows = {depth: row for depth, row in self._rows.items() if depth <= same}
        for token in before[same:]:
            if token in self._ends:
                return False
            if self._matcher.try_consume_tokens([token]) != 1:
                row = self._rows.get(len(self._path)) or self._look()
                if not row.banned[token]:  # it does not say why it refuses
                    raise _LimitHit
                return False
            self._path.append(token)
        return True

    def _look(self) -> _Row:
        accepting = self._matcher.is_accepting()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise _LimitHit
        may = np.unpackbits(bits, count=self._vocab, bitorder="little")
        may[self._unused] = 0
        num = int(np.count_nonzero(may))
        over = num <= len(self._ends) and set(np.flatnonzero(may).tolist()) <= self._ends
        dead = not num and not accepting
        banned = torch.from_numpy(may == 0)
        if accepting or dead:
            banned[self._end_ids] = False
        return _Row(banned, over, dead)

    def _restore(self) -> None:
        self._matcher = self._compiled.renew()
        self._matcher.consume_tokens(self._committed)
        self._path, self._rows = [], {}
