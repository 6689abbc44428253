"""The blocks of the KV caches: who holds them, and which hold a prefix that another request can use.

Plain integers, no tensors: target and draft have a KV pool each and share the block ids.  A block is
found again by a hash over its tokens and all tokens before it, so a hit is always a whole prefix.
Only what the scheduler publishes can be found; it publishes full blocks of verified tokens alone.
Blocks that nobody holds keep what is in them until they are needed; the one unused longest goes first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from hashlib import blake2b

_HASH_BYTES = 32  # tenants share the cache: nobody may be able to search for a collision


def root_key(cache_salt: str) -> bytes:
    """Return the parent of every first block; requests with different salts never share a block."""
    return blake2b(cache_salt.encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES, person=b"root").digest()


def block_key(parent: bytes, tokens: SequenceOf[int]) -> bytes:
    """Return the key of a block of `tokens` that follows the block with key `parent`."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=_HASH_BYTES, person=b"block").digest()


class BlockPool:
    """Blocks 1 to num_blocks - 1 with reference counts; block 0 is never given away.

    Idle rows and dry runs may write to block 0.

    Args:
        caching: False forgets every block as soon as nobody holds it.
        clean: empties spoiled blocks, before they are given away again.
    """

    def __init__(
        self, num_blocks: int, *, caching: bool = True, clean: Callable[[list[int]], None] = lambda blocks: None
    ) -> None:
        self.num_blocks = num_blocks
        self._caching = caching
        self._clean = clean
        self._spoiled: set[int] = set()  # held, and not to be shared
        self._free = list(range(num_blocks - 1, 0, -1))  # nothing of use is in these
        self._idle: OrderedDict[int, None] = OrderedDict()  # found by key, held by nobody; oldest first
        self._holders = [0] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._draft: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks nobody holds; those that can be found by key count, for they can be given away."""
        return len(self._free) + len(self._idle)

    @property
    def unheld(self) -> list[int]:
        """The blocks nobody holds, in no order that means anything."""
        return [*self._free, *self._idle]

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by key, held or not."""
        return len(self._by_key)

    def holders(self, block: int) -> int:
        """Return how many requests hold a block."""
        return self._holders[block]

    def allocate(self, count: int) -> list[int]:
        """Hand out blocks for writing; what was cached longest unused makes room.

        Raises:
            ValueError: fewer than `count` blocks are free.
        """
        if count > self.num_free:
            raise ValueError(f"{count} blocks wanted, {self.num_free} are free; preempt a request first")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Return the cached blocks of the longest leading run of `keys`.  Holds nothing."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Iterable[int]) -> int:
        """Return how many of `blocks` nobody holds: holding them takes as many from `num_free`."""
        return sum(block in self._idle for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Hold blocks that `find` returned, for reading only."""
        for block in blocks:
            self._idle.pop(block, None)
            self._holders[block] += 1

    def release(self, blocks: SequenceOf[int]) -> None:
        """Let go of blocks, given in the order of their tokens.

        The last ones become old first: a prefix is of use without its end, but not the other way round.

        Raises:
            ValueError: a block is held by nobody.
        """
        for block in reversed(blocks):
            if not self._holders[block]:
                raise ValueError(f"block {block} was released more often than it was held")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._keys:
                self._idle[block] = None
                continue
            if block in self._spoiled:
                self._spoiled.discard(block)
                self._clean([block])
            self._draft.pop(block, None)
            self._free.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """Let a held block be found from now on; its tokens are final and the target's KV of all is there.

        Where another block has the same content already, this one stays its request's own.
        """
        if self._caching and key not in self._by_key and block not in self._keys and block not in self._spoiled:
            self._by_key[key] = block
            self._keys[block] = key

    def spoil(self, blocks: Iterable[int]) -> None:
        """Let held blocks be found no more: what is in them is wrong, and is emptied once nobody holds them."""
        for block in blocks:
            key = self._keys.pop(block, None)
            if key is not None:
                del self._by_key[key]
            self._spoiled.add(block)

    def note_draft(self, block: int, version: int | None) -> None:
        """Note which version wrote the draft's KV of a held block; None when no one version wrote all of it."""
        if version is None:
            self._draft.pop(block, None)
        else:
            self._draft[block] = version

    def num_drafted(self, blocks: Iterable[int], version: int) -> int:
        """Return how many leading blocks have the draft's KV of this version complete."""
        count = 0
        for block in blocks:
            if self._draft.get(block) != version:
                break
            count += 1
        return count

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._by_key[self._keys.pop(block)]
        self._draft.pop(block, None)
        return block
