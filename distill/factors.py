"""LoRA factors as plain tensors, and their place inside a model that is being trained.

Names are the artifact's: "<module>.lora_A" [rank, in] and "<module>.lora_B" [out, rank].  Knows nothing
about data or losses.  Called by `distill.tuning`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from distill.sharding import placed, whole

Factors = dict[str, torch.Tensor]

_ADAPTER = "default"


def attach(
    model: Any, shapes: dict[str, tuple[int, int]], *, rank: int, alpha: float, seed: int, start: Factors | None
) -> Any:
    """Put a LoRA on the named modules in place, from `start` or from seeded A and zero B; return the model."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(shapes), lora_dropout=0.0, bias="none")
    tuned = inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    set_factors(tuned, start or initial_factors(shapes, rank, seed))
    return tuned


def initial_factors(shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> Factors:
    """Draw A uniformly within ±1/√in and set B to zero, so that training starts at the base draft."""
    generator = torch.Generator().manual_seed(seed)
    factors: Factors = {}
    for name, (out_features, in_features) in sorted(shapes.items()):
        noise = torch.rand(rank, in_features, generator=generator) * 2 - 1
        factors[f"{name}.lora_A"] = noise / math.sqrt(in_features)
        factors[f"{name}.lora_B"] = torch.zeros(out_features, rank)
    return factors


def factors_of(tuned: Any) -> Factors:
    """Copy the factors out of a model, under their artifact names; of a split one, every rank must at once."""
    weights = whole({name: weight.detach() for name, weight in _weights(tuned).items()})
    return {name: weight.float().clone() for name, weight in weights.items()}


def set_factors(tuned: Any, factors: Factors) -> None:
    """Write factors into a model, or into a rank's part of it."""
    with torch.no_grad():
        for name, weight in _weights(tuned).items():
            weight.copy_(placed(factors[name], weight))


def _weights(tuned: Any) -> Factors:
    found: Factors = {}
    for name, module in tuned.named_modules():
        if isinstance(module, LoraLayer):
            found[f"{name}.lora_A"] = module.lora_A[_ADAPTER].weight
            found[f"{name}.lora_B"] = module.lora_B[_ADAPTER].weight
    return found
