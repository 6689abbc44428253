"""The keyed noise of `kernels.noise` inside Triton kernels: same key, same counter, same bits.

Philox-4x32-10: one call gives 32 bits to each of four neighbouring tokens.  With u = (bits + 0.5) / 2^32 the
Gumbel noise is -log(-log u), and 1 - u <= -log u, so

    score + noise can reach `reach` only if  1 - u <= exp(score - reach),

which is one exponential and no logarithm: `misses` is how likely candidates are found.  `gumbel32` is good to
2e-6 of the exact noise everywhere, the tail near u = 1 included; `gumbel64` is the noise as the reference has it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.noise import MAX_GUMBEL as _MAX_GUMBEL

MAX_GUMBEL = tl.constexpr(_MAX_GUMBEL)
UNIT = tl.constexpr(2.0**-32)


@triton.jit
def key_of(seed: tl.tensor) -> tl.tensor:
    """Split a 64-bit seed into the two words of the key.  Scalars: int64; two of uint32."""
    return (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def philox(blocks: tl.tensor, position: tl.tensor, k0: tl.tensor, k1: tl.tensor, PURPOSE: tl.constexpr) -> tl.tensor:
    """Return the four words of each counter (blocks, position, PURPOSE, 0).

    Shapes: blocks any, uint32; position, k0, k1 scalars uint32; results as `blocks`, uint32.  A product is taken
    once at 64 bits, which is one instruction on a GPU.
    """
    c0, c1 = blocks, position
    c2, c3 = tl.full((), PURPOSE, tl.uint32), tl.full((), 0, tl.uint32)
    for _ in tl.static_range(10):
        first = c0.to(tl.uint64) * 0xD2511F53
        second = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (second >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (first >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = second.to(tl.uint32)
        c3 = first.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def lane_of(b0: tl.tensor, b1: tl.tensor, b2: tl.tensor, b3: tl.tensor, lanes: tl.tensor) -> tl.tensor:
    """Return the word of one lane.  Shapes: all alike, uint32; lanes int 0..3."""
    return tl.where(lanes < 2, tl.where(lanes == 0, b0, b1), tl.where(lanes == 2, b2, b3))


@triton.jit
def misses(bits: tl.tensor) -> tl.tensor:
    """Return 1 - u in float32, to 1e-7 of itself.  Shapes: any, uint32."""
    return ((0xFFFFFFFF - bits).to(tl.float32) + 0.5) * UNIT


@triton.jit
def gumbel32(bits: tl.tensor) -> tl.tensor:
    """Return Gumbel noise in float32.  Near u = 1 it is -log of the series of -log(1 - v) with v = 1 - u."""
    v = misses(bits)
    series = v * (1.0 + v * (0.5 + v * (0.33333334 + v * 0.25)))
    direct = -tl.log((bits.to(tl.float32) + 0.5) * UNIT)
    return -tl.log(tl.where(v < 0.015625, series, direct))


@triton.jit
def gumbel64(bits: tl.tensor) -> tl.tensor:
    """Return Gumbel noise in float64.  Shapes: any, uint32."""
    return -tl.log(-tl.log(uniform64(bits)))


@triton.jit
def uniform64(bits: tl.tensor) -> tl.tensor:
    """Map bits into the open interval (0, 1), float64.  Shapes: any, uint32."""
    return (bits.to(tl.float64) + 0.5) * UNIT


@triton.jit
def token_noise(
    token: tl.tensor, position: tl.tensor, k0: tl.tensor, k1: tl.tensor, PURPOSE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return one token's Gumbel noise in float64.  Scalars: token int; position, k0, k1 uint32."""
    b0, b1, b2, b3 = philox((token // 4).to(tl.uint32), position, k0, k1, PURPOSE)
    return gumbel64(lane_of(b0, b1, b2, b3, token % 4))


@triton.jit
def neighbours(b0: tl.tensor, b1: tl.tensor, b2: tl.tensor, b3: tl.tensor) -> tl.tensor:
    """Lay four words side by side.  Shapes: four of [n]; result [4 n], the words of one counter consecutive."""
    return tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), [4 * b0.shape[0]])
