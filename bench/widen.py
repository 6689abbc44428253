"""Make a Llama-shaped target n times wider without changing a word of what it says.

Hidden units, heads and FFN units are repeated n times; every matrix that reads repeated units divides
by n.  RMSNorm sees the same mean square, each query head still finds its own key, and the head reads
1/n, so it is never tied.  A forward then costs about n² times as much, and a draft that fits the
narrow target fits the wide one.  Works on files alone; called by `bench.engine`, and by hand:

    python -m bench.widen --times 2 --out DIR [--target PATH] [--draft-out DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from adapter.contracts import SettingsError
from adapter.models import DTYPES, find_model, load_draft, prepare_pair
from adapter.pairs import Pair, read_config
from adapter.settings import load_settings
from bench.wider import wider, wider_config

WIDENABLE = ("llama", "mistral", "qwen2", "qwen3")  # plain residual stream, RMSNorm that only multiplies
_WEIGHTS = "model.safetensors"


def widen(source: Path, out: Path, times: int, dtype: torch.dtype | None = None) -> Path:
    """Write the model of folder `source` n times wider into folder `out`; return `out`.

    Args:
        times: 1 or more; 1 only unties the head.
        dtype: of the written weights; None keeps that of the source.

    Raises:
        SettingsError: the model is not Llama-shaped, or `times` is below 1.
    """
    config = read_config(source)
    if times < 1:
        raise SettingsError(f"times = {times}: a model can be widened 1 or more times")
    if config.get("model_type") not in WIDENABLE:
        raise SettingsError(
            f"{source} is a {config.get('model_type')!r} model; only {', '.join(WIDENABLE)} can be widened"
        )
    weights = {}
    for name, tensor in _tensors(source):
        kept = tensor if dtype is None else tensor.to(dtype)
        weights[name] = wider(name, kept, times).contiguous()
    if "lm_head.weight" not in weights:  # tied: the head reads n copies, the embedding writes each
        narrow = weights["model.embed_tokens.weight"].shape[1] // times
        tied = weights["model.embed_tokens.weight"][:, :narrow]
        weights["lm_head.weight"] = wider("lm_head.weight", tied, times).contiguous()
    _write(source, out, weights, wider_config(config, times))
    return out


def export_draft(pair: Pair, out: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the pair's draft as a complete model folder and return it.

    A pruned draft borrows embedding and head of its target; a widened target has others, so there the
    draft has to bring its own.

    Args:
        dtype: of the written weights; None is that of the pair.

    Raises:
        SettingsError: the pair has no draft.
    """
    model = load_draft(pair, dtype or DTYPES[pair.dtype])
    source = Path(pair.target_path if pair.draft_kind == "pruned" else str(pair.draft_path))
    config = read_config(source) | {"num_hidden_layers": model.config.num_hidden_layers}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][: model.config.num_hidden_layers]
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    if config.get("tie_word_embeddings", False):
        weights.pop("lm_head.weight", None)
    _write(source, out, weights, config)
    return out


def widened_pair(pair: Pair, times: int, folder: Path) -> tuple[Path, Path | None]:
    """Return target and draft folders of the widened pair, made in `folder` where they are not there yet.

    The names carry the fingerprints, so a changed pair is made anew.
    """
    dtype = DTYPES[pair.dtype]
    name = pair.target_name.replace("/", "--")  # of a hub, with its owner
    target = folder / f"{name}-{pair.target_fingerprint[:12]}-x{times}-{pair.dtype}"
    if not (target / "config.json").exists():
        widen(Path(pair.target_path), target, times, dtype)
    if pair.draft_kind == "none":
        return target, None
    draft = folder / f"draft-{pair.base_fingerprint[:12]}-{pair.dtype}"
    if not (draft / "config.json").exists():
        export_draft(pair, draft)
    return target, draft


def _tensors(folder: Path) -> Any:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                yield name, file.get_tensor(name)


def _write(source: Path, out: Path, weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Write a model folder with the source's tokenizer; it appears whole or not at all."""
    work = out.with_name(f"{out.name}.{os.getpid()}.part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith("model") and path.suffix not in (".safetensors", ".bin"):
            shutil.copyfile(path, work / path.name)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = {name: value for name, value in config.items() if name != "torch_dtype"} | {"dtype": dtype}
    (work / "config.json").write_text(json.dumps(config, indent=1))
    AutoConfig.from_pretrained(work)  # a config that transformers refuses must fail here
    save_file(weights, work / _WEIGHTS, metadata={"format": "pt"})
    shutil.rmtree(out, ignore_errors=True)
    os.replace(work, out)


def main() -> None:
    """Widen a target from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, required=True, help="how many times wider")
    parser.add_argument("--out", type=Path, required=True, help="folder of the wide model")
    parser.add_argument("--target", help="a folder or a name; the default target where left out")
    parser.add_argument("--draft-out", type=Path, help="also write the target's draft as a complete model here")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    settings = load_settings(target=arguments.target)
    print(widen(find_model(settings.target, settings.cache_dir), arguments.out, arguments.times))
    if arguments.draft_out:
        print(export_draft(prepare_pair(settings), arguments.draft_out))


if __name__ == "__main__":
    main()
