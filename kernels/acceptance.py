"""Chance that draft and target agree on a token, for both couplings, in closed form.

With noise g_v shared by both sides (Gumbel coupling), draft argmax(log q + g) and target
argmax(log p + g) agree with probability Σ_v 1 / Σ_u max(p_u/p_v, q_u/q_v).  With the maximal coupling
(accept with min(1, p/q), recover from the residual) they agree with Σ_v min(p_v, q_v), which no
coupling exceeds.  Knows nothing about blocks or sampling parameters.  Called by `distill.gate`.
"""

from __future__ import annotations

import torch

_ROWS = 4096  # of the [rows, k, k] intermediate held at the same time


def gumbel_acceptance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return the agreement under shared Gumbel noise; O(k²) a row, in float64.

    Shapes: p and q [n, k], each row a law; result [n] float64.  Symbols missing on one side add nothing.
    """
    parts = [_gumbel_rows(*rows) for rows in zip(p.double().split(_ROWS), q.double().split(_ROWS), strict=True)]
    return torch.cat(parts) if parts else p.new_zeros(0, dtype=torch.float64)


def maximal_acceptance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return Σ_v min(p_v, q_v).  Shapes: p and q [n, k]; result [n] float64."""
    return torch.minimum(p.double(), q.double()).sum(-1)


def _gumbel_rows(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    # 1 / Σ_u max(p_u/p_v, q_u/q_v) = p_v q_v / Σ_u max(p_u q_v, q_u p_v): no division by a missing symbol
    weakest = torch.maximum(p[:, None, :] * q[:, :, None], q[:, None, :] * p[:, :, None]).sum(-1)
    return (p * q / weakest.clamp_min(torch.finfo(torch.float64).tiny)).sum(-1)
