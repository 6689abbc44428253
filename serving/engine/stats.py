"""What the engine counts: totals since start, and the durations of recent steps."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from typing import TYPE_CHECKING

from adapter.contracts import FinishReason
from serving.engine.proposers.base import Proposal
from serving.engine.sequence import Sequence

if TYPE_CHECKING:
    from adapter.hotswap import SwapReceipt

_RECENT = 512


class EngineStats:
    """Counters of one engine process; plain attributes, read by `snapshot`."""

    def __init__(self) -> None:
        self.steps = 0
        self.step_s = 0.0
        self.draft_s = 0.0
        self.rounds = 0
        self.drafted = 0
        self.examined = 0
        self.accepted = 0
        self.accepted_by_position: Counter[int] = Counter()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.finished_by_reason: Counter[str] = Counter()
        self.not_finite = 0  # requests ended because the target's logits were NaN or infinite
        self.undelivered = 0  # requests ended because their API process took no more messages
        self.routed = 0  # requests that an alternate was chosen for
        self.num_swaps = 0
        self.swaps: list[SwapReceipt] = []  # the last hundred
        self._recent_s: deque[float] = deque(maxlen=_RECENT)
        self._recent_batches: deque[int] = deque(maxlen=_RECENT)

    def step(self, seconds: float, propose_s: float, batch: int) -> None:
        """Count a step that did something; `batch` requests ran a round in it."""
        if batch:
            self._recent_batches.append(batch)
        self.steps += 1
        self.step_s += seconds
        self.draft_s += propose_s
        self._recent_s.append(seconds)

    def round(self, proposal: Proposal, num_accepted: int, num_kept: int) -> None:
        """Count one round of one request."""
        self.generated_tokens += num_kept
        num_drafted = len(proposal.tokens)
        if not num_drafted:
            return
        self.rounds += 1
        self.drafted += num_drafted
        self.examined += min(num_accepted + 1, num_drafted)
        self.accepted += num_accepted
        self.accepted_by_position.update(range(num_accepted))

    def finished(self, request: Sequence) -> None:
        """Count the end of a request."""
        self.prompt_tokens += request.prompt_tokens
        self.finished_by_reason[request.finish_reason or "error"] += 1

    def never_admitted(self, reason: FinishReason) -> None:
        """Count a request that left before the engine had looked at it."""
        self.finished_by_reason[reason] += 1

    def swapped(self, receipt: SwapReceipt) -> None:
        """Remember a swap."""
        self.num_swaps += 1
        self.swaps = [*self.swaps[-99:], receipt]

    @property
    def median_step_ms(self) -> float:
        """Median duration of the last few hundred steps, in milliseconds; 0 before the first."""
        return statistics.median(self._recent_s) * 1e3 if self._recent_s else 0.0

    @property
    def median_batch(self) -> float | None:
        """Median number of requests decoded together, over the last few hundred decoding steps."""
        return statistics.median(self._recent_batches) if self._recent_batches else None
