"""Read LoRA factors and merge them into a draft: W = W0 + scale * B @ A, always from W0.

Called by `adapter.hotswap`, which serves the result, and by the trainer's gate, which judges the very same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from adapter import artifacts
from adapter.contracts import ArtifactError
from adapter.pairs import Pair, expected_tensors


def load_factors(path: Path) -> dict[str, torch.Tensor]:
    """Read the factors of a checked artifact in float32."""
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def base_weights(model: Any, modules: list[str]) -> dict[str, torch.Tensor]:
    """Return copies of the pristine weights W0 of the named linear modules."""
    return {name: model.get_submodule(name).weight.detach().clone() for name in modules}


class Module(NamedTuple):
    """One linear layer that is merged.  Shapes: out and base [out, in]; a [rank, in]; b [out, rank]."""

    out: torch.Tensor
    base: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor


def merge_all(modules: list[Module], scale: float) -> torch.Tensor:
    """Write base + scale * b @ a into every module.

    Shapes: result [modules, 3] float32: the squared norms of the update and of the base, and how many numbers of
    the update are not finite.
    """
    figures = []
    for out, base, a, b in modules:
        update = scale * (b @ a)
        out.copy_(base.float() + update)
        figures.append(torch.stack((update.square().sum(), base.float().square().sum(), (~update.isfinite()).sum())))
    return torch.stack(figures)


@torch.no_grad()
def merge(
    model: Any, base: dict[str, torch.Tensor], factors: dict[str, torch.Tensor], scale: float, *,
    max_norm_ratio: float | None = None, write: Callable[[Any, float], torch.Tensor] = merge_all,
) -> None:  # fmt: skip
    """Write W0 + scale * B @ A into the model's weights in place; without factors, write W0.

    Shapes: factors "<module>.lora_A" [rank, in] and "<module>.lora_B" [out, rank].
    The sum is formed in float32 and rounded once, so versions never accumulate rounding.  `write` does it, and
    returns what `merge_all` does.

    Raises:
        ArtifactError: an update is not finite, or larger than `max_norm_ratio` times its weight; the model's
            weights are of no use then.
    """
    weights = {name: model.get_submodule(name).weight for name in base}
    if not factors:
        for name, weight in weights.items():
            weight.copy_(base[name])
        return
    moved = {name: tensor.to(weights[name.rpartition(".")[0]].device) for name, tensor in factors.items()}
    modules = [Module(weights[name], base[name], moved[f"{name}.lora_A"], moved[f"{name}.lora_B"]) for name in base]
    for name, (update, pristine, broken) in zip(base, write(modules, scale).tolist(), strict=True):
        size, limit = math.sqrt(update) if update >= 0 else update, math.sqrt(pristine)
        if broken or not math.isfinite(size):
            raise ArtifactError(f"the update of {name} is not finite")
        if max_norm_ratio is not None and size > max_norm_ratio * limit:
            raise ArtifactError(
                f"the update of {name} has norm {size:.3g}, more than {max_norm_ratio:g} x its weight's {limit:.3g}"
            )


def merge_artifact(
    model: Any, base: dict[str, torch.Tensor], pair: Pair, root: Path, sha256: str, *,
    max_norm_ratio: float | None = None, write: Callable[[Any, float], torch.Tensor] = merge_all,
) -> None:  # fmt: skip
    """Check an artifact of `root` and merge it into the model's weights in place.

    Raises:
        ArtifactError: the artifact must not be loaded; if only its update is at fault, the model's weights are
            of no use then.
    """
    manifest = artifacts.load_manifest(root, sha256)
    path = artifacts.verify(
        root, sha256, target_fingerprint=pair.target_fingerprint, base_fingerprint=pair.base_fingerprint,
        expected=expected_tensors(pair, manifest.rank),
    )  # fmt: skip
    merge(model, base, load_factors(path), manifest.scale, max_norm_ratio=max_norm_ratio, write=write)
