"""The gated activation of a decoder's feed-forward part.

    result = round(silu(gate)) * up,   silu(g) = g / (1 + exp(-g))

Shapes: gate_up [tokens, 2 * width], gate first, in float32, float16 or bfloat16; result [tokens, width].
Source: Shazeer, arXiv 2002.05202; rounding as in transformers' LlamaMLP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.aot import Case

_BLOCK = 1024
_WARPS = 4  # eight elements a thread: 16 bytes in a 16-bit dtype


@triton.jit
def _silu_mul(gate_up: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    parts: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    column = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + column, (activated * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of rows that hold gate and up side by side.

    Shapes: gate_up [tokens, 2 * width]; result [tokens, width].

    Raises:
        ValueError: an odd number of columns, or a tensor that is not contiguous.
    """
    if gate_up.dim() != 2 or not gate_up.shape[1] or gate_up.shape[1] % 2:
        raise ValueError(
            f"gate_up has the shape {list(gate_up.shape)}; it must be [tokens, 2 * width], width 1 or more"
        )
    if not gate_up.is_contiguous():
        raise ValueError(f"gate_up has the strides {list(gate_up.stride())}; it must be contiguous")
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        _silu_mul[(tokens * triton.cdiv(width, _BLOCK),)](gate_up, out, WIDTH=width, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def cases() -> list[Case]:
    """Name the specialisations that real models use."""
    return [
        Case(
            f"silu_mul width={width}", _silu_mul, {"gate_up": "*bf16", "out": "*bf16"},
            {"WIDTH": width, "BLOCK": _BLOCK}, warps=_WARPS, aligned=("gate_up", "out"),
        )
        for width in (1536, 3072, 4864, 14336)
    ]  # fmt: skip
