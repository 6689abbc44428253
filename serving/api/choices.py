"""The answers of one request: a prompt times n, each a request of its own to the engine.

Choice `prompt * n + i` is answer i to that prompt.  Answer 0 keeps the request's seed and answer i
derives its own from (seed, i), so a prompt in a list is answered as if it had come alone.  Knows
how tokens become pieces of an answer; what wraps a piece is the shapes' business.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from adapter.contracts import TokenLogprob
from serving import ipc
from serving.api.answer import AnswerText
from serving.api.errors import ApiError

_SEED_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one answer: the tokens of a round and the text that became certain with them.

    `offsets` and `logprobs` have one item a token.  The last piece carries the reasons.
    """

    index: int
    text: str
    token_ids: list[int]
    offsets: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Choice:
    """One answer in the making."""

    index: int
    submit: ipc.Submit
    text: AnswerText
    stop_token_ids: frozenset[int] = frozenset()  # those the client named, for the stop reason
    keep_stop: bool = False
    summary: ipc.Summary | None = None
    finished: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer so far; every one of them was in a piece."""
        return self.text.num_tokens

    def take(self, tokens: ipc.Tokens) -> Piece:
        """Turn the tokens of a round into a piece; what is behind a stop string is dropped.

        Raises:
            ApiError: 500 when the engine gave the request up.
        """
        if tokens.finish_reason in ("error", "cancelled"):
            raise ApiError(500, f"the engine ended this request ({tokens.finish_reason}); see its log")
        self.summary = tokens.summary or self.summary
        ended = tokens.finish_reason == "stop" and tokens.token_ids[-1:] and tokens.token_ids[-1] in self._end_tokens
        parts: list[str] = []
        offsets: list[int] = []
        for place, token in enumerate(tokens.token_ids):
            if self.text.stopped:
                break
            offsets.append(self.text.num_characters)
            silent = ended and place == len(tokens.token_ids) - 1 and not self.keep_stop
            parts.append(self.text.push_end() if silent else self.text.push(token))
        if tokens.finish_reason is not None:
            parts.append(self.text.finish())
        token_ids = tokens.token_ids[: len(offsets)]
        reason, why = self._reasons(tokens, token_ids)
        self.finished = reason is not None
        return Piece(
            self.index, "".join(parts), token_ids, offsets, (tokens.logprobs or [])[: len(offsets)], reason, why
        )

    @property
    def _end_tokens(self) -> list[int]:
        return self.submit.end_tokens

    def _reasons(self, tokens: ipc.Tokens, token_ids: list[int]) -> tuple[str | None, str | int | None]:
        if self.text.stopped:
            return "stop", self.text.stop
        named = tokens.finish_reason == "stop" and token_ids[-1:] and token_ids[-1] in self.stop_token_ids
        return tokens.finish_reason, token_ids[-1] if named else None


@dataclass(slots=True)
class Choices:
    """All answers of one request, and what they cost."""

    prompts: list[list[int]]
    num_per_prompt: int
    items: list[Choice] = field(default_factory=list)

    def usage(self, sent_tokens: int | None = None) -> dict[str, object]:
        """Return OpenAI's usage block: each prompt counts once, every delivered token counts.

        `sent_tokens` is how many were sent so far; None stands for all there are.
        Cached tokens are those that the first answer to each prompt found; its siblings find its own.
        """
        prompt = sum(len(ids) for ids in self.prompts)
        answer = sum(item.num_tokens for item in self.items) if sent_tokens is None else sent_tokens
        firsts = self.items[:: self.num_per_prompt]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {
                "cached_tokens": sum(item.summary.cached_tokens for item in firsts if item.summary is not None)
            },
        }


def derived_seed(seed: int, number: int) -> int:
    """Return the seed of answer `number`: the seed itself for 0, an independent 64-bit one for the others."""
    seed &= _SEED_MASK
    if number == 0:
        return seed
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + number.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
