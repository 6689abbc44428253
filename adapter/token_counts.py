"""How often each token was committed lately, per segment: what a draft vocabulary is chosen from.

The decoding loop only appends to a bounded queue; a thread folds it into arrays and writes them to
one file now and then, so nothing here makes a step wait.  Counts are halved when they grow too
large, so they tell of the last million or two of tokens; order is not kept, so no text is either.
"""

from __future__ import annotations

import os
import tempfile
import threading
import zipfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from adapter.contracts import ArtifactError

COUNTS = "counts.npz"
OTHER = "other"  # segments beyond the first `max_segments` share this one
_QUEUE = 1 << 16  # rounds held while the thread is away; older ones are lost, which biases nothing

Counted = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class CountSnapshot:
    """Counts at one moment.  Shapes: each segment [vocab_size] uint32."""

    vocab_size: int
    target_fingerprint: str
    segments: dict[str, Counted] = field(default_factory=dict)

    @property
    def total(self) -> Counted:
        """Counts of all segments together."""
        total = np.zeros(self.vocab_size, np.uint32)
        for counts in self.segments.values():
            total += counts
        return total


class TokenCounts:
    """Decayed counts of committed tokens in memory.

    Args:
        halve_at: when all counts together reach this, each is halved; a segment left empty is dropped.
    """

    def __init__(
        self, vocab_size: int, target_fingerprint: str, *, max_segments: int = 32, halve_at: int = 1 << 21
    ) -> None:
        self._vocab_size = vocab_size
        self._fingerprint = target_fingerprint
        self._max_segments = max_segments
        self._halve_at = halve_at
        self._queue: deque[tuple[str, list[int]]] = deque(maxlen=_QUEUE)
        self._segments: dict[str, Counted] = {}
        self._total = 0
        self._lock = threading.Lock()

    def add(self, segment: str, tokens: list[int]) -> None:
        """Note committed tokens.  Called by the decoding loop; only appends."""
        self._queue.append((segment, tokens))

    def fold(self) -> NDArray[np.int64]:
        """Bring everything noted so far into the arrays and return its token ids."""
        pending: dict[str, list[int]] = {}
        for _ in range(len(self._queue)):
            segment, tokens = self._queue.popleft()
            pending.setdefault(segment, []).extend(tokens)
        with self._lock:
            folded = [self._fold_one(segment, np.array(tokens, np.int64)) for segment, tokens in pending.items()]
            while self._total >= self._halve_at:
                self._halve()
        return np.concatenate(folded) if folded else np.empty(0, np.int64)

    def snapshot(self) -> CountSnapshot:
        """Return a copy of the counts."""
        with self._lock:
            segments = {name: counts.copy() for name, counts in self._segments.items()}
        return CountSnapshot(self._vocab_size, self._fingerprint, segments)

    def restore(self, snapshot: CountSnapshot) -> None:
        """Start from earlier counts; those of another target are left aside."""
        if (snapshot.vocab_size, snapshot.target_fingerprint) != (self._vocab_size, self._fingerprint):
            return
        with self._lock:
            self._segments = {name: counts.copy() for name, counts in snapshot.segments.items()}
            self._total = sum(int(counts.sum()) for counts in self._segments.values())

    def _fold_one(self, segment: str, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        if segment not in self._segments:
            if len(self._segments) >= self._max_segments - 1:
                segment = OTHER
            self._segments.setdefault(segment, np.zeros(self._vocab_size, np.uint32))
        np.add.at(self._segments[segment], ids, 1)
        self._total += len(ids)
        return ids

    def _halve(self) -> None:
        halved = {name: counts >> np.uint32(1) for name, counts in self._segments.items()}
        self._segments = {name: counts for name, counts in halved.items() if counts.any()}
        self._total = sum(int(counts.sum()) for counts in self._segments.values())


def write_counts(folder: Path, snapshot: CountSnapshot) -> None:
    """Replace the file of counts; a crash leaves the old or the new one."""
    found = [np.flatnonzero(counts) for counts in snapshot.segments.values()]
    values = [counts[ids] for ids, counts in zip(found, snapshot.segments.values(), strict=True)]
    head = {
        "names": list(snapshot.segments), "sizes": [len(ids) for ids in found], "vocab_size": snapshot.vocab_size,
        "target_fingerprint": snapshot.target_fingerprint,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        np.savez(
            file,
            head=np.frombuffer(msgspec.json.encode(head), np.uint8),
            ids=np.concatenate([*found, np.empty(0, np.int64)]).astype("<u4"),
            counts=np.concatenate([*values, np.empty(0, np.uint32)]).astype("<u4"),
        )
    os.replace(file.name, folder / COUNTS)


class _Head(msgspec.Struct):
    names: list[str]
    sizes: list[int]
    vocab_size: int
    target_fingerprint: str


def read_counts(folder: Path) -> CountSnapshot | None:
    """Read the file of counts; None when nothing was counted yet.

    Raises:
        ArtifactError: the file cannot be read, or contradicts itself.
    """
    path = folder / COUNTS
    if not path.exists():
        return None
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            head = msgspec.json.decode(file["head"].tobytes(), type=_Head)
            ids, counts = file["ids"], file["counts"]
        segments, start = {}, 0
        for name, size in zip(head.names, head.sizes, strict=True):
            segments[name] = np.zeros(head.vocab_size, np.uint32)
            segments[name][ids[start : start + size]] = counts[start : start + size]
            start += size
    except (OSError, EOFError, KeyError, IndexError, ValueError, TypeError, zipfile.BadZipFile, MemoryError,
            msgspec.MsgspecError) as error:  # fmt: skip
        raise ArtifactError(
            f"the token counts in {path} cannot be read ({type(error).__name__}: {error}); delete the file to start "
            "anew"
        ) from error
    return CountSnapshot(head.vocab_size, head.target_fingerprint, segments)
