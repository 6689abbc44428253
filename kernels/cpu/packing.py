"""Lay a weight out for the C product, in as few bytes as say exactly what it is.

Much of what is served as float32 was stored in less: bfloat16 checkpoints, and GGUF files whose blocks
of 32 weights are a scale (and an offset) times small integers.  Where every weight of a matrix can be
had back bit for bit, the short form is kept, and reading fewer bytes is what makes a step fast.  A
weight that may be inexact, which a draft's may, is rounded to blocks of 8-bit integers.

Layout: see linear.h.  Formats, per 32 weights of one output: FLOAT32 128 bytes, BFLOAT16 64, INT8
q·scale 34, INT4 q·scale + offset 20; scales and offsets are float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch.nn.functional import pad

PANEL = 32  # outputs side by side
BLOCK = 32  # inputs that share a scale


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
    """Lay a weight out.  Shapes: weight [outputs, inputs] float32 or bfloat16; bias [outputs]."""
    outputs, inputs = weight.shape
    kind, panels = _shortest(weight.detach().float(), exact)
    return PackedWeight(panels, None if bias is None else bias.detach().float().contiguous(), outputs, inputs, kind)


def _shortest(weight: torch.Tensor, exact: bool) -> tuple[Format, torch.Tensor]:
    if weight.shape[1] % BLOCK == 0:
        blocks = weight.view(len(weight), -1, BLOCK)
        if (found := _integers_and_offset(blocks)) is not None:
            return Format.INT4, _int4_panels(*found)
        q, scale = _integers(blocks)
        if not exact or torch.equal(q * scale.float()[..., None], blocks):
            return Format.INT8, _int8_panels(q, scale)
    half = weight.to(torch.bfloat16)
    if torch.equal(half.float(), weight):
        return Format.BFLOAT16, _panels(half)
    return Format.FLOAT32, _panels(weight)


def _integers(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers -127 ... 127, as float32, and float16 scales.  Shapes: blocks [outputs, n, 32]; scales [outputs, n]."""
    scale = (blocks.abs().amax(-1) / 127).to(torch.float16)
    q = (blocks / scale.float().clamp_min(torch.finfo(torch.float16).tiny)[..., None]).round_().clamp_(-127, 127)
    return q, scale


def _integers_and_offset(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return integers 0 ... 15 as float32, scales and offsets that give the weights exactly; None if there are none."""
    low, high = blocks.amin(-1), blocks.amax(-1)
    offset, scale = low.to(torch.float16), ((high - low) / 15).to(torch.float16)
    if not torch.equal(offset.float(), low):
        return None
    q = ((blocks - low[..., None]) / scale.float().clamp_min(torch.finfo(torch.float16).tiny)[..., None]).round_()
    q.clamp_(0, 15)
    # q · scale is exact in float32, so rounding once here is rounding once in the kernel's fused form.
    same = torch.equal(torch.addcmul(offset.float()[..., None], q, scale.float()[..., None]), blocks)
    return (q, scale, offset) if same else None


def _panels(weight: torch.Tensor) -> torch.Tensor:
    """Return [outputs / 32, inputs, 32] as bytes; outputs, and inputs to whole blocks, filled up with zeros."""
    outputs, inputs = weight.shape
    filled = pad(weight, (0, -inputs % BLOCK, 0, -outputs % PANEL))
    return _bytes(filled.view(-1, PANEL, filled.shape[1]).transpose(1, 2))


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8).flatten()


def _by_panel(values: torch.Tensor) -> torch.Tensor:
    """Turn [outputs, blocks, ...] into [panels, blocks, ..., 32], outputs filled up with zeros."""
    filled = pad(values, (0, 0) * (values.dim() - 1) + (0, -len(values) % PANEL))
    return filled.view(-1, PANEL, *values.shape[1:]).movedim(1, -1)


def _scale_bytes(scale: torch.Tensor) -> torch.Tensor:
    return _by_panel(scale).contiguous().view(torch.uint8)


def _int8_panels(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    numbers = _by_panel(q.to(torch.int8)).contiguous().view(torch.uint8).flatten(2)
    return torch.cat([_scale_bytes(scale), numbers], -1).flatten()


def _int4_panels(q: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    numbers = _by_panel(q.to(torch.uint8))
    numbers = (numbers[..., :16] | numbers[..., 16:] << 4).flatten(2)
    return torch.cat([_scale_bytes(scale), _scale_bytes(offset), numbers], -1).flatten()
