"""Add to the residual stream and norm the sum, one program a row.

    residual += x;   result = weight * round(h / sqrt(mean(h²) + epsilon)),   h = residual, or x where there is none

Shapes: x, residual and result [tokens, hidden] in float32, float16 or bfloat16; weight [hidden].  A row stays in
registers between the two passes, so every byte is read once.  Sums and statistics are float32.
Source: Zhang and Sennrich, arXiv 1910.07467; rounding as in transformers' LlamaRMSNorm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.aot import Case

_MAX_HIDDEN = 65536  # a row is held in the registers of one program


@triton.jit
def _add_rms_norm(
    x: tl.tensor, residual: tl.tensor, weight: tl.tensor, out: tl.tensor, epsilon: tl.tensor, HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual + row + column, mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(residual.dtype.element_ty)
        tl.store(residual + row + column, rounded, mask=inside)
        h = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(h * h, axis=0) / HIDDEN + epsilon)
    normed = (h * factor).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row + column, (normed * scale).to(out.dtype.element_ty), mask=inside)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Add x to the residual in place and return the norm of the sum; without a residual, the norm of x.

    Shapes: x and residual [tokens, hidden]; weight [hidden]; result [tokens, hidden] in x's dtype.

    Raises:
        ValueError: shapes that do not fit, or a tensor that is not contiguous.
    """
    _check(x, residual, weight)
    out = torch.empty_like(x)
    tokens, hidden = x.shape
    if not tokens:
        return out
    block = triton.next_power_of_2(hidden)
    _add_rms_norm[(tokens,)](
        x, x if residual is None else residual, weight, out, epsilon, HIDDEN=hidden, BLOCK=block,
        HAS_RESIDUAL=residual is not None, num_warps=_warps(block),
    )  # fmt: skip
    return out


def _check(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> None:
    if x.dim() != 2 or not 0 < x.shape[1] <= _MAX_HIDDEN:
        raise ValueError(f"x has the shape {list(x.shape)}; it must be [tokens, hidden], hidden 1 to {_MAX_HIDDEN}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {residual.dtype} {list(residual.shape)}; it must be like x, {x.dtype} {list(x.shape)}"
        )
    if list(weight.shape) != [x.shape[1]]:
        raise ValueError(f"weight has the shape {list(weight.shape)}; it must be [{x.shape[1]}]")
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has the strides {list(tensor.stride())}; it must be contiguous")


def _warps(block: int) -> int:
    """Eight elements a thread: 16 bytes in a 16-bit dtype."""
    return min(16, max(1, block // 256))


def cases() -> list[Case]:
    """Name the specialisations that real models use."""
    types = {"x": "*bf16", "residual": "*bf16", "weight": "*bf16", "out": "*bf16", "epsilon": "fp32"}
    return [
        Case(
            f"add_rms_norm hidden={hidden} residual={with_residual}", _add_rms_norm, types,
            {"HIDDEN": hidden, "BLOCK": triton.next_power_of_2(hidden), "HAS_RESIDUAL": with_residual},
            warps=_warps(triton.next_power_of_2(hidden)), aligned=("x", "residual", "weight", "out"),
        )
        for hidden in (576, 1024, 4096, 4608, 8192)
        for with_residual in (False, True)
    ]  # fmt: skip
