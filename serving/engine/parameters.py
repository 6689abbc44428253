"""Sampling parameters of several requests as tensors, one row a position."""

from __future__ import annotations

import torch

from adapter.contracts import Sampling
from kernels.sampling import RowParams

_SIGN_BIT = 1 << 63


def row_params(samplings: list[Sampling], positions: list[int]) -> RowParams:
    """Build the parameters of rows that decide the tokens at absolute `positions`.

    Shapes: both lists [rows].  A seed is 64 bits; torch has no unsigned type, so the bits are kept.
    """
    min_p = [item.min_p for item in samplings]
    return RowParams(
        temperature=torch.tensor([item.temperature for item in samplings], dtype=torch.float32),
        top_p=torch.tensor([item.top_p for item in samplings], dtype=torch.float32),
        top_k=torch.tensor([item.top_k for item in samplings], dtype=torch.long),
        seeds=torch.tensor([(item.seed ^ _SIGN_BIT) - _SIGN_BIT for item in samplings], dtype=torch.long),
        positions=torch.tensor(positions, dtype=torch.long),
        min_p=torch.tensor(min_p, dtype=torch.float32) if any(min_p) else None,
    )
