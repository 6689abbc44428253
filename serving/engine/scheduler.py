"""Decide which requests run in a step, and give them cache blocks.  Plain integers, no tensors.

Requests join and leave between rounds.  When blocks run out, the request that comes last in order of
priority and arrival gives its blocks back and starts over from its tokens: nothing it produced is
lost, and what it had in full blocks is usually still cached when it comes back.

Nobody starves within a priority.  The first in line is never overtaken, so smaller requests cannot
keep a large one out; the first of those that run is never the victim, so it ends; then the next is
first.  Between priorities order is strict, as asked: an endless stream of urgent requests holds up others.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.engine.blocks import BlockPool, block_key, root_key
from serving.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Plan:
    """One request's share of a step: how many missing tokens to process, and whether that completes it."""

    sequence: Sequence
    num_new: int
    ready: bool  # all committed tokens will be in the cache, so a round can run


@dataclass(slots=True)
class _Place:
    """What the scheduler knows of a request beyond its own state.

    `keys` are those of its leading full blocks; `num_published` of them were offered to the cache.
    `draft_seen` is its num_draft_kv when that was looked at last, `draft_version` the version that
    wrote all of it, None when more than one did.
    """

    order: tuple[int, float, int]  # priority, arrival, number
    keys: list[bytes] = field(default_factory=list)
    admitted: bool = False
    num_published: int = 0
    draft_seen: int = 0
    draft_version: int | None = None


class Scheduler:
    """Waiting and running requests over a pool of blocks.

    Args:
        prefix_cache: reuse the blocks of equal prefixes.
        draft_version: which version drafts for a request now.  The draft's KV in a cached block is
            reused by the version that wrote it alone.  Any other's would be exact too, but a prompt
            that many share would then be drafted on a replaced version's KV for as long as it is in
            use.  A swap itself flushes and copies nothing.
        clean: empties spoiled blocks; see `spoil`.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_tokens: int,
        max_batch: int,
        prefill_tokens: int,
        prefix_cache: bool = True,
        draft_version: Callable[[Sequence], int] = lambda request: 0,
        clean: Callable[[list[int]], None] = lambda blocks: None,
    ) -> None:
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        self.pool = BlockPool(num_blocks, caching=prefix_cache, clean=clean)
        self._prefix_cache = prefix_cache
        self._max_batch = max_batch
        self._prefill_tokens = prefill_tokens
        self._draft_version = draft_version
        self._places: dict[str, _Place] = {}
        self._num_added = 0
        self.waiting: list[Sequence] = []  # in order of priority, then arrival
        self.running: list[Sequence] = []
        self.num_preempted = 0
        self.prefix_queries = 0  # tokens of requests when they were first admitted
        self.prefix_hits = 0  # those of them that were cached

    @property
    def free_blocks(self) -> int:
        """Blocks nobody holds, cached ones included."""
        return self.pool.num_free

    @property
    def free_places(self) -> int:
        """Requests that may still join the batch, blocks permitting."""
        return self._max_batch - len(self.running)

    def has_room(self, lookahead: int) -> bool:
        """Whether every running request can write `lookahead` tokens ahead without taking a block from another."""
        missing = (max(0, self._needed(item, lookahead) - len(item.block_table)) for item in self.running)
        return sum(missing) <= self.pool.num_free

    def add(self, sequence: Sequence) -> None:
        """Queue a request behind those of its priority that came before it."""
        self._num_added += 1
        self._places[sequence.request_id] = _Place((sequence.priority, sequence.arrived_s, self._num_added))
        insort(self.waiting, sequence, key=self._order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a request, wherever it is, and free its blocks; full ones stay cached."""
        if sequence in self.running:
            self.committed(sequence)
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._places.pop(sequence.request_id, None)

    def committed(self, sequence: Sequence) -> None:
        """Hear that a request's cache grew, between two forwards; share the blocks that became full.

        num_target_kv counts committed tokens alone, so drafted ones that were rejected, or were not
        judged yet, are never in a block that is shared.
        """
        if not self._prefix_cache:
            return
        place = self._places[sequence.request_id]
        full = sequence.num_target_kv // self.block_tokens
        self._extend_keys(sequence, place, full)
        for index in range(place.num_published, full):
            self.pool.publish(sequence.block_table[index], place.keys[index])
        place.num_published = full
        self._note_draft(sequence, place)

    def spoil(self, sequence: Sequence) -> None:
        """Hear that a running request's cache is wrong: share none of its blocks, and empty them at its end."""
        self.pool.spoil(sequence.block_table)

    def next_batch(self, lookahead: int) -> list[Plan]:
        """Admit what fits and plan a step in which every request may write `lookahead` tokens ahead.

        Requests that only decode come first, so a long prompt never starves them; prompts share
        what is left of the prefill budget in order of priority and arrival.
        """
        for sequence in self.running:
            self.committed(sequence)  # prompt chunks: no round follows them that would say so
        self._admit(lookahead)
        budget = self._prefill_tokens
        plans = []
        for sequence in sorted(self.running, key=lambda item: (_missing(item) > 1, self._order(item))):
            if sequence not in self.running:
                continue  # preempted by one before it
            missing = _missing(sequence)
            take = missing if missing == 1 else min(missing, budget)
            if not take or not self._reserve(sequence, lookahead):
                continue
            budget -= take if missing > 1 else 0
            plans.append(Plan(sequence, take, take == missing))
        return [plan for plan in plans if plan.sequence in self.running]

    # -- admission ---------------------------------------------------------------------------

    def _admit(self, lookahead: int) -> None:
        """Let requests join, in order, while the blocks they miss are there beside what the others miss."""
        promised = sum(max(0, self._needed(item, lookahead) - len(item.block_table)) for item in self.running)
        while self.waiting and len(self.running) < self._max_batch:
            sequence = self.waiting[0]
            cached = self._cached_prefix(sequence)
            missing = self._needed(sequence, lookahead) - len(cached)
            if missing > self.pool.num_free - self.pool.num_idle(cached) - promised and self.running:
                break
            promised += missing
            self.running.append(self.waiting.pop(0))
            self._start(sequence, cached)

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Find the cached blocks a request can start from; at least one token is left to compute."""
        place = self._places[sequence.request_id]
        usable = (len(sequence.tokens) - 1) // self.block_tokens if self._prefix_cache else 0
        self._extend_keys(sequence, place, usable)
        return self.pool.find(place.keys[:usable])

    def _start(self, sequence: Sequence, cached: list[int]) -> None:
        place = self._places[sequence.request_id]
        version = self._draft_version(sequence)
        self.pool.hold(cached)
        sequence.block_table.extend(cached)
        place.num_published = len(cached)
        place.draft_version = version
        sequence.num_target_kv = len(cached) * self.block_tokens
        sequence.num_draft_kv = place.draft_seen = self.pool.num_drafted(cached, version) * self.block_tokens
        if not place.admitted:
            place.admitted = True
            sequence.num_cached_tokens = min(sequence.num_target_kv, sequence.prompt_tokens)
            self.prefix_queries += len(sequence.tokens) if self._prefix_cache else 0
            self.prefix_hits += sequence.num_target_kv

    # -- blocks ------------------------------------------------------------------------------

    def _needed(self, sequence: Sequence, lookahead: int) -> int:
        """Return the blocks a request needs for a round that writes `lookahead` tokens ahead, or fewer at its end."""
        longest = sequence.prompt_tokens + sequence.max_tokens
        return -(-min(len(sequence.tokens) + lookahead, longest) // self.block_tokens)

    def _reserve(self, sequence: Sequence, lookahead: int) -> bool:
        """Give a request the blocks of its round and take back any more, preempting who comes last."""
        needed = self._needed(sequence, lookahead)
        surplus = sequence.block_table[needed:]
        del sequence.block_table[needed:]
        self.pool.release(surplus)
        missing = needed - len(sequence.block_table)
        while missing > self.pool.num_free:
            victim = max(self.running, key=self._order)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table.extend(self.pool.allocate(missing))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        insort(self.waiting, sequence, key=self._order)
        self.num_preempted += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table.clear()
        sequence.num_target_kv = sequence.num_draft_kv = 0

    # -- the prefix cache --------------------------------------------------------------------

    def _extend_keys(self, sequence: Sequence, place: _Place, count: int) -> None:
        size = self.block_tokens
        for index in range(len(place.keys), count):
            parent = place.keys[-1] if place.keys else root_key(sequence.cache_salt)
            place.keys.append(block_key(parent, sequence.tokens[index * size : (index + 1) * size]))

    def _note_draft(self, sequence: Sequence, place: _Place) -> None:
        """Note which blocks the draft has read since, as long as one version wrote all there is before them."""
        if sequence.num_draft_kv == place.draft_seen:
            return
        version = self._draft_version(sequence)
        if not place.draft_seen:
            place.draft_version = version
        elif place.draft_version != version:
            place.draft_version = None
        size, table = self.block_tokens, sequence.block_table
        first, full = place.draft_seen // size, sequence.num_draft_kv // size
        if full > first and self.pool.num_drafted(table[:first], version) < first:
            place.draft_version = None  # another request, drafting with another version, read them again
        for index in range(first, -(-sequence.num_draft_kv // size)):
            self.pool.note_draft(table[index], place.draft_version if index < full else None)
        place.draft_seen = sequence.num_draft_kv

    def _order(self, sequence: Sequence) -> tuple[int, float, int]:
        return self._places[sequence.request_id].order


def _missing(sequence: Sequence) -> int:
    return len(sequence.tokens) - sequence.num_target_kv
