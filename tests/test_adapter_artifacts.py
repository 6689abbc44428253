"""Artifacts: stored by content, and refused by name for every way they can be damaged."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from adapter import artifacts
from adapter.contracts import ArtifactError

TARGET, BASE = "a" * 64, "b" * 64
SHAPES = {"m.0.lora_A": (2, 8), "m.0.lora_B": (6, 2)}


def factors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape).astype("<f4") for name, shape in SHAPES.items()}


def store(root: Path, file: Path) -> artifacts.Manifest:
    return artifacts.store(
        root, file, target_fingerprint=TARGET, base_fingerprint=BASE, rank=2, scale=2.0,
        trained_on={"requests": 10}, created_at_s=1000.0,
    )  # fmt: skip


def store_arrays(root: Path, arrays: dict[str, np.ndarray]) -> str:
    file = root / "made.safetensors"
    root.mkdir(parents=True, exist_ok=True)
    save_file(arrays, file)
    return store(root, file).sha256


def verify(root: Path, sha256: str, target: str = TARGET, base: str = BASE) -> Path:
    return artifacts.verify(root, sha256, target_fingerprint=target, base_fingerprint=base, expected=SHAPES)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, str]:
    """A good artifact: its root and hash."""
    return tmp_path / "artifacts", store_arrays(tmp_path / "artifacts", factors())


def rehash(root: Path, old: str, new_bytes: bytes) -> str:
    """Place altered bytes as a forger would: under their own hash, with a manifest that agrees."""
    old_manifest = json.loads((root / old / artifacts.MANIFEST).read_text())
    forged = root / "forged"
    forged.write_bytes(new_bytes)
    sha256 = artifacts.file_sha256(forged)
    folder = root / sha256
    folder.mkdir()
    forged.rename(folder / artifacts.TENSORS)
    manifest = {**old_manifest, "sha256": sha256, "size_bytes": len(new_bytes)}
    (folder / artifacts.MANIFEST).write_text(json.dumps(manifest))
    return sha256


def with_header(header: object, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def test_a_good_artifact_passes(stored: tuple[Path, str]) -> None:
    """What was stored is verified and is the same bytes."""
    root, sha256 = stored
    path = verify(root, sha256)
    assert (sha256, root / sha256) == (artifacts.file_sha256(path), path.parent)
    assert SHAPES == {name: spec.shape for name, spec in artifacts.read_header(path).items()}
    assert {artifacts.TENSORS, artifacts.MANIFEST} == {file.name for file in path.parent.iterdir()}


def test_storing_the_same_bytes_twice_is_one_artifact(stored: tuple[Path, str]) -> None:
    """Content addressing: a second store of equal bytes returns the first manifest."""
    root, sha256 = stored
    assert sha256 == store_arrays(root, factors())
    verify(root, sha256)


def test_a_crash_before_the_manifest_leaves_nothing_to_load(stored: tuple[Path, str]) -> None:
    """A folder without manifest does not exist for readers, and storing again completes it."""
    root, sha256 = stored
    (root / sha256 / artifacts.MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="has no manifest"):
        verify(root, sha256)
    assert sha256 == store_arrays(root, factors())
    verify(root, sha256)


def test_bfloat16_is_checked_too(tmp_path: Path) -> None:
    """bfloat16 artifacts pass, and their NaN is found."""
    data = np.full(28, 0x3F80, "<u2")
    header = {
        "m.0.lora_A": {"dtype": "BF16", "shape": [2, 8], "data_offsets": [0, 32]},
        "m.0.lora_B": {"dtype": "BF16", "shape": [6, 2], "data_offsets": [32, 56]},
    }
    for value, good in ((0x3F80, True), (0x7FC0, False), (0xFF80, False)):
        data[20] = value
        file = tmp_path / "f"
        file.write_bytes(with_header(header, data.tobytes()))
        sha256 = store(tmp_path, file).sha256
        if good:
            verify(tmp_path, sha256)
        else:
            with pytest.raises(ArtifactError, match="NaN or infinite"):
                verify(tmp_path, sha256)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.05, 0.3, 0.5, 0.9, 0.999])
def test_truncated_at_any_length(stored: tuple[Path, str], keep: float) -> None:
    """A file cut anywhere is refused as truncated, and as malformed when a forger fixes the manifest."""
    root, sha256 = stored
    path = root / sha256 / artifacts.TENSORS
    whole = path.read_bytes()
    cut = whole[: int(len(whole) * keep)]
    path.write_bytes(cut)
    with pytest.raises(ArtifactError, match="truncated"):
        verify(root, sha256)
    with pytest.raises(ArtifactError):
        verify(root, rehash(root, sha256, cut))


@pytest.mark.parametrize("where", [0, 9, 100, -40, -1])
def test_one_flipped_bit(stored: tuple[Path, str], where: int) -> None:
    """Any single flipped bit is an altered artifact."""
    root, sha256 = stored
    path = root / sha256 / artifacts.TENSORS
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="was altered"):
        verify(root, sha256)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", list(SHAPES))
def test_values_that_are_not_finite(tmp_path: Path, name: str, value: float) -> None:
    """One NaN or infinity anywhere is refused, and the tensor is named."""
    arrays = factors()
    arrays[name].flat[-1] = value
    with pytest.raises(ArtifactError, match=f"{name}.*NaN or infinite"):
        verify(tmp_path, store_arrays(tmp_path, arrays))


def _wrong_shape(arrays: dict[str, np.ndarray]) -> None:
    arrays["m.0.lora_A"] = arrays["m.0.lora_A"].T.copy()


def _missing(arrays: dict[str, np.ndarray]) -> None:
    del arrays["m.0.lora_B"]


def _extra(arrays: dict[str, np.ndarray]) -> None:
    arrays["../../etc/passwd"] = np.zeros(1, "<f4")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_wrong_shape, r"has shape \[8, 2\], expected \[2, 8\]"),
        (_missing, r"missing \['m.0.lora_B'\]"),
        (_extra, r"unexpected \['../../etc/passwd'\]"),
    ],
)
def test_the_wrong_tensors(tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None], words: str) -> None:
    """Keys and shapes must be exactly those of the pair; the difference is named."""
    arrays = factors()
    change(arrays)
    with pytest.raises(ArtifactError, match=words):
        verify(tmp_path, store_arrays(tmp_path, arrays))


def test_made_for_another_pair(stored: tuple[Path, str]) -> None:
    """Another target or another base draft is refused with both names."""
    root, sha256 = stored
    with pytest.raises(ArtifactError, match="trained for target aaaaaaaaaaaa.*runs target cccccccccccc"):
        verify(root, sha256, target="c" * 64)
    with pytest.raises(ArtifactError, match="changes base draft bbbbbbbbbbbb"):
        verify(root, sha256, base="c" * 64)


def test_a_manifest_that_lies(stored: tuple[Path, str]) -> None:
    """Unreadable, foreign and over-full manifests are refused."""
    root, sha256 = stored
    path = root / sha256 / artifacts.MANIFEST
    good = json.loads(path.read_text())
    for text, words in (
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps({**good, "post_install": "rm"}), "cannot be read"),
        (json.dumps({**good, "rank": "16"}), "cannot be read"),
        (json.dumps({**good, "sha256": "d" * 64}), "carries the manifest of"),
        (json.dumps({**good, "tensors": {}}), "has shape"),
    ):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=words):
            verify(root, sha256)


A, B = ({"dtype": "F32", "shape": list(shape)} for shape in SHAPES.values())
HEADERS = {
    "not json": b"{]" * 10,
    "a list": [],
    "empty": {},
    "entry is text": {"m.0.lora_A": "x"},
    "offsets are text": {"m.0.lora_A": {**A, "data_offsets": ["0", "64"]}},
    "negative offsets": {"m.0.lora_A": {**A, "data_offsets": [-64, 0]}},
    "negative shape": {"m.0.lora_A": {"dtype": "F32", "shape": [-2, -8], "data_offsets": [0, 64]}},
    "overflowing shape": {"m.0.lora_A": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}},
    "pickled dtype": {"m.0.lora_A": {"dtype": "O", "shape": [2, 8], "data_offsets": [0, 64]}},
    "overlap": {"m.0.lora_A": {**A, "data_offsets": [0, 64]}, "m.0.lora_B": {**B, "data_offsets": [16, 64]}},
    "gap": {"m.0.lora_A": {**A, "data_offsets": [0, 64]}, "m.0.lora_B": {**B, "data_offsets": [80, 128]}},
    "past the end": {"m.0.lora_A": {**A, "data_offsets": [0, 64]}, "m.0.lora_B": {**B, "data_offsets": [64, 112]}},
    "deep nesting": b"[" * 100_000,
    "deep in a value": b'{"m":' * 50_000 + b"0" + b"}" * 50_000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_headers_of_a_forger(stored: tuple[Path, str], header: object) -> None:
    """A hostile header under a matching hash and manifest is refused, never followed and never a crash."""
    root, sha256 = stored
    with pytest.raises(ArtifactError):
        verify(root, rehash(root, sha256, with_header(header, bytes(100))))


@pytest.mark.parametrize("length", [0, 1, (1 << 20) + 1, 1 << 62, (1 << 64) - 1])
def test_a_header_bomb_is_not_allocated(tmp_path: Path, length: int) -> None:
    """An announced header of up to 16 EiB is refused from its eight length bytes alone."""
    file = tmp_path / "bomb"
    file.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ArtifactError, match=f"announces a header of {length} bytes"):
        artifacts.read_header(file)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc", "", ".", "A" * 64, "a" * 63, "a" * 64 + "\n", "a" * 60 + "/../"]
)
def test_only_a_hash_is_a_place(tmp_path: Path, name: str) -> None:
    """Anything but 64 lower-case hex digits is refused before a path is made of it."""
    with pytest.raises(ArtifactError, match="is not a sha256"):
        artifacts.load_manifest(tmp_path, name)
    with pytest.raises(ArtifactError, match="is not a sha256"):
        verify(tmp_path, name)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_garbage_is_refused(tmp_path: Path, data: bytes) -> None:
    """n=150 random files: a named error, never another exception."""
    file = tmp_path / "garbage"
    file.write_bytes(data)
    with pytest.raises(ArtifactError):
        artifacts.read_header(file)
