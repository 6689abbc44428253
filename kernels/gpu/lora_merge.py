"""Add a LoRA update to a frozen weight at its fixed address, a tile a program.

    W = round(W0 + scale * B A),   stats = (Σ (scale B A)², Σ W0², how many numbers of scale B A are not finite)

Shapes: W and W0 [out, in], A [rank, in] and B [out, rank], each fp32, bf16 or fp16; stats [3] float32.
B A is a sum of outer products in the order of the rank, each product and each sum rounded to float32 (no fused
multiply-add, no TF32), so the bits are those of that sum written down in numpy, on every machine.  A library's
matrix product may add in another order: W then differs by rounding of the float32 sum, after bf16 by at most one
unit in the last place and rarely at all; where the sum is exact, not at all.

Every tile of W0 is read and of W written once, and a tile's factors come from the cache.  Each tile leaves its sums
in a buffer of its own, which are added in a fixed order: figures are the same bits every time.
Source: Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.gpu.aot import Case
from kernels.reference.lora_merge import Module

_ROWS, _COLUMNS = 32, 128
_MAX_RANK = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["scale"])
def _merge(
    out, base, a, b, sums, scale, RANK: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    across = tl.cdiv(IN, COLUMNS)
    rows = (tile // across) * ROWS + tl.arange(0, ROWS)
    columns = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    here = (rows < OUT)[:, None] & (columns < IN)[None, :]
    at = rows.to(tl.int64)[:, None] * IN + columns[None, :]
    pristine = tl.load(base + at, mask=here, other=0.0).to(tl.float32)
    update = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(RANK):
        left = tl.load(b + rows.to(tl.int64) * RANK + step, mask=rows < OUT, other=0.0).to(tl.float32)
        right = tl.load(a + step * IN + columns, mask=columns < IN, other=0.0).to(tl.float32)
        update += left[:, None] * right[None, :]
    update = tl.where(here, update * scale, 0.0)  # beyond the border NaN of a factor meets zero
    tl.store(out + at, (pristine + update).to(out.dtype.element_ty), mask=here)
    finite = tl.abs(update) < float("inf")  # false for NaN
    tl.store(sums + tile * 3, tl.sum(tl.sum(update * update, axis=1), axis=0))
    tl.store(sums + tile * 3 + 1, tl.sum(tl.sum(pristine * pristine, axis=1), axis=0))
    tl.store(sums + tile * 3 + 2, tl.sum(tl.sum(tl.where(finite, 0.0, 1.0), axis=1), axis=0))


def merge(
    out: torch.Tensor, base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, stats: torch.Tensor
) -> None:
    """Write base + scale * b @ a into `out`, which may be `base`, and the figures into `stats`.

    Shapes: out and base [out, in]; a [rank, in]; b [out, rank]; stats [3] float32: the squared norm of the update,
    the squared norm of `base`, and how many numbers of the update are not finite.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a tensor that is not contiguous.
    """
    _check(out, base, a, b)
    if list(stats.shape) != [3] or stats.dtype != torch.float32:
        raise ValueError(f"stats is {stats.dtype} {list(stats.shape)}; it must be torch.float32 [3]")
    sums = out.new_empty(_tiles(out), 3, dtype=torch.float32)
    _launch(Module(out, base, a, b), scale, sums)
    stats.copy_(sums.sum(0, dtype=torch.float64))


def merge_all(modules: Sequence[Module], scale: float) -> torch.Tensor:
    """Merge many modules, one launch each, and return their figures [modules, 3] float32, to be read once.

    Nothing is asked of the device; what a figure says is for the caller to read.

    Raises:
        ValueError: as `merge`; nothing has been written then.
    """
    for module in modules:
        _check(*module)
    if not modules:
        return torch.empty(0, 3)
    most = max(_tiles(module.out) for module in modules)
    sums = modules[0].out.new_zeros(len(modules), most, 3, dtype=torch.float32)
    for module, own in zip(modules, sums, strict=True):
        _launch(module, scale, own)
    return sums.sum(1, dtype=torch.float64).float()


def _launch(module: Module, scale: float, sums: torch.Tensor) -> None:
    rows, columns = module.out.shape
    _merge[(_tiles(module.out),)](
        *module, sums, float(scale), RANK=module.a.shape[0], OUT=rows, IN=columns, ROWS=_ROWS, COLUMNS=_COLUMNS,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _tiles(out: torch.Tensor) -> int:
    return triton.cdiv(out.shape[0], _ROWS) * triton.cdiv(out.shape[1], _COLUMNS)


def _check(out: torch.Tensor, base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if out.dim() != 2 or not out.numel() or base.shape != out.shape:
        raise ValueError(f"out has the shape {list(out.shape)} and base {list(base.shape)}; both must be [out, in]")
    if a.dim() != 2 or b.dim() != 2 or not 0 < a.shape[0] <= _MAX_RANK or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"a has the shape {list(a.shape)} and b {list(b.shape)}; they must be [rank, in] and [out, rank], "
            f"rank 1 to {_MAX_RANK}"
        )
    if a.shape[1] != out.shape[1] or b.shape[0] != out.shape[0]:
        raise ValueError(f"a {list(a.shape)} and b {list(b.shape)} do not make an update of {list(out.shape)}")
    for name, tensor in (("out", out), ("base", base), ("a", a), ("b", b)):
        if tensor.dtype not in _DTYPES or not tensor.is_contiguous() or tensor.device != out.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} with the strides {list(tensor.stride())}; it must be "
                f"float32, bfloat16 or float16 on {out.device}, contiguous"
            )


def cases() -> list[Case]:
    """Name the specialisations that real models use."""
    return [
        Case(
            f"lora_merge {rows}x{columns} rank={rank} {weight} factors={factor}", _merge,
            {"out": f"*{weight}", "base": f"*{weight}", "a": f"*{factor}", "b": f"*{factor}", "sums": "*fp32",
             "scale": "fp32"},
            {"RANK": rank, "OUT": rows, "IN": columns, "ROWS": _ROWS, "COLUMNS": _COLUMNS},
            aligned=("out", "base", "a", "b", "sums"),
        )
        for rows, columns, rank in ((576, 576, 16), (1536, 576, 64), (576, 1536, 8), (4864, 896, 13))
        for weight, factor in (("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "fp32"))
    ]  # fmt: skip
