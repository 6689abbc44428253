"""Linear layers with weights packed once for the CPU's matrix instructions.

y = x Wᵀ in bfloat16, float32 accumulation.  A plain linear lays its weight out anew on every call,
which costs more than the multiplication when there are few rows; packing once halves the time of one
to eight rows (docs/experiments.md).  Packed storage cannot be written to: after changing `weight`
in place, call `pack` again.

Shapes: x [..., in] bfloat16; weight [out, in] bfloat16; no bias.
"""

from __future__ import annotations

from typing import Any

import torch

_ROWS_HINT = 8


def packing_works() -> bool:
    """Whether this CPU multiplies bfloat16 natively and this torch can pack for it."""
    try:
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


class PackedLinear(torch.nn.Linear):
    """A linear layer that multiplies with a packed copy of its weight."""

    packed: torch.Tensor | None = None

    def pack(self) -> None:
        """Pack the weight as it is now."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), _ROWS_HINT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply; with the plain weight while nothing is packed."""
        if self.packed is None:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the packed copy out of copies and pickles: its storage is opaque."""
        return {name: value for name, value in self.__dict__.items() if name != "packed"}


def pack_linears(model: torch.nn.Module, like: torch.nn.Module | None = None) -> None:
    """Turn every bias-free bfloat16 linear of a model into a packed one, or pack it again.

    Layers whose weight is the very tensor that `like`, a packed model of the same shape, has there
    use its packed copy instead of making their own.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and child.bias is None and child.weight.dtype == torch.bfloat16:
                setattr(module, name, _replace(child))
    twins = dict(like.named_modules()) if like is not None else {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            twin = twins.get(name)
            if twin is not module and isinstance(twin, PackedLinear) and twin.weight is module.weight:
                module.packed = twin.packed
            else:
                module.pack()


def _replace(linear: torch.nn.Linear) -> PackedLinear:
    with torch.device("meta"):
        packed = PackedLinear(linear.in_features, linear.out_features, bias=False, dtype=linear.weight.dtype)
    packed.weight = linear.weight
    return packed
