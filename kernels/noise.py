"""Counter-based noise: the same (seed, position, token) gives the same number, wherever it is drawn.

Philox-4x32-10 (Salmon et al., SC 2011).  Key: the request's 64-bit seed.  Counter:
(token // 4, position, purpose, 0); token % 4 picks the lane.  So noise does not depend on the batch,
on padding, on how often a round is replayed, or on which tokens are looked at.
"""

from __future__ import annotations

from enum import IntEnum

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
LANES = 4
MAX_GUMBEL = 22.9  # -log(-log(1 - 2^-33)), the largest value `gumbel` can return, rounded up


class Purpose(IntEnum):
    """Independent streams for one (seed, position)."""

    SAMPLE = 0  # the shared noise of the gumbel coupling, and of plain sampling
    DRAFT = 1  # the draft's own draw under the maximal coupling
    ACCEPT = 2  # the acceptance test under the maximal coupling
    RECOVER = 3  # the draw from the residual under the maximal coupling


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return high and low 32 bits of a * b; the product wraps at 64 bits, which keeps both exact."""
    product = b * a
    return (product >> 32) & _LOW, product & _LOW


def philox(seeds: torch.Tensor, blocks: torch.Tensor, positions: torch.Tensor, purpose: int) -> torch.Tensor:
    """Return four 32-bit numbers per counter.

    Shapes: seeds, blocks and positions [n] int64; result [n, 4] int64 in [0, 2^32).
    """
    c0, c1 = blocks & _LOW, positions & _LOW
    c2, c3 = torch.full_like(c0, int(purpose)), torch.zeros_like(c0)
    k0, k1 = seeds & _LOW, (seeds >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def to_uniform(bits: torch.Tensor) -> torch.Tensor:
    """Map 32-bit numbers into the open interval (0, 1), float64."""
    return (bits.double() + 0.5) * 2.0**-32


def gumbel(seeds: torch.Tensor, blocks: torch.Tensor, positions: torch.Tensor, purpose: int) -> torch.Tensor:
    """Return standard Gumbel noise for the four tokens of each block.

    Shapes: as `philox`; result [n, 4] float64, at most `MAX_GUMBEL`.
    """
    return -torch.log(-torch.log(to_uniform(philox(seeds, blocks, positions, purpose))))


def uniform(seeds: torch.Tensor, positions: torch.Tensor, purpose: int) -> torch.Tensor:
    """Return one uniform number per (seed, position).  Shapes: [n] each; result [n] float64."""
    return to_uniform(philox(seeds, torch.zeros_like(positions), positions, purpose)[:, 0])
