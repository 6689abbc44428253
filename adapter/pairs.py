"""Name a target and its draft, and tell one pair from another without loading either.

A fingerprint covers what decides a model's output: tensor names, shapes and a sample of every
tensor's bytes, the architecture's numbers, and the token map.  It does not change with file names,
library versions or the order of JSON keys.  No torch here: the API and the monitors read pairs too.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import msgspec

from adapter.artifacts import file_sha256
from adapter.contracts import SettingsError
from adapter.facts import PAIR, STARTING, Facts

SHIPPED = Path(__file__).parent / "data"
DRAFT_TENSORS = "draft.safetensors"
DRAFT_MANIFEST = "manifest.json"
LORA_MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_ARCHITECTURE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "tie_word_embeddings", "hidden_act",
)  # fmt: skip
_SAMPLE_BYTES = 4096


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """A target and the base draft that proposes for it.

    `lora_shapes` maps each linear module of the draft that versions may change to (out, in).  `shared_path` is a
    folder with the target's config and what the draft borrows, embedding and head, kept so that a trainer needs no
    file of the target.
    """

    target_name: str
    target_path: str
    target_fingerprint: str
    dtype: Literal["float32", "bfloat16"]
    draft_kind: Literal["pruned", "model", "none"]
    draft_path: str | None
    base_fingerprint: str
    lora_shapes: dict[str, tuple[int, int]]
    shared_path: str | None = None

    @property
    def lender_path(self) -> Path:
        """The folder from which the target's config is read, and what a pruned draft borrows."""
        return Path(self.shared_path or self.target_path)


class DraftManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a pruned draft file is: which layers of which target, trained how, and how well it does."""

    kind: Literal["pruned"]
    layers: tuple[int, ...]
    target_name: str
    target_fingerprint: str
    sha256: str
    licence: str
    recipe: dict[str, Any]
    measured: dict[str, Any]


def pair_from_facts(facts: Facts) -> Pair | None:
    """Return the pair the engine said it serves, or None before its first start."""
    value = facts.get(PAIR)
    return None if value is None else msgspec.convert(value, Pair)


def loaded_pair(facts: Facts) -> Pair | None:
    """Return the pair of the engine that runs, or None while it loads: what SQL names then may be gone."""
    return None if facts.get(STARTING) is not None else pair_from_facts(facts)


def expected_tensors(pair: Pair, rank: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor an artifact of this pair and rank must hold."""
    expected: dict[str, tuple[int, ...]] = {}
    for module, (out_features, in_features) in pair.lora_shapes.items():
        expected[f"{module}.lora_A"] = (rank, in_features)
        expected[f"{module}.lora_B"] = (out_features, rank)
    return expected


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model folder's config.json.

    Raises:
        SettingsError: there is no such folder or file.
    """
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{folder} is not a model folder: its config.json cannot be read ({error})") from None


def model_fingerprint(folder: Path) -> str:
    """Hash what decides a model's output; reads a few kilobytes of every tensor.

    Raises:
        SettingsError: the folder holds no safetensors weights.
    """
    digest = hashlib.sha256()
    config = read_config(folder)
    digest.update(json.dumps({name: config.get(name) for name in _ARCHITECTURE}, sort_keys=True).encode())
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SettingsError(f"{folder} holds no .safetensors weights; pickled weights are not loaded")
    for name, part in sorted(_samples(files)):
        digest.update(name.encode() + part)
    digest.update(token_map_hash(folder).encode())
    return digest.hexdigest()


def token_map_hash(folder: Path) -> str:
    """Hash the token-to-id map, special tokens included; "" where the folder has no tokenizer."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return ""
    content = json.loads(path.read_text())
    vocab = content["model"].get("vocab", {})
    items = list(vocab.items()) if isinstance(vocab, dict) else [(str(item[0]), i) for i, item in enumerate(vocab)]
    items += [(token["content"], token["id"]) for token in content.get("added_tokens", [])]
    return hashlib.sha256(json.dumps(sorted(set(items))).encode()).hexdigest()


def _samples(files: list[Path]) -> list[tuple[str, bytes]]:
    found = []
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(length))
            table.pop("__metadata__", None)
            for name, item in table.items():
                start, end = item["data_offsets"]
                file.seek(8 + length + start)
                head = f"{item['dtype']}{item['shape']}".encode()
                found.append((name, head + file.read(min(_SAMPLE_BYTES, end - start))))
    return found


def find_draft(
    choice: str, target_name: str, target_path: Path, target_fingerprint: str
) -> tuple[str, Path | None, str]:
    """Resolve `--draft` to (kind, folder, fingerprint).

    Raises:
        SettingsError: the draft does not exist, belongs to another target or has another token map.
    """
    if choice == "none":
        return "none", None, "none"
    if choice == "auto":
        folder = SHIPPED / target_name
        if not (folder / DRAFT_MANIFEST).exists():
            raise SettingsError(
                f"no draft is shipped for target {target_name!r}. Make one with "
                f"`draftsmith bootstrap --target {target_path} --out DIR` and pass `--draft DIR`, name a smaller model "
                "of the same family with `--draft`, or serve without a draft model with `--draft none`"
            )
    else:
        folder = Path(choice)
    if (folder / DRAFT_MANIFEST).exists():
        return "pruned", folder, _check_pruned(folder, target_fingerprint)
    fingerprint = model_fingerprint(folder)  # first: a folder without a model has no token map either
    if token_map_hash(folder) != token_map_hash(target_path):
        raise SettingsError(
            f"draft {folder} and target {target_path} map tokens to ids differently; a draft must share the target's "
            "tokenizer exactly"
        )
    return "model", folder, fingerprint


def load_draft_manifest(folder: Path) -> DraftManifest:
    """Read a pruned draft's manifest.

    Raises:
        SettingsError: it cannot be read.
    """
    try:
        return msgspec.json.decode((folder / DRAFT_MANIFEST).read_bytes(), type=DraftManifest)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise SettingsError(f"draft {folder}: {DRAFT_MANIFEST} cannot be read: {error}") from error


def _check_pruned(folder: Path, target_fingerprint: str) -> str:
    manifest = load_draft_manifest(folder)
    if manifest.target_fingerprint != target_fingerprint:
        raise SettingsError(
            f"draft {folder} was made for target {manifest.target_fingerprint[:12]} ({manifest.target_name}), "
            f"this target is {target_fingerprint[:12]}; make a draft for it with `draftsmith bootstrap`"
        )
    sha256 = file_sha256(folder / DRAFT_TENSORS)
    if sha256 != manifest.sha256:
        raise SettingsError(f"draft {folder} was altered: {DRAFT_TENSORS} no longer matches its manifest's sha256")
    return sha256
