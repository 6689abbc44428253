"""The state of one request inside the engine: its tokens, its place in the caches, its counters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapter.contracts import Counts, FinishReason, Sampling

if TYPE_CHECKING:
    from serving.engine.constraints import Constraints


@dataclass(slots=True, eq=False)
class Sequence:
    """One request.

    `tokens` are the prompt and every committed token.  The target's cache holds the first
    `num_target_kv` of them, the draft's the first `num_draft_kv`; both trail `tokens`, by one token
    in steady state, and the next forward catches up whatever is missing.  So prefill, decoding,
    rollback, preemption and switching speculation on again are all the same thing.  A request equals
    nothing but itself.
    """

    request_id: str
    tokens: list[int]
    prompt_tokens: int
    max_tokens: int
    sampling: Sampling
    end_tokens: frozenset[int]
    segment: str
    gamma: int | None  # the request's own choice; None leaves it to the server
    arrived_s: float
    version: int | None = None  # the draft version it is pinned to
    routed: int | None = None  # the alternate that was chosen for it; None follows what is live
    priority: int = 0  # lower runs first
    cache_salt: str = ""
    tenant: str = ""  # whose request it is, without a name
    learn: bool = True  # whether it may be logged for training
    logprobs: int | None = None  # alternatives reported a token
    constraints: Constraints | None = None  # penalties, bias, grammar: whatever makes its law its own
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache when it was first admitted
    block_table: list[int] = field(default_factory=list)
    num_target_kv: int = 0
    num_draft_kv: int = 0
    started_s: float | None = None
    first_token_s: float | None = None
    finish_reason: FinishReason | None = None
    plain_rounds: int = 0
    by_version: dict[int, Counts] = field(default_factory=dict)
    unversioned: Counts = field(default_factory=Counts)  # rounds of proposers without versions
    accepted_by_position: list[int] = field(default_factory=list)
    unversioned_by_position: list[int] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        """Committed tokens after the prompt."""
        return len(self.tokens) - self.prompt_tokens

    def gamma_limit(self, gamma: int) -> int:
        """Cut a draft length so that a full acceptance still fits into max_tokens."""
        return max(0, min(gamma, self.max_tokens - self.num_generated - 1))

    def commit(self, new_tokens: list[int]) -> list[int]:
        """Append verified tokens up to an end token or max_tokens; return what was appended."""
        kept = new_tokens[: self.max_tokens - self.num_generated]
        for index, token in enumerate(kept):
            if token in self.end_tokens:
                kept = kept[: index + 1]
                self.finish_reason = "stop"
                break
        self.tokens.extend(kept)
        if self.finish_reason is None and self.num_generated >= self.max_tokens:
            self.finish_reason = "length"
        return kept

    def count(self, version: int | None, num_drafted: int, num_accepted: int) -> None:
        """Count one round; a round without drafted tokens says nothing about a draft."""
        if not num_drafted:
            self.plain_rounds += 1
            return
        examined = min(num_accepted + 1, num_drafted)
        one = Counts(num_rounds=1, num_drafted=num_drafted, num_examined=examined, num_accepted=num_accepted)
        if version is None:
            self.unversioned += one
            _count_positions(self.unversioned_by_position, num_accepted)
            return
        self.by_version[version] = self.by_version.get(version, Counts()) + one
        _count_positions(self.accepted_by_position, num_accepted)


def _count_positions(accepted: list[int], num_accepted: int) -> None:
    accepted.extend([0] * (num_accepted - len(accepted)))
    for position in range(num_accepted):
        accepted[position] += 1
