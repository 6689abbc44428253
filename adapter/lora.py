"""Read LoRA factors and merge them into a draft: W = W0 + scale * B @ A, always from W0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from adapter.contracts import ArtifactError


def load_factors(path: Path) -> dict[str, torch.Tensor]:
    """Read the factors of a checked artifact in float32."""
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def base_weights(model: Any, modules: list[str]) -> dict[str, torch.Tensor]:
    """Return copies of the pristine weights W0 of the named linear modules."""
    return {name: model.get_submodule(name).weight.detach().clone() for name in modules}


@torch.no_grad()
def merge(
    model: Any,
    base: dict[str, torch.Tensor],
    factors: dict[str, torch.Tensor],
    scale: float,
    *,
    max_norm_ratio: float | None = None,
) -> None:
    """Write W0 + scale * B @ A into the model's weights in place; without factors, write W0.

    Shapes: factors "<module>.lora_A" [rank, in] and "<module>.lora_B" [out, rank].
    The sum is formed in float32 and rounded once, so versions never accumulate rounding.

    Raises:
        ArtifactError: an update is not finite, or larger than `max_norm_ratio` times its weight.
    """
    for name, pristine in base.items():
        weight = model.get_submodule(name).weight
        if not factors:
            weight.copy_(pristine)
            continue
        b, a = (factors[f"{name}.lora_{part}"].to(weight.device) for part in "BA")
        update = scale * (b @ a)
        size, limit = float(update.norm()), float(pristine.float().norm())
        if not torch.isfinite(update).all():
            raise ArtifactError(f"the update of {name} is not finite")
        if max_norm_ratio is not None and size > max_norm_ratio * limit:
            raise ArtifactError(
                f"the update of {name} has norm {size:.3g}, more than {max_norm_ratio:g} x its weight's {limit:.3g}"
            )
        weight.copy_(pristine.float() + update)
