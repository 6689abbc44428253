"""From a message to a request the engine can run, or a refusal that says why not."""

from __future__ import annotations

import math

from adapter.contracts import FLOOR_VERSION
from serving import ipc
from serving.engine.build import Built
from serving.engine.constraints import Constraints, constraints_for
from serving.engine.grammar import GrammarError, TokenGrammar
from serving.engine.sequence import Sequence

_RANGES = {  # what an API lets through is checked again: a bad number here would spoil a whole batch
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "top_k": (0, math.inf),
    "min_p": (0.0, 1.0),
    "min_tokens": (0, math.inf),
    "presence_penalty": (-math.inf, math.inf),
    "frequency_penalty": (-math.inf, math.inf),
    "repetition_penalty": (0.0, math.inf),
}
_POSITIVE = ("top_p", "repetition_penalty")


class Refusal(Exception):
    """Raised when a request cannot be taken; `status` and `param` are HTTP's and OpenAI's."""

    def __init__(self, status: int, text: str, param: str | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.param = param


class Admission:
    """Checks messages against what this engine can do.

    Args:
        max_model_len: tokens one request may hold, prompt and answer together.
    """

    def __init__(self, built: Built, max_model_len: int) -> None:
        self._built = built
        self._max_model_len = max_model_len
        self._vocab = int(built.engine.target.model.config.vocab_size)
        built.grammars.preload()

    def to_sequence(self, message: ipc.Submit, now_s: float) -> Sequence:
        """Build the request.

        Raises:
            Refusal: it does not fit, or names something that is not here.
        """
        total = len(message.token_ids) + message.max_tokens
        if total > self._max_model_len:
            raise Refusal(400, f"{total} tokens do not fit into {self._max_model_len}", "max_tokens")
        self._check_tokens(message.token_ids, "prompt")
        end_tokens = frozenset(message.end_tokens)
        return Sequence(
            request_id=message.request_id, tokens=list(message.token_ids), prompt_tokens=len(message.token_ids),
            max_tokens=message.max_tokens, sampling=message.sampling, end_tokens=end_tokens,
            segment=message.segment, tenant=message.tenant, learn=message.learn, gamma=message.gamma,
            arrived_s=now_s, version=self._version(message.version),
            priority=message.priority, cache_salt=message.cache_salt, logprobs=message.logprobs,
            constraints=self._constraints(message, end_tokens),
        )  # fmt: skip

    def _constraints(self, message: ipc.Submit, end_tokens: frozenset[int]) -> Constraints | None:
        sampling = message.sampling
        for name, (low, high) in _RANGES.items():
            value = getattr(sampling, name)
            if not (math.isfinite(value) and low <= value <= high) or (name in _POSITIVE and not value):
                above = "above" if name in _POSITIVE else "at least"
                raise Refusal(400, f"'{name}' is {value}; expected a number {above} {low}, at most {high}", name)
        if sampling.min_tokens > message.max_tokens:
            raise Refusal(
                400, f"'min_tokens' is {sampling.min_tokens}, more than the {message.max_tokens} tokens allowed",
                "min_tokens",
            )  # fmt: skip
        self._check_tokens([token for token, _ in sampling.logit_bias], "logit_bias")
        if not all(math.isfinite(value) for _, value in sampling.logit_bias):
            raise Refusal(400, "'logit_bias' holds a value that is not finite", "logit_bias")
        return constraints_for(sampling, message.token_ids, end_tokens, self._vocab, self._grammar(message, end_tokens))

    def _grammar(self, message: ipc.Submit, end_tokens: frozenset[int]) -> TokenGrammar | None:
        if message.grammar is None:
            return None
        try:
            return self._built.grammars.open(message.grammar, end_tokens)
        except GrammarError as error:
            raise Refusal(400, f"'response_format' cannot be served: {error}", "response_format") from None

    def _check_tokens(self, token_ids: list[int], param: str) -> None:
        outside = next((token for token in token_ids if not 0 <= token < self._vocab), None)
        if outside is not None:
            raise Refusal(400, f"'{param}' names token {outside}; this model knows 0 to {self._vocab - 1}", param)

    def _version(self, wanted: int | str | None) -> int | None:
        """Return the version a request is pinned to; None follows the live one."""
        swap = self._built.hotswap
        if wanted is None or wanted == "live":
            return None
        names = {"floor": FLOOR_VERSION, "previous": swap.previous if swap else None}
        version = names.get(wanted) if isinstance(wanted, str) else wanted
        if version is None or swap is None or swap.resident(version) is None:
            here = sorted({FLOOR_VERSION, swap.version, swap.previous} - {None}) if swap else []  # type: ignore[type-var]
            named = '"live", "floor"' + (', "previous"' if swap and swap.previous is not None else "")
            raise Refusal(
                400, f"draft version {wanted!r} is not loaded; use {named} or one of {here}", "speculative.version",
            )  # fmt: skip
        return version
