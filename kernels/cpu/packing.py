"""Lay a weight out for the C product, in as few bytes as say exactly what it is.

Much of what is served as float32 was stored in less: bfloat16 checkpoints, and GGUF files whose blocks
of 32 weights are a scale (and an offset) times small integers.  Where every weight of a matrix can be
had back bit for bit, the short form is kept, and reading fewer bytes is what makes a step fast.  A
weight that may be inexact, which a draft's may, is rounded to blocks of 8-bit integers.

Layout: see linear.h.  Formats, per 32 weights of one output: FLOAT32 128 bytes, BFLOAT16 64, INT8
q·scale 34, INT4 q·scale + offset 20; scales and offsets are float16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch.nn.functional import pad

PANEL = 32  # outputs side by side
BLOCK = 32  # inputs that share a scale
_SLICE = 32 * PANEL  # outputs laid out at a time


class Format(IntEnum):
    """How weights are stored; the values are those of vectors.h."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    INT4 = 3


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [outputs, inputs] in panels.  Shapes: panels [bytes] uint8; bias [outputs] float32 or None."""

    panels: torch.Tensor
    bias: torch.Tensor | None
    outputs: int
    inputs: int
    format: Format


def pack(weight: torch.Tensor, bias: torch.Tensor | None = None, *, exact: bool = True) -> PackedWeight:
    """Lay a weight out; `exact` keeps every weight, else it may be rounded to 8-bit blocks.

    Shapes: weight [outputs, inputs] float32 or bfloat16; bias [outputs].
    """
    outputs, inputs = weight.shape
    for kind in _candidates(weight, exact):
        # In slices: a slice's copies in float32 are many times what is kept of it.
        parts = []
        for part in weight.detach().split(_SLICE):
            if (laid := _LAYOUTS[kind](part.float(), exact)) is None:
                break
            parts.append(laid)
        else:
            kept = None if bias is None else bias.detach().float().contiguous()
            return PackedWeight(torch.cat(parts), kept, outputs, inputs, kind)
    raise AssertionError("float32 says every weight")


def _candidates(weight: torch.Tensor, exact: bool) -> list[Format]:
    """Formats from short to long, of which the first that can say the weight is taken."""
    blocks = [] if weight.shape[1] % BLOCK else [Format.INT4, Format.INT8] if exact else [Format.INT8]
    return [*blocks, Format.BFLOAT16, Format.FLOAT32]


def _int8(weight: torch.Tensor, exact: bool) -> torch.Tensor | None:
    """Lay integers -127 ... 127 and their scales out; None where float16 cannot hold the scales."""
    blocks = weight.view(len(weight), -1, BLOCK)
    most = blocks.abs().amax(-1)
    scale = (most / 127).to(torch.float16)
    wide = scale.float()
    # Below the smallest normal number a scale loses digits; beyond the largest it is none.
    rough = (wide < torch.finfo(torch.float16).tiny) & (most > 0) | wide.isinf() & most.isfinite()
    q = (blocks / wide.where(wide > 0, 1.0)[..., None]).round_().clamp_(-127, 127)
    if not torch.equal(q * wide[..., None], blocks) if exact else bool(rough.any()):
        return None
    numbers = _by_panel(q.to(torch.int8)).contiguous().view(torch.uint8).flatten(2)
    return torch.cat([_scale_bytes(scale), numbers], -1).flatten()


def _int4(weight: torch.Tensor, _exact: bool) -> torch.Tensor | None:
    """Lay integers 0 ... 15, scales and offsets out; None where they do not give the weight exactly."""
    blocks = weight.view(len(weight), -1, BLOCK)
    low, high = blocks.amin(-1), blocks.amax(-1)
    offset, scale = low.to(torch.float16), ((high - low) / 15).to(torch.float16)
    wide = scale.float()
    q = ((blocks - low[..., None]) / wide.where(wide > 0, 1.0)[..., None]).round_().clamp_(0, 15)
    # q · scale is exact in float32, so rounding once here is rounding once in the kernel's fused form.
    if not torch.equal(torch.addcmul(offset.float()[..., None], q, wide[..., None]), blocks):
        return None
    numbers = _by_panel(q.to(torch.uint8))
    numbers = (numbers[..., :16] | numbers[..., 16:] << 4).flatten(2)
    return torch.cat([_scale_bytes(scale), _scale_bytes(offset), numbers], -1).flatten()


def _bfloat16(weight: torch.Tensor, _exact: bool) -> torch.Tensor | None:
    half = weight.to(torch.bfloat16)
    # What is not a number equals nothing, and is kept in full.
    return _panels(half) if torch.equal(half.float(), weight) else None


def _float32(weight: torch.Tensor, _exact: bool) -> torch.Tensor:
    return _panels(weight)


_LAYOUTS: dict[Format, Callable[[torch.Tensor, bool], torch.Tensor | None]] = {
    Format.INT4: _int4, Format.INT8: _int8, Format.BFLOAT16: _bfloat16, Format.FLOAT32: _float32,
}  # fmt: skip


def _panels(weight: torch.Tensor) -> torch.Tensor:
    """Return [outputs / 32, inputs, 32] as bytes; outputs, and inputs to whole blocks, filled up with zeros."""
    outputs, inputs = weight.shape
    filled = pad(weight, (0, -inputs % BLOCK, 0, -outputs % PANEL))
    return filled.view(-1, PANEL, filled.shape[1]).transpose(1, 2).contiguous().view(torch.uint8).flatten()


def _by_panel(values: torch.Tensor) -> torch.Tensor:
    """Turn [outputs, blocks, ...] into [panels, blocks, ..., 32], outputs filled up with zeros."""
    filled = pad(values, (0, 0) * (values.dim() - 1) + (0, -len(values) % PANEL))
    return filled.view(-1, PANEL, *values.shape[1:]).movedim(1, -1)


def _scale_bytes(scale: torch.Tensor) -> torch.Tensor:
    return _by_panel(scale).contiguous().view(torch.uint8)
