"""Blocks and scheduling without a model: who holds what, what a hit may return, who goes first."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapter.contracts import Sampling
from serving.engine.blocks import BlockPool, block_key, root_key
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Sequence

SIZE = 2
NUM_BLOCKS = 9


def keys_of(tokens: tuple[int, ...], salt: str = "") -> list[bytes]:
    """Keys of the full blocks of `tokens`."""
    keys = [root_key(salt)]
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        keys.append(block_key(keys[-1], tokens[start : start + SIZE]))
    return keys[1:]


@dataclass
class Holder:
    """A request as the naive model sees it."""

    tokens: tuple[int, ...]
    salt: str
    blocks: list[int]
    shared: int  # leading blocks it found
    published: int = 0


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a naive model of it that remembers what is in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.requests: list[Holder] = []
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}  # published blocks: salt and whole prefix
        self.idle: list[int] = []  # published, held by nobody, longest unused first

    def _held(self) -> list[int]:
        return [block for request in self.requests for block in request.blocks]

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple), salt=st.sampled_from(["", "b"]))
    def start(self, tokens: tuple[int, ...], salt: str) -> None:
        """Begin a request as the scheduler does: look its prefix up, hold it, allocate the rest."""
        keys = keys_of(tokens, salt)
        found = self.pool.find(keys)
        prefixes = [(salt, tokens[: (i + 1) * SIZE]) for i in range(len(keys))]
        assert [self.content[block] for block in found] == prefixes[: len(found)]
        assert len(found) == len(keys) or prefixes[len(found)] not in self.content.values()
        missing = -(-len(tokens) // SIZE) - len(found)
        idle = [block for block in found if block in self.idle]
        assert self.pool.num_idle(found) == len(idle)
        if missing > self.pool.num_free - len(idle):
            return
        self.pool.hold(found)
        self.idle = [block for block in self.idle if block not in idle]
        empty = NUM_BLOCKS - 1 - len(set(self._held()) | set(found)) - len(self.idle)
        new = self.pool.allocate(missing)
        evicted = self.idle[: max(0, missing - empty)]
        assert not set(new) & {*self._held(), *found, 0}
        assert len(set(new)) == missing
        assert {block for block in new if block in self.content} == set(evicted), "not the longest unused"
        for block in evicted:
            self.idle.remove(block)
            del self.content[block]
        self.requests.append(Holder(tokens, salt, found + new, len(found), len(found)))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        """Publish the next full block of a request; equal content that is there already stays the one found."""
        request = data.draw(st.sampled_from(self.requests))
        keys = keys_of(request.tokens, request.salt)
        if request.published == len(keys):
            return
        index = request.published
        self.pool.publish(request.blocks[index], keys[index])
        request.published += 1
        prefix = (request.salt, request.tokens[: request.published * SIZE])
        if prefix not in self.content.values():
            self.content[request.blocks[index]] = prefix

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """End a request; what it published stays and becomes the newest of the unused, its end oldest."""
        request = data.draw(st.sampled_from(self.requests))
        self.requests.remove(request)
        self.pool.release(request.blocks)
        left = self._held()
        self.idle += [block for block in reversed(request.blocks) if block in self.content and block not in left]

    @invariant()
    def counts_are_right(self) -> None:
        """Every block is held as often as tables name it, and free exactly when none does."""
        held = self._held()
        assert [self.pool.holders(block) for block in range(NUM_BLOCKS)] == [held.count(i) for i in range(NUM_BLOCKS)]
        assert sorted({*held, *self.pool.unheld}) == list(range(1, NUM_BLOCKS))
        assert len(self.pool.unheld) == self.pool.num_free == NUM_BLOCKS - 1 - len(set(held))
        assert self.pool.num_cached == len(self.content)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_block_is_released_once() -> None:
    """A second release, and more blocks than are free, are errors and not a corrupt pool."""
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(ValueError, match="more often than it was held"):
        pool.release(blocks[:1])
    with pytest.raises(ValueError, match="4 blocks wanted, 3 are free"):
        pool.allocate(4)


def test_keys_depend_on_salt_tokens_and_everything_before() -> None:
    """Equal blocks after different beginnings, under other salts or cut elsewhere have other keys."""
    tokens = (1, 2, 3, 4, 5, 6)
    seen = keys_of(tokens) + keys_of(tokens, "a") + keys_of(tokens, "b") + keys_of((9, *tokens[1:]))
    assert len(set(seen)) == len(seen)
    assert keys_of((1, 2, 3, 4, 7, 8))[:2] == keys_of(tokens)[:2]
    assert block_key(root_key(""), (1, 256)) != block_key(root_key(""), (257, 0))


# -- the scheduler over simulated caches -----------------------------------------------------


@dataclass
class World:
    """An engine without models: a slot of a cache holds what a model would have read there.

    The target's slot holds the whole text up to it; the draft's also the version, and whether all
    before it was that version's.
    """

    scheduler: Scheduler
    random: random.Random
    lookahead: int
    version: int = 0
    target: dict[tuple[int, int], object] = field(default_factory=dict)
    draft: dict[tuple[int, int], tuple[object, int, bool]] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)

    def slot(self, item: Sequence, position: int) -> tuple[int, int]:
        return item.block_table[position // self.scheduler.block_tokens], position % self.scheduler.block_tokens

    def write_target(self, item: Sequence, text: list[int], start: int) -> None:
        for position in range(start, len(text)):
            slot = self.slot(item, position)
            assert self.scheduler.pool.holders(slot[0]) == 1, "the target writes into a block that others read"
            self.target[slot] = (item.cache_salt, *text[: position + 1])

    def write_draft(self, item: Sequence, text: list[int], start: int) -> None:
        for position in range(start, len(text)):
            before = [self.draft[self.slot(item, i)] for i in range(position)]
            clean = all(one[1] == self.version and one[2] for one in before)
            self.draft[self.slot(item, position)] = ((item.cache_salt, *text[: position + 1]), self.version, clean)

    def check(self) -> None:
        """Compare what the caches hold with what a fresh read of the committed text would put there."""
        for item in self.scheduler.running:
            assert item.num_target_kv < len(item.tokens)
            assert item.num_draft_kv <= len(item.tokens)
            text = (item.cache_salt, *item.tokens)
            for position in range(item.num_target_kv):
                assert self.target[self.slot(item, position)] == text[: position + 2]
            for position in range(item.num_draft_kv):
                assert self.draft[self.slot(item, position)][0] == text[: position + 2]

    def step(self, gammas: tuple[int, ...]) -> None:
        before = {item.request_id for item in self.scheduler.running}
        plans = self.scheduler.next_batch(self.lookahead)
        self.check()
        for plan in plans:
            needed = -(-(len(plan.sequence.tokens) + self.lookahead) // self.scheduler.block_tokens)
            assert len(plan.sequence.block_table) <= needed, "a request hoards blocks"
        waiting = [_order(item) for item in self.scheduler.waiting]
        assert waiting == sorted(waiting)
        for item in self.scheduler.running:
            if item.request_id not in before:
                assert all(_order(item) <= other for other in waiting), "a request was overtaken"
                read = [self.draft[self.slot(item, i)][1:] for i in range(item.num_draft_kv)]
                assert set(read) <= {(self.version, True)}, "another version's draft KV was called complete"
        for plan in plans:
            gamma = min(self.random.choice(gammas), self.lookahead - 1)
            self._run(plan.sequence, plan.num_new, plan.ready, gamma)

    def _run(self, item: Sequence, num_new: int, ready: bool, gamma: int) -> None:
        gamma = item.gamma_limit(gamma) if ready else 0
        drafted = [self.random.randrange(2) for _ in range(gamma)]
        before = len(item.tokens)
        if gamma:
            self.write_draft(item, item.tokens + drafted[:-1], item.num_draft_kv)
            item.num_draft_kv = before
        start = item.num_target_kv
        text = item.tokens[: start + num_new] + drafted
        self.write_target(item, text, start)
        item.num_target_kv = start + num_new
        if not ready:
            return
        accepted = self.random.randint(0, gamma)
        kept = item.commit([*drafted[:accepted], self.random.randrange(2)])
        item.num_target_kv = before + min(accepted, len(kept))
        if gamma:
            item.num_draft_kv = before + min(accepted, gamma - 1)
        self.scheduler.committed(item)
        if item.finish_reason:
            self.scheduler.remove(item)
            self.ended.append(item.request_id)


def _order(item: Sequence) -> tuple[int, float]:
    return item.priority, item.arrived_s


def sequence(name: str, tokens: list[int], max_tokens: int = 8, **more: object) -> Sequence:
    return Sequence(
        request_id=name, tokens=list(tokens), prompt_tokens=len(tokens), max_tokens=max_tokens, sampling=Sampling(),
        end_tokens=frozenset(), segment="test", gamma=None, **({"arrived_s": 0.0} | more),
    )  # fmt: skip


def world(seed: int = 0, **more: object) -> World:
    wanted = {"num_blocks": 13, "block_tokens": 2, "max_batch": 4, "prefill_tokens": 5, **more}
    made = World(Scheduler(**wanted, draft_version=lambda item: made.version), random.Random(seed), lookahead=4)  # type: ignore[arg-type]
    return made


@settings(max_examples=250, deadline=None)
@given(seed=st.integers(0, 2**32), cache=st.booleans(), gammas=st.sampled_from([(0,), (0, 1, 3), (3,), (0, 0, 0, 2)]))
def test_serving_c1_k3_caches_hold_committed_text_alone(seed: int, cache: bool, gammas: tuple[int, ...]) -> None:
    """Whatever arrives, is cancelled, preempted, rolled back or swapped, a slot holds what a fresh read would (A1, A4).

    Prompts of a binary alphabet share most of their beginnings; rejected drafts lie in every last block.
    """
    live = world(seed, prefix_cache=cache)
    rng, made = live.random, []
    while len(live.ended) < 12:
        if len(made) < 12 and rng.random() < 0.5:
            prompt = [rng.randrange(2) if rng.random() < 0.3 else 0 for _ in range(rng.randint(1, 12))]
            made.append(sequence(str(len(made)), prompt, rng.randint(1, 7), cache_salt=rng.choice(["", "", "x"])))
            made[-1].priority = rng.choice([0, 0, 1, -1])
            live.scheduler.add(made[-1])
        if rng.random() < 0.1:
            live.version = rng.randrange(3)
        if made and rng.random() < 0.05 and (gone := rng.choice(made)).request_id not in live.ended:
            live.scheduler.remove(gone)
            live.ended.append(gone.request_id)
        live.lookahead = rng.choice([4, 4, 2, 1])
        live.step(gammas)
        held = [block for item in live.scheduler.running for block in item.block_table]
        assert live.scheduler.free_blocks == live.scheduler.num_blocks - 1 - len(set(held))
        for item in live.scheduler.waiting:
            assert not item.block_table
            assert item.num_target_kv == item.num_draft_kv == 0
    assert live.scheduler.free_blocks == live.scheduler.num_blocks - 1
    assert not live.scheduler._places
    assert live.scheduler.prefix_hits <= live.scheduler.prefix_queries
    assert cache or not live.scheduler.prefix_queries


def test_serving_c1_a_rejected_draft_is_never_found() -> None:
    """A block that drafted tokens filled up is not found under them after the target rejected them."""
    live = world()
    item = sequence("a", [0, 0, 0], 20)
    live.scheduler.add(item)
    live.random.choice = lambda options: options[0]  # type: ignore[method-assign, assignment]
    live.random.randrange = lambda stop: 1  # type: ignore[method-assign, assignment]
    live.random.randint = lambda low, high: 0  # type: ignore[method-assign, assignment]
    live.step((3,))  # drafts 1 1 1, of which none is accepted; the target says 1
    assert item.tokens == [0, 0, 0, 1]
    drafted = sequence("b", [0, 0, 0, 1, 1, 1, 1], 1)
    live.scheduler.add(drafted)
    live.scheduler.next_batch(4)
    assert drafted.num_cached_tokens == 2  # not 4: position 3 was written, by a draft that was rejected


def test_at_least_one_token_is_computed() -> None:
    """A prompt that is cached whole is read from its last block again, so that there are logits."""
    live = world()
    for name in "ab":
        item = sequence(name, [0, 1, 0, 1], 1)
        live.scheduler.add(item)
        live.step((0,))
        assert item.num_cached_tokens == {"a": 0, "b": 2}[name]
    assert (live.scheduler.prefix_queries, live.scheduler.prefix_hits) == (8, 2)


def test_draft_holes_are_read_again() -> None:
    """Blocks whose text the draft never read count for the target alone, up to the first of them."""
    live = world()
    prompt = [0, 1] * 4
    for name, gammas, cached, drafted in (("a", 0, 0, 0), ("b", 0, 6, 0), ("c", 3, 6, 0), ("d", 0, 6, 6)):
        item = sequence(name, prompt, 4)
        live.scheduler.add(item)
        live.scheduler.next_batch(4)
        assert (item.num_target_kv, item.num_draft_kv) == (cached, drafted)
        while item.request_id not in live.ended:
            live.step((gammas,))
    live.version = 1
    other = sequence("e", prompt, 4)
    live.scheduler.add(other)
    live.scheduler.next_batch(4)
    assert (other.num_target_kv, other.num_draft_kv) == (6, 0)


def test_serving_a1_a_preempted_request_comes_back_nearly_for_free() -> None:
    """What a victim had in full blocks is cached when it returns; counters and cached tokens count it once."""
    live = world(num_blocks=11, prefill_tokens=64)
    first, second = sequence("a", [0] * 6, 10), sequence("b", [1] * 6, 10)
    live.scheduler.add(first)
    live.scheduler.add(second)
    while not live.scheduler.num_preempted:
        live.step((0,))
    assert second in live.scheduler.waiting
    assert not second.block_table
    had = len(second.tokens)
    assert had > 6
    live.scheduler.remove(first)
    [plan] = live.scheduler.next_batch(live.lookahead)
    live.check()
    assert plan.sequence is second
    assert plan.ready
    assert plan.num_new == had - second.num_target_kv <= 2  # all but the last block, which is not full
    assert second.num_cached_tokens == 0
    assert live.scheduler.prefix_queries == 12


def test_priority_orders_waiting_and_victims() -> None:
    """Lower numbers run first, equal ones by arrival; the least urgent gives its blocks back, though it came first."""
    live = world(max_batch=2, num_blocks=40)
    ask = {"late": (0, 3.0), "urgent": (-1, 4.0), "early": (0, 1.0), "idle": (5, 0.0)}
    for i, (name, (priority, arrived)) in enumerate(ask.items()):
        live.scheduler.add(sequence(name, [i, i, 1, 1], 2, priority=priority, arrived_s=arrived))
    assert [item.request_id for item in live.scheduler.waiting] == ["urgent", "early", "late", "idle"]
    tight = world(num_blocks=12, prefill_tokens=64)
    low = sequence("low", [0] * 6, 10, priority=1)
    tight.scheduler.add(low)
    tight.step((0,))
    tight.scheduler.add(sequence("high", [1] * 6, 10, arrived_s=9.0))
    for _ in range(3):
        tight.step((0,))
    assert tight.scheduler.waiting == [low]
    assert [item.request_id for item in tight.scheduler.running] == ["high"]


def test_draft_kv_over_a_prefix_that_another_version_read_again_is_not_reused() -> None:
    """A swap there and back: who drafts on has its end from one version and its beginning from the other."""
    live = world(num_blocks=60, prefill_tokens=64)
    shared = [0, 1] * 4
    stays = sequence("stays", shared, 30)
    live.scheduler.add(stays)
    live.step((3,))
    live.version = 1
    live.scheduler.add(sequence("reads again", [*shared, 1], 9))
    for plan in live.scheduler.next_batch(4):
        if plan.sequence is not stays:
            live._run(plan.sequence, plan.num_new, plan.ready, 3)
    live.version = 0
    for _ in range(4):
        live.step((3,))
    pool = live.scheduler.pool
    assert pool.num_drafted(stays.block_table[:4], 1) == 4
    assert stays.num_draft_kv >= 14
    assert all(pool.num_drafted([block], 0) == 0 for block in stays.block_table[5:7])


def test_cached_blocks_a_request_waits_for_are_not_room_for_its_others() -> None:
    """Blocks nobody holds are free until a request is to start from them: it waits, and nobody is preempted."""
    live = world(num_blocks=11, prefill_tokens=64)
    live.scheduler.add(sequence("before", [1] * 8, 1))
    live.step((0,))
    live.scheduler.add(sequence("runs", [0] * 6, 20))
    live.step((0,))
    waits = sequence("waits", [1] * 8 + [2] * 2, 20, arrived_s=1.0)
    live.scheduler.add(waits)
    live.step((0,))
    assert live.scheduler.waiting == [waits]
    assert live.scheduler.num_preempted == 0


def test_nobody_starves() -> None:
    """A long request among endless short ones of its priority, with room for few, still ends."""
    live = world(3, num_blocks=14, max_batch=3)
    live.scheduler.add(sequence("s0", [0, 1], 3, arrived_s=0.0))
    live.scheduler.add(sequence("long", [1] * 14, 9, arrived_s=0.5))
    for step in range(1, 120):
        for part in range(3):
            live.scheduler.add(sequence(f"s{step}-{part}", [0, step], 3, arrived_s=float(step)))
        live.step((0, 3))
        if "long" in live.ended:
            break
    assert "long" in live.ended
    assert len(live.scheduler.waiting) > 10  # there was always somebody else to serve


def test_switched_off_nothing_is_found() -> None:
    """With the prefix cache off no block is kept and no counter moves."""
    live = world(prefix_cache=False)
    for name in "ab":
        live.scheduler.add(sequence(name, [0, 1] * 4, 3))
        while name not in live.ended:
            live.step((0, 2))
    assert live.scheduler.pool.num_cached == live.scheduler.prefix_queries == live.scheduler.prefix_hits == 0
