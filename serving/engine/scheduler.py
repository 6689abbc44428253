"""Decide which requests run in a step, and give them cache blocks.  Plain integers, no tensors.

Requests join and leave between rounds.  When blocks run out, the request that came last gives its
blocks back and starts over from its tokens: nothing it produced is lost.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from serving.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Plan:
    """One request's share of a step: how many missing tokens to process, and whether that completes it."""

    sequence: Sequence
    num_new: int
    ready: bool  # all committed tokens will be in the cache, so a round can run


class Scheduler:
    """Waiting and running requests over a pool of blocks.

    Block 0 is never given away: idle rows and dry runs may write there.
    """

    def __init__(self, *, num_blocks: int, block_tokens: int, max_batch: int, prefill_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        self._max_batch = max_batch
        self._prefill_tokens = prefill_tokens
        self._free = list(range(num_blocks - 1, 0, -1))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preempted = 0

    @property
    def free_blocks(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    @property
    def free_places(self) -> int:
        """Requests that may still join the batch, blocks permitting."""
        return self._max_batch - len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a request behind the others."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a request, wherever it is, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def committed(self, sequence: Sequence) -> None:
        """Hear that a request gained tokens."""

    def next_batch(self, lookahead: int) -> list[Plan]:
        """Admit what fits and plan a step in which every request may write `lookahead` tokens ahead.

        Requests that only decode come first, so a long prompt never starves them; prompts share
        what is left of the prefill budget in order of arrival.
        """
        while self.waiting and len(self.running) < self._max_batch:
            if self._blocks_for(len(self.waiting[0].tokens) + lookahead) > len(self._free) and self.running:
                break
            self.running.append(self.waiting.popleft())
        budget = self._prefill_tokens
        plans = []
        for sequence in sorted(self.running, key=lambda item: len(item.tokens) - item.num_target_kv > 1):
            if sequence not in self.running:
                continue  # preempted by one before it
            missing = len(sequence.tokens) - sequence.num_target_kv
            take = missing if missing == 1 else min(missing, budget)
            if not take or not self._reserve(sequence, lookahead):
                continue
            budget -= take if missing > 1 else 0
            plans.append(Plan(sequence, take, take == missing))
        return [plan for plan in plans if plan.sequence in self.running]

    def _reserve(self, sequence: Sequence, lookahead: int) -> bool:
        """Give a request blocks for its tokens and `lookahead` more, preempting later arrivals."""
        needed = self._blocks_for(len(sequence.tokens) + lookahead) - len(sequence.block_table)
        while needed > len(self._free):
            victim = max(self.running, key=lambda item: item.arrived_s)
            self._preempt(victim)
            if victim is sequence:
                return False
        for _ in range(max(0, needed)):
            sequence.block_table.append(self._free.pop())
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_target_kv = sequence.num_draft_kv = 0
        self.waiting.appendleft(sequence)
        self.num_preempted += 1

    def _release(self, sequence: Sequence) -> None:
        self._free.extend(reversed(sequence.block_table))
        sequence.block_table.clear()

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)
