"""Linear layers with a second copy of their weight, laid out once for the CPU's vector instructions.

y = x Wᵀ + b, float32 accumulation.  A plain product lays its weight out anew on every call, which for
a few rows costs as much as the multiplication.  A `compiled` layer keeps the layout of our own kernels
(kernels/cpu); others keep oneDNN's (docs/experiments.md has the table the row limits come from), and
where they may be inexact, which a draft's may, also their weight in int8, one scale an output, and
quantise the inputs of small batches, one scale a row.  After changing `weight` in place, call `pack`
again.

Shapes: x [..., in], weight [out, in], bias [out]; bfloat16 or float32 throughout.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from kernels.cpu import forward as compiled_forward
from kernels.cpu.library import unavailable
from kernels.cpu.packing import PackedWeight, pack

_ROWS_HINT = 16  # a layout chosen for 1 row is slow for 2 to 8; one chosen for 8 or 16 is good from 1 to 300
_INT8_ROWS = range(1, 33)  # longer ones are prompts; their first tokens have inputs that int8 cannot hold
_FLOAT32_ROWS = range(3, 65)  # below, reading the plain weight is all the work; above, both are compute bound


def can_compile() -> bool:
    """Whether layers can be packed for our own kernels here."""
    return unavailable() is None


def packing_works() -> bool:
    """Whether this CPU multiplies bfloat16 natively and this torch can pack for it."""
    try:
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def can_pack(dtype: torch.dtype, *, compiled: bool = False) -> bool:
    """Whether packed layers of this dtype are faster than plain ones here; `compiled` lets our own kernels count."""
    if compiled and can_compile():
        return True
    if dtype == torch.float32:
        return bool(torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512")
    return dtype == torch.bfloat16 and packing_works()


def can_quantize() -> bool:
    """Whether this CPU multiplies int8 natively; elsewhere oneDNN's sums would saturate."""
    try:
        return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported())
    except AttributeError:
        return False


class PackedLinear(torch.nn.Linear):
    """A linear layer that multiplies with a packed copy of its weight where that is faster."""

    packed: torch.Tensor | None = None
    panels: PackedWeight | None = None
    compiled = False  # packed for our own kernels?
    int8 = False  # may a bfloat16 layer be inexact?
    quantized: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # packed weight, scales, zeros

    def pack(self) -> None:
        """Pack the weight as it is now."""
        self.packed = self.panels = self.quantized = None
        if self.compiled:
            self.panels = pack(self.weight, self.bias, exact=not (self.int8 and self.weight.dtype == torch.bfloat16))
            return
        weight = self.weight.detach().contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        if self.int8 and weight.dtype == torch.bfloat16 and self.bias is None:
            self.quantized = _quantize(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply; with the plain weight while nothing is packed, or for so many rows."""
        if self.panels is not None:
            return compiled_forward.linear(x, self.panels)
        packed, rows = self.packed, x.numel() // x.shape[-1]
        if self.quantized is not None and rows in _INT8_ROWS:
            return _int8_product(x, *self.quantized)
        if packed is None or not rows or (x.dtype == torch.float32 and rows not in _FLOAT32_ROWS):
            return torch.nn.functional.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the packed copies out of copies and pickles: their storage is opaque."""
        return {name: value for name, value in self.__dict__.items() if name not in ("packed", "quantized", "panels")}


def _quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scales = weight.float().abs().amax(1).clamp_min(1e-12) / 127  # not a number where the weight is not
    rounded = (weight / scales[:, None]).round_().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(rounded, [1, weight.shape[1]])
    return packed, scales, torch.zeros(len(scales), dtype=torch.long)


def _int8_product(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Multiply with inputs rounded to 1 ... 255 around 128, each row by its own largest value."""
    largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=-1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12)
    rounded = (x * (127 / largest)).add_(128.5).to(torch.uint8)
    out = torch.ops.onednn.qlinear_pointwise(
        rounded, 1 / 127, 128, packed, scales, zeros, None, 1.0, 0, x.dtype, "none", [], ""
    )
    return out.mul_(largest)  # type: ignore[no-any-return]


def from_weight(weight: torch.nn.Parameter, bias: torch.nn.Parameter | None = None) -> PackedLinear:
    """Build a layer on these very tensors, not packed yet."""
    with torch.device("meta"):
        linear = PackedLinear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear.weight = weight
    linear.bias = bias
    return linear


def pack_linears(
    model: torch.nn.Module, like: torch.nn.Module | None = None, only: Collection[str] | None = None,
    *, int8: bool = False, compiled: bool = False,
) -> None:  # fmt: skip
    """Turn bias-free linears of a model into packed ones, or pack them again.

    Those of a dtype that does not pack here stay, and those that `only`, if given, does not name.
    Layers whose weight is the very tensor that `like`, a packed model of the same shape, has there
    use its packed copy instead of making their own.  `int8` lets the bfloat16 ones be inexact, `compiled`
    packs for our own kernels.
    """
    for name, child in list(model.named_modules()):
        wanted = type(child) is torch.nn.Linear and child.bias is None and (only is None or name in only)
        if wanted and (compiled or can_pack(child.weight.dtype)):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, from_weight(child.weight))
    twins = dict(like.named_modules()) if like is not None else {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            twin = twins.get(name)
            if twin is not module and isinstance(twin, PackedLinear) and twin.weight is module.weight:
                module.packed, module.quantized, module.panels = twin.packed, twin.quantized, twin.panels
                module.int8, module.compiled = twin.int8, twin.compiled
            else:
                module.int8, module.compiled = int8 and (compiled or can_quantize()), compiled
                module.pack()
