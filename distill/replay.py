"""The trainer's memory on disk: verified blocks that outlive the Redis stream.

Blocks are appended to segment files as frames (length, CRC-32, wire bytes); a frame torn by a kill
fails its CRC, is counted and skipped, and the next append opens a new file.  Every block has a
sequence number that never comes back.  The newest `max_blocks` are kept, and what arrives twice is
stored once.  No torch; knows nothing about drafts or Redis.  Called by `distill.intake`,
`distill.selection` and `distill.trainer`.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from adapter.contracts import DraftsmithError, VerifiedBlock, WireError
from adapter.wire import block_from_wire

_FRAME = struct.Struct("<II")  # payload bytes, CRC-32 of the payload
_FILE_BLOCKS = 256
_LOCK_S = 30.0


class ReplayError(DraftsmithError):
    """Raised when the replay store cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class BlockRef:
    """Where one block lies, and what is needed to choose it without opening it."""

    sequence: int
    request_id: str
    segment: str
    first_record: int
    records: int
    tokens: int
    file: Path
    offset: int
    size: int


class Marker(msgspec.Struct, frozen=True):
    """Blocks up to `sequence` were already trained into a version that passed its gate."""

    sequence: int = 0


class ReplayStore:
    """The blocks under one folder, oldest first. Opening reads every frame once and keeps none."""

    def __init__(self, folder: Path, *, max_blocks: int) -> None:
        self._folder = folder
        self._max_blocks = max_blocks
        self._file_blocks = max(1, min(_FILE_BLOCKS, max_blocks // 8))
        folder.mkdir(parents=True, exist_ok=True)
        self.torn = 0
        self.refs: list[BlockRef] = []
        self._torn_files: set[Path] = set()
        self.reload()

    def reload(self) -> None:
        """Read the folder again: another process may have appended or trimmed."""
        self.refs, self.torn, self._torn_files = [], 0, set()
        for path in self._files():
            self._scan(path)
        self.refs = self.refs[-self._max_blocks :]

    def load(self, ref: BlockRef) -> VerifiedBlock:
        """Open one block.

        Raises:
            ReplayError: its file was trimmed or altered meanwhile.
        """
        try:
            with ref.file.open("rb") as file:
                file.seek(ref.offset)
                return block_from_wire(file.read(ref.size))
        except (OSError, WireError) as error:
            raise ReplayError(f"replay block {ref.sequence} of {ref.file.name} cannot be read: {error}") from error

    def append(self, payloads: Sequence[tuple[VerifiedBlock, bytes]]) -> int:
        """Store blocks that are not there yet, sync, drop the oldest; return how many were new."""
        known = {(ref.request_id, ref.first_record) for ref in self.refs}
        fresh = []
        for block, data in payloads:
            key = (block.request_id, _first_record(block))
            if key not in known:
                known.add(key)
                fresh.append((block, data))
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
        temporary = self._folder / "marker.json.tmp"
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(Marker(max(sequence, self.marker))))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._folder / "marker.json")

    # -- files -------------------------------------------------------------------------------

    def _path(self, sequence: int) -> Path:
        return self._folder / f"blocks-{sequence:012d}.bin"

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("blocks-*.bin"))

    def _scan(self, path: Path) -> None:
        data = path.read_bytes()
        sequence, offset = int(path.stem.removeprefix("blocks-")), 0
        while offset < len(data):
            payload, checksum = _frame(data, offset)
            if payload is None:
                self.torn += 1
                self._torn_files.add(path)
                return
            block = _readable(payload) if zlib.crc32(payload) == checksum else None
            if block is None:
                self.torn += 1
            else:
                self.refs.append(_reference(block, sequence, path, offset + _FRAME.size, len(payload)))
            offset += _FRAME.size + len(payload)
            sequence += 1

    def _write(self, blocks: Sequence[tuple[VerifiedBlock, bytes]]) -> None:
        last = self.refs[-1] if self.refs else None
        sequence = max(last.sequence if last else 0, self.marker) + 1
        while (path := self._path(sequence)).exists():  # torn in its very first frame
            sequence += 1
        room = 0
        if last is not None and last.file not in self._torn_files and last.file.exists():
            room = self._file_blocks - (sequence - int(last.file.stem.removeprefix("blocks-")))
        if last is not None and room >= len(blocks):
            path = last.file
        with path.open("ab") as file:
            offset = file.seek(0, os.SEEK_END)
            for block, data in blocks:
                file.write(_FRAME.pack(len(data), zlib.crc32(data)) + data)
                self.refs.append(_reference(block, sequence, path, offset + _FRAME.size, len(data)))
                offset += _FRAME.size + len(data)
                sequence += 1
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(self._folder)

    def _trim(self) -> None:
        self.refs = self.refs[-self._max_blocks :]
        oldest = self.refs[0].file if self.refs else None
        for path in self._files():
            if oldest is not None and path < oldest:
                path.unlink(missing_ok=True)


def _frame(data: bytes, offset: int) -> tuple[bytes | None, int]:
    """Return payload and checksum of the frame at `offset`; no payload where the file ends too soon."""
    if len(data) - offset < _FRAME.size:
        return None, 0
    size, checksum = _FRAME.unpack_from(data, offset)
    payload = data[offset + _FRAME.size : offset + _FRAME.size + size]
    return (payload if len(payload) == size else None), checksum


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
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
