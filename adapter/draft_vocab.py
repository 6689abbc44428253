"""Trimmed draft vocabularies as files: which target tokens a draft scores, and where that choice came from.

A vocabulary is a folder named by the sha256 of its token ids::

    vocabularies/<sha256>/tokens.bin      token ids, ascending, little-endian uint32
    vocabularies/<sha256>/manifest.json   for which target, from which counts

A token outside it is never proposed, so it costs acceptance and never changes text.  Knows nothing
about SQL (`adapter.vocab_registry`) or about how ids are chosen (`adapter.vocab_selection`).  No torch.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from adapter.artifacts import MANIFEST, artifact_folder, place
from adapter.contracts import ArtifactError

TOKENS = "tokens.bin"
FULL = 0  # the number of the full vocabulary, which has no file
_SCHEMA = 1

TokenIds = NDArray[np.uint32]


class VocabManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a vocabulary claims to be; every claim is checked before a load.

    `vocab_size` is the width of the target's logits.  `coverage` is the share of the counted tokens
    that are inside, None where nothing was counted.
    """

    schema: int
    sha256: str
    size: int
    vocab_size: int
    target_fingerprint: str
    coverage: float | None
    counted: dict[str, Any]
    created_at_s: float


def store_vocab(
    root: Path, token_ids: TokenIds, *, vocab_size: int, target_fingerprint: str, coverage: float | None,
    counted: dict[str, Any], created_at_s: float,
) -> VocabManifest:  # fmt: skip
    """Write a vocabulary, its manifest last.  Storing the same ids again returns what is there.

    Shapes: token_ids [size], in any order, without repeats.

    Raises:
        ArtifactError: no ids, a repeated one, or one outside the target's vocabulary.
    """
    ids = np.sort(np.asarray(token_ids)).astype("<u4")
    _check_ids(ids, vocab_size, "the new vocabulary")
    data = ids.tobytes()
    manifest = VocabManifest(
        schema=_SCHEMA, sha256=hashlib.sha256(data).hexdigest(), size=len(ids), vocab_size=vocab_size,
        target_fingerprint=target_fingerprint, coverage=coverage, counted=counted, created_at_s=created_at_s,
    )  # fmt: skip
    folder = artifact_folder(root, manifest.sha256)
    if (folder / MANIFEST).exists() and _intact(folder / TOKENS, manifest.sha256):
        return _read_manifest(root, manifest.sha256)
    folder.mkdir(parents=True, exist_ok=True)
    _write(data, folder / TOKENS)
    _write(msgspec.json.format(msgspec.json.encode(manifest), indent=1), folder / MANIFEST)
    return manifest


def load_vocab(root: Path, sha256: str, *, target_fingerprint: str, vocab_size: int) -> TokenIds:
    """Check a vocabulary and return its token ids, ascending.

    Raises:
        ArtifactError: the first defect found, in words.
    """
    manifest = _read_manifest(root, sha256)
    name = f"vocabulary {sha256[:12]}"
    if manifest.target_fingerprint != target_fingerprint or manifest.vocab_size != vocab_size:
        raise ArtifactError(
            f"{name} was made for target {manifest.target_fingerprint[:12]} with {manifest.vocab_size} tokens, "
            f"this service runs target {target_fingerprint[:12]} with {vocab_size}"
        )
    try:
        data = (artifact_folder(root, sha256) / TOKENS).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{name} cannot be read: {error}") from error
    if len(data) != 4 * manifest.size:
        raise ArtifactError(f"{name} is truncated: {len(data)} bytes, {manifest.size} tokens take {4 * manifest.size}")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ArtifactError(f"{name} was altered: its bytes no longer match its sha256")
    ids = np.frombuffer(data, "<u4")
    _check_ids(ids, vocab_size, name)
    return ids


def _check_ids(ids: TokenIds, vocab_size: int, name: str) -> None:
    if not len(ids):
        raise ArtifactError(f"{name} holds no tokens; at least one is needed")
    if np.any(ids[1:] <= ids[:-1]):
        raise ArtifactError(f"{name} is not in ascending order, or holds a token twice")
    if int(ids[-1]) >= vocab_size:
        raise ArtifactError(f"{name} holds token {int(ids[-1])}; the target has {vocab_size} tokens")


def _read_manifest(root: Path, sha256: str) -> VocabManifest:
    path = artifact_folder(root, sha256) / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=VocabManifest)
    except FileNotFoundError:
        raise ArtifactError(f"vocabulary {sha256[:12]} has no manifest at {path}") from None
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ArtifactError(f"the manifest of vocabulary {sha256[:12]} cannot be read: {error}") from error
    if manifest.schema != _SCHEMA or manifest.sha256 != sha256:
        raise ArtifactError(
            f"vocabulary {sha256[:12]} carries the manifest of {manifest.sha256[:12]}, schema {manifest.schema}; "
            f"this build reads schema {_SCHEMA}"
        )
    return manifest


def _intact(path: Path, sha256: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    except OSError:
        return False


def _write(data: bytes, path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    place(Path(file.name), path)
