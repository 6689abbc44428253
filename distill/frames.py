"""Files of frames: length, CRC-32 and payload, one after the other; how they are read, written and replaced.

A frame may be empty: it holds the place of one that was dropped.  Knows nothing of what the payloads mean.
No torch.  Called by `distill.replay`.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_HEAD = struct.Struct("<II")  # payload bytes, CRC-32 of the payload
HEAD_BYTES = _HEAD.size


class Frame(NamedTuple):
    """Where a payload begins, and the payload: None where its checksum is wrong."""

    offset: int
    payload: bytes | None


class TornFileError(Exception):
    """Raised when a file ends inside a frame."""


def pack(payload: bytes) -> bytes:
    """Return the frame of a payload."""
    return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def frames_of(data: bytes) -> Iterator[Frame]:
    """Go through a file's frames.

    Raises:
        TornFileError: after the last whole frame, where half a one follows.
    """
    at = 0
    while at < len(data):
        begin = at + HEAD_BYTES
        if begin > len(data):
            raise TornFileError
        size, checksum = _HEAD.unpack_from(data, at)
        payload = data[begin : begin + size]
        if len(payload) != size:
            raise TornFileError
        yield Frame(begin, payload if zlib.crc32(payload) == checksum else None)
        at = begin + size


def replace_file(path: Path, data: bytes) -> None:
    """Write a file beside and rename it, so that a kill leaves the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
