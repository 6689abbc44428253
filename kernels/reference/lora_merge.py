"""Add LoRA updates to frozen weights, at fixed addresses, and say how large they are.

    W = round(W0 + scale * B A),   stats = (Σ (scale B A)², Σ W0², how many numbers of scale B A are not finite)

Shapes: W and W0 [out, in]; A [rank, in]; B [out, rank]; stats [3] float32 (norms are their square roots).  The
sum is formed in float32 and rounded once, always from W0, so versions never accumulate rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Module(NamedTuple):
    """One weight to be merged.  Shapes: out and base [out, in]; a [rank, in]; b [out, rank]."""

    out: torch.Tensor
    base: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor


@torch.no_grad()
def merge(
    out: torch.Tensor, base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, stats: torch.Tensor
) -> None:
    """Write base + scale * b @ a into `out`, which may be `base`, and the figures into `stats` [3] float32."""
    update = scale * (b.float() @ a.float())
    pristine = base.float()
    sizes = [update.double().square().sum(), pristine.double().square().sum()]
    stats.copy_(torch.stack([*sizes, (~torch.isfinite(update)).double().sum()]))
    out.copy_(pristine + update)


def merge_all(modules: Sequence[Module], scale: float) -> torch.Tensor:
    """Merge many modules and return their figures [modules, 3] float32, to be read once."""
    stats = torch.empty(len(modules), 3, device=modules[0].out.device if modules else None)
    for module, row in zip(modules, stats, strict=True):
        merge(*module, scale, row)
    return stats
