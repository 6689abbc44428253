"""The trainer's memory on disk: verified blocks that outlive the Redis stream.

Blocks are appended to files as frames (length, CRC-32, wire bytes); a frame torn by a kill fails its CRC,
is counted and skipped, and the next append opens a new file.  Every block has a sequence number that never
comes back: what is dropped from the middle of a file leaves an empty frame behind.  What is kept is bounded
by number, bytes and age, each segment giving up its oldest only while it holds more than any other; the
anchor set is kept while the target stays.  Files may hold as many dead bytes as live ones before they are
written anew.  What arrives twice, or says the same again, is stored once.  No torch; knows nothing about
drafts or Redis.  Called by `distill.intake`, `distill.selection` and `distill.evidence`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec

from adapter.contracts import DraftsmithError, VerifiedBlock, WireError
from adapter.wire import block_from_wire
from distill.frames import HEAD_BYTES, TornFileError, frames_of, pack, replace_file, sync_folder
from distill.retention import BlockRef, within_bounds

_FILE_BLOCKS = 256
_LOCK_S = 30.0


class ReplayError(DraftsmithError):
    """Raised when the replay store cannot be used; the message says why and what to do."""


class Marker(msgspec.Struct, frozen=True):
    """Blocks up to `sequence` were already trained into a version that passed its gate."""

    sequence: int = 0


class Anchors(msgspec.Struct, frozen=True):
    """Requests of one target's anchor set, by segment."""

    requests: dict[str, list[str]] = {}
    target_fingerprint: str = ""


class ReplayStore:
    """The blocks under one folder, oldest first. Opening reads every frame once and keeps none.

    Args:
        max_blocks, max_bytes, max_age_s: what is kept, the anchor set not counted.
        target_fingerprint: whose blocks are kept; those of another target teach what no longer holds. Empty: all.
        clock: epoch seconds, for the age.
    """

    def __init__(
        self, folder: Path, *, max_blocks: int, max_bytes: int = 1 << 40, max_age_s: float = float("inf"),
        target_fingerprint: str = "", clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._folder = folder
        self._max_blocks = max_blocks
        self.max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._target = target_fingerprint
        self.clock = clock
        self._file_blocks = max(1, min(_FILE_BLOCKS, max_blocks // 8))
        folder.mkdir(parents=True, exist_ok=True)
        self.torn = 0
        self.refs: list[BlockRef] = []
        self._torn_files: set[Path] = set()
        self.reload()

    def reload(self) -> None:
        """Read the folder again: another process may have appended or trimmed."""
        self.refs, self.torn, self._torn_files, self._next = [], 0, set(), 1
        self._anchored = {name for names in self.anchors.values() for name in names}
        for path in self._files():
            self._scan(path)
        self.refs = self._kept()

    def load(self, ref: BlockRef) -> VerifiedBlock:
        """Open one block.

        Raises:
            ReplayError: its file was trimmed or altered meanwhile.
        """
        try:
            with ref.file.open("rb") as file:
                file.seek(ref.offset)
                block = block_from_wire(file.read(ref.size))
        except (OSError, WireError) as error:
            raise ReplayError(f"replay block {ref.sequence} of {ref.file.name} cannot be read: {error}") from error
        if (block.request_id, _first_record(block)) != (ref.request_id, ref.first_record):  # written anew meanwhile
            raise ReplayError(f"replay block {ref.sequence} of {ref.file.name} has moved; open the store again")
        return block

    def append(self, payloads: Sequence[tuple[VerifiedBlock, bytes]]) -> int:
        """Store blocks that are not there yet, sync, drop the oldest; return how many were new."""
        known: set[object] = {(ref.request_id, ref.first_record) for ref in self.refs}
        known |= {ref.content for ref in self.refs}
        fresh = []
        for block, data in payloads:
            keys = {(block.request_id, _first_record(block)), _content(block)}
            if not keys & known:
                fresh.append((block, data))
            known |= keys
        for start in range(0, len(fresh), self._file_blocks):
            self._write(fresh[start : start + self._file_blocks])
        self._trim()
        return len(fresh)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder's writer lock and see what others appended before.

        Raises:
            ReplayError: another process held it for 30 seconds.
        """
        with (self._folder / "lock").open("a") as handle:
            deadline = time.monotonic() + _LOCK_S
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise ReplayError(
                            f"{self._folder} has been locked by another trainer for {_LOCK_S:g} s; stop that one first"
                        ) from None
                    time.sleep(0.1)
            self.reload()
            self._trim()
            yield

    # -- which blocks are fresh --------------------------------------------------------------

    @property
    def marker(self) -> int:
        """Sequence number up to which blocks are replay; later ones are fresh."""
        try:
            return msgspec.json.decode((self._folder / "marker.json").read_bytes(), type=Marker).sequence
        except (OSError, msgspec.MsgspecError):
            return 0

    def mark(self, sequence: int) -> None:
        """Remember that everything up to `sequence` went into a version that passed its gate."""
        replace_file(self._folder / "marker.json", msgspec.json.encode(Marker(max(sequence, self.marker))))

    # -- the anchor set ----------------------------------------------------------------------

    @property
    def anchors(self) -> dict[str, list[str]]:
        """Requests of the anchor set by segment: once one, always one."""
        try:
            found = msgspec.json.decode((self._folder / "anchors.json").read_bytes(), type=Anchors)
        except (OSError, msgspec.MsgspecError):
            return {}
        return found.requests if self._target in ("", found.target_fingerprint) else {}

    def anchor(self, requests: dict[str, list[str]]) -> None:
        """Replace the anchor set."""
        replace_file(self._folder / "anchors.json", msgspec.json.encode(Anchors(requests, self._target)))
        self._anchored = {name for names in requests.values() for name in names}

    # -- files -------------------------------------------------------------------------------

    def _path(self, sequence: int) -> Path:
        return self._folder / f"blocks-{sequence:012d}.bin"

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("blocks-*.bin"))

    def _scan(self, path: Path) -> None:
        sequence = _first_sequence(path)
        try:
            for offset, payload in frames_of(path.read_bytes()):
                block = _readable(payload) if payload else None
                if block is not None:
                    self.refs.append(_reference(block, sequence, path, offset, len(payload or b"")))
                elif payload != b"":  # an empty one was dropped
                    self.torn += 1
                sequence += 1
        except TornFileError:
            self.torn += 1
            self._torn_files.add(path)
        self._next = max(self._next, sequence)

    def _write(self, blocks: Sequence[tuple[VerifiedBlock, bytes]]) -> None:
        sequence = max(self._next, self.marker + 1)
        while (path := self._path(sequence)).exists():  # torn in its very first frame
            sequence += 1
        newest = self._files()[-1:]
        if newest and newest[0] not in self._torn_files and sequence == self._next:
            path = newest[0] if sequence - _first_sequence(newest[0]) + len(blocks) <= self._file_blocks else path
        with path.open("ab") as file:
            offset = file.seek(0, os.SEEK_END)
            for block, data in blocks:
                file.write(pack(data))
                self.refs.append(_reference(block, sequence, path, offset + HEAD_BYTES, len(data)))
                offset += HEAD_BYTES + len(data)
                sequence += 1
            self._next = sequence
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self._folder)

    def _kept(self) -> list[BlockRef]:
        """Return the blocks that are kept: the anchor set, and of all others what the bounds let in."""
        refs = [ref for ref in self.refs if self._target in ("", ref.target_fingerprint)]
        oldest_s = self.clock() - self._max_age_s
        anchored = [ref for ref in refs if ref.request_id in self._anchored]
        young = [ref for ref in refs if ref.request_id not in self._anchored and ref.logged_at_s >= oldest_s]
        kept = within_bounds(young, max_blocks=self._max_blocks, max_bytes=self.max_bytes)
        return sorted([*anchored, *kept], key=lambda ref: ref.sequence)

    def _trim(self) -> None:
        """Drop what is not kept: whole files at once, others when half of them is dead."""
        self.refs = self._kept()
        alive: dict[Path, list[BlockRef]] = defaultdict(list)
        for ref in self.refs:
            alive[ref.file].append(ref)
        files = self._files()
        for path in files:
            if not alive[path] and path != files[-1]:
                path.unlink(missing_ok=True)
                continue
            # later files know of later numbers; the last one must not forget any that was given out
            end = self._next if path == files[-1] else alive[path][-1].sequence + 1
            live = HEAD_BYTES * (end - _first_sequence(path)) + sum(ref.size for ref in alive[path])
            if 2 * live < path.stat().st_size:
                self._compact(path, alive[path], end)

    def _compact(self, path: Path, alive: Sequence[BlockRef], end: int) -> None:
        """Write a file anew, up to sequence number `end`, with empty frames in the place of dropped blocks."""
        data, by_sequence = path.read_bytes(), {ref.sequence: ref for ref in alive}
        parts: list[bytes] = []
        at, moved = 0, {}
        for sequence in range(_first_sequence(path), end):
            ref = by_sequence.get(sequence)
            parts.append(pack(b"" if ref is None else data[ref.offset : ref.offset + ref.size]))
            if ref is not None:
                moved[sequence] = replace(ref, offset=at + HEAD_BYTES)
            at += len(parts[-1])
        replace_file(path, b"".join(parts))
        self._torn_files.discard(path)
        self.refs = [moved.get(ref.sequence, ref) for ref in self.refs]


def _first_sequence(path: Path) -> int:
    return int(path.stem.removeprefix("blocks-"))


def _readable(payload: bytes) -> VerifiedBlock | None:
    try:
        return block_from_wire(payload)
    except WireError:
        return None


def _first_record(block: VerifiedBlock) -> int:
    return int(block.array("positions")[0])


def _reference(block: VerifiedBlock, sequence: int, path: Path, offset: int, size: int) -> BlockRef:
    return BlockRef(
        sequence=sequence,
        request_id=block.request_id,
        segment=block.segment,
        first_record=_first_record(block),
        records=block.num_records,
        tokens=len(block.token_ids) // 4,
        file=path,
        offset=offset,
        size=size,
        tenant=block.tenant,
        logged_at_s=block.logged_at_s,
        target_fingerprint=block.target_fingerprint,
        content=_content(block),
    )


def _content(block: VerifiedBlock) -> bytes:
    sampled = f"{block.segment} {block.sampling.temperature} {block.sampling.top_p} {block.sampling.top_k} "
    where = f"{block.first_position} "
    return hashlib.blake2b((sampled + where).encode() + block.token_ids, digest_size=16).digest()
