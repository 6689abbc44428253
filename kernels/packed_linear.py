"""Linear layers with a second copy of their weight, laid out once for the CPU's vector instructions.

y = x Wᵀ + b, float32 accumulation.  A plain product lays its weight out anew on every call, which for
a few rows costs as much as the multiplication; oneDNN's own layout is written once (docs/experiments.md
has the table the row limits come from).  Packed storage cannot be written to: after changing `weight`
in place, call `pack` again.

Shapes: x [..., in], weight [out, in], bias [out]; bfloat16 or float32 throughout.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

_ROWS_HINT = 16  # a layout chosen for 1 row is slow for 2 to 8; one chosen for 8 or 16 is good from 1 to 300
_FLOAT32_ROWS = range(3, 65)  # below, reading the plain weight is all the work; above, both are compute bound


def packing_works() -> bool:
    """Whether this CPU multiplies bfloat16 natively and this torch can pack for it."""
    try:
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def can_pack(dtype: torch.dtype) -> bool:
    """Whether packed layers of this dtype are faster than plain ones here."""
    if dtype == torch.float32:
        return bool(torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512")
    return dtype == torch.bfloat16 and packing_works()


class PackedLinear(torch.nn.Linear):
    """A linear layer that multiplies with a packed copy of its weight where that is faster."""

    packed: torch.Tensor | None = None

    def pack(self) -> None:
        """Pack the weight as it is now."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().contiguous(), _ROWS_HINT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply; with the plain weight while nothing is packed, or for so many rows."""
        packed, rows = self.packed, x.numel() // x.shape[-1]
        if packed is None or not rows or (x.dtype == torch.float32 and rows not in _FLOAT32_ROWS):
            return torch.nn.functional.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the packed copy out of copies and pickles: its storage is opaque."""
        return {name: value for name, value in self.__dict__.items() if name != "packed"}


def from_weight(weight: torch.nn.Parameter, bias: torch.nn.Parameter | None = None) -> PackedLinear:
    """Build a layer on these very tensors, not packed yet."""
    with torch.device("meta"):
        linear = PackedLinear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear.weight = weight
    linear.bias = bias
    return linear


def pack_linears(
    model: torch.nn.Module, like: torch.nn.Module | None = None, only: Collection[str] | None = None
) -> None:
    """Turn bias-free linears of a model into packed ones, or pack them again.

    Those of a dtype that does not pack here stay, and those that `only`, if given, does not name.
    Layers whose weight is the very tensor that `like`, a packed model of the same shape, has there
    use its packed copy instead of making their own.
    """
    for name, child in list(model.named_modules()):
        wanted = type(child) is torch.nn.Linear and child.bias is None and (only is None or name in only)
        if wanted and can_pack(child.weight.dtype):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, from_weight(child.weight))
    twins = dict(like.named_modules()) if like is not None else {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            twin = twins.get(name)
            if twin is not module and isinstance(twin, PackedLinear) and twin.weight is module.weight:
                module.packed = twin.packed
            else:
                module.pack()
