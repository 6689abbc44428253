"""Content-addressed draft artifacts on disk, and the checks that stand before every load.

An artifact is a folder named by the sha256 of its tensor file::

    artifacts/<sha256>/adapter.safetensors   LoRA factors, float32 or bfloat16
    artifacts/<sha256>/manifest.json         what it is, for which target, from which data

Both files are written beside, synced and renamed; the manifest comes last, so a folder without
one does not exist for readers.  Nothing here imports torch: the header of a safetensors file is
JSON, and values are checked with numpy.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from adapter.contracts import ArtifactError

TENSORS = "adapter.safetensors"
MANIFEST = "manifest.json"
_MAX_HEADER_BYTES = 1 << 20
_ITEM_BYTES = {"F32": 4, "BF16": 2}
_SHA256 = re.compile("[0-9a-f]{64}")


class TensorSpec(msgspec.Struct, frozen=True):
    """Shape and safetensors dtype name of one tensor."""

    shape: tuple[int, ...]
    dtype: str


class _HeaderEntry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0)], int]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an artifact claims to be; every claim is checked before a load."""

    schema: int
    sha256: str
    size_bytes: int
    target_fingerprint: str
    base_fingerprint: str
    rank: int
    scale: float  # merged weight = W0 + scale * B @ A
    tensors: dict[str, TensorSpec]
    trained_on: dict[str, Any]
    created_at_s: float


def file_sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def store(root: Path, tensors_file: Path, **claims: Any) -> Manifest:
    """Move a finished tensor file into the store and write its manifest last.

    `claims` are the manifest's fields except `schema`, `sha256`, `size_bytes` and `tensors`.
    Storing the same bytes again is not an error.
    """
    sha256 = file_sha256(tensors_file)
    manifest = Manifest(
        schema=1, sha256=sha256, size_bytes=tensors_file.stat().st_size, tensors=read_header(tensors_file), **claims
    )
    folder = artifact_folder(root, sha256)
    if (folder / MANIFEST).exists():
        return load_manifest(root, sha256)
    folder.mkdir(parents=True, exist_ok=True)
    place(tensors_file, folder / TENSORS)
    draft = folder / (MANIFEST + ".tmp")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    place(draft, folder / MANIFEST)
    return manifest


def load_manifest(root: Path, sha256: str) -> Manifest:
    """Read a manifest.

    Raises:
        ArtifactError: the artifact or its manifest is missing or unreadable.
    """
    path = artifact_folder(root, sha256) / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise ArtifactError(f"artifact {sha256[:12]} has no manifest at {path}") from None
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ArtifactError(f"the manifest of artifact {sha256[:12]} cannot be read: {error}") from error
    if manifest.sha256 != sha256:
        raise ArtifactError(f"artifact {sha256[:12]} carries the manifest of {manifest.sha256[:12]}")
    return manifest


def verify(
    root: Path, sha256: str, *, target_fingerprint: str, base_fingerprint: str, expected: dict[str, tuple[int, ...]]
) -> Path:
    """Check everything that can be checked without a model and return the tensor file.

    `expected` maps every tensor name that must be there, and no other, to its shape.

    Raises:
        ArtifactError: the first defect found, in words.
    """
    manifest = load_manifest(root, sha256)
    path = artifact_folder(root, sha256) / TENSORS
    if manifest.target_fingerprint != target_fingerprint:
        raise ArtifactError(
            f"artifact {sha256[:12]} was trained for target {manifest.target_fingerprint[:12]}, "
            f"this service runs target {target_fingerprint[:12]}"
        )
    if manifest.base_fingerprint != base_fingerprint:
        raise ArtifactError(
            f"artifact {sha256[:12]} changes base draft {manifest.base_fingerprint[:12]}, "
            f"this service runs base draft {base_fingerprint[:12]}"
        )
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"artifact {sha256[:12]} cannot be read: {error}") from error
    if size != manifest.size_bytes:
        raise ArtifactError(
            f"artifact {sha256[:12]} is truncated: {size} bytes, its manifest says {manifest.size_bytes}"
        )
    if file_sha256(path) != sha256:
        raise ArtifactError(f"artifact {sha256[:12]} was altered: its bytes no longer match its sha256")
    _check_tensors(path, sha256, manifest, expected)
    return path


def artifact_folder(root: Path, sha256: str) -> Path:
    """Return the folder of a hash; anything but 64 hex digits would be a path of somebody's choosing.

    Raises:
        ArtifactError: not a sha256.
    """
    if not _SHA256.fullmatch(sha256):
        raise ArtifactError(f"{sha256[:80]!r} is not a sha256; expected 64 lower-case hex digits")
    return root / sha256


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Read the tensor table of a safetensors file.

    Raises:
        ArtifactError: not a safetensors file, or a header larger than 1 MiB.
    """
    return {name: spec for name, (spec, _, _) in _header(path).items()}


def _check_tensors(path: Path, sha256: str, manifest: Manifest, expected: dict[str, tuple[int, ...]]) -> None:
    table = _header(path)
    missing, extra = sorted(expected.keys() - table.keys()), sorted(table.keys() - expected.keys())
    if missing or extra:
        raise ArtifactError(
            f"artifact {sha256[:12]} has the wrong tensors: missing {missing[:3]}, unexpected {extra[:3]}"
        )
    with path.open("rb") as file:
        for name, (spec, start, end) in table.items():
            if tuple(spec.shape) != tuple(expected[name]) or manifest.tensors.get(name) != spec:
                raise ArtifactError(f"tensor {name!r} has shape {list(spec.shape)}, expected {list(expected[name])}")
            file.seek(start)
            if not _finite(file.read(end - start), spec.dtype):
                raise ArtifactError(f"tensor {name!r} of artifact {sha256[:12]} holds NaN or infinite values")


def _finite(data: bytes, dtype: str) -> bool:
    if dtype == "BF16":  # all exponent bits set is NaN or infinity
        return bool(np.all((np.frombuffer(data, "<u2") & 0x7F80) != 0x7F80))
    return bool(np.all(np.isfinite(np.frombuffer(data, "<f4"))))


def _header(path: Path) -> dict[str, tuple[TensorSpec, int, int]]:
    """Return spec, first byte and end of every tensor; together they must fill the file exactly."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise ArtifactError(f"{path.name} announces a header of {length} bytes; at most {_MAX_HEADER_BYTES}")
            raw = msgspec.json.decode(file.read(length), type=dict[str, Any])
        size = path.stat().st_size
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise ArtifactError(f"{path.name} is not a safetensors file: {error}") from error
    raw.pop("__metadata__", None)
    base = 8 + length
    table = {name: _place_of(path, name, item, base) for name, item in raw.items()}
    if not table:
        raise ArtifactError(f"{path.name} holds no tensors")
    end = base
    for name, (_, start, stop) in sorted(table.items(), key=lambda item: item[1][1:]):
        if start != end:
            raise ArtifactError(f"{path.name}: tensor {name!r} starts at byte {start}, the one before ends at {end}")
        end = stop
    if end != size:
        raise ArtifactError(f"{path.name} has {size} bytes, its tensors end at {end}")
    return table


def _place_of(path: Path, name: str, item: Any, base: int) -> tuple[TensorSpec, int, int]:
    try:
        entry = msgspec.convert(item, _HeaderEntry)
        size = _ITEM_BYTES[entry.dtype] * math.prod(entry.shape)
    except (KeyError, msgspec.ValidationError) as error:
        raise ArtifactError(f"{path.name}: tensor {name!r} is described wrongly: {error!r}") from error
    start, end = entry.data_offsets
    if end - start != size:
        raise ArtifactError(f"{path.name}: tensor {name!r} holds {end - start} bytes, its shape needs {size}")
    return TensorSpec(entry.shape, entry.dtype), base + start, base + end


def place(source: Path, destination: Path) -> None:
    """Sync a finished file and move it into place so that a crash leaves the old or the new one."""
    temporary = destination.with_name(destination.name + ".part")
    if source != temporary:
        shutil.move(source, temporary)
    for target in (temporary, temporary.parent):
        handle = os.open(target, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    os.replace(temporary, destination)
    handle = os.open(destination.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
