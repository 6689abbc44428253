"""Gated activation: transformers' own expression, the definition in float64, extremes, and poisoned memory."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from kernels.gpu.activation import silu_mul
from kernels.reference.layers import silu_mul as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMS = (reference, silu_mul)
TRUNCATES = DEVICE.type == "cpu"  # the interpreter does so where it makes bfloat16


def _inputs(tokens: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    return (3 * torch.randn(tokens, 2 * width, generator=generator)).to(DEVICE, dtype)


@pytest.mark.parametrize("width", [1, 8, 1000, 1024, 1025, 1536, 4864])
def test_activation_is_the_definition(width):
    """In float32 kernel and reference are gate / (1 + exp(-gate)) * up in float64 to 1e-6, at any width."""
    both = _inputs(3, width)
    gate, up = both.double().chunk(2, -1)
    wanted = gate / (1 + torch.exp(-gate)) * up
    for form in FORMS:
        torch.testing.assert_close(form(both).double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)])
def test_activation_rounds_as_transformers(dtype, unit):
    """silu(gate) is rounded before the product: at most 1 in 200 numbers differ from transformers', by one unit.

    In the interpreter both roundings of bfloat16 cut off, which takes up to two units.
    """
    both = _inputs(8, 1536, dtype)
    gate, up = both.chunk(2, -1)
    wanted = silu(gate) * up
    for form in FORMS:
        got = form(both)
        loose = TRUNCATES and form is silu_mul and dtype == torch.bfloat16
        torch.testing.assert_close(got, wanted, rtol=3 * unit if loose else unit, atol=1e-6)
        assert loose or float((got != wanted).float().mean()) < 1 / 200


def test_activation_at_the_extremes():
    """Large gates pass, very negative ones close without NaN, and the reference loses nothing of float64."""
    gate = torch.tensor([-1e30, -200.0, -100.0, 0.0, 100.0, 1e30], device=DEVICE)
    both = torch.cat((gate, torch.full_like(gate, 2.0)))[None]
    for form in FORMS:
        with np.errstate(over="ignore"):  # the interpreter's exp says when it is infinite
            got = form(both)[0]
        assert torch.equal(got[3:], 2 * gate[3:])
        assert (got[:3].abs() < 1e-30).all()
    exact = _inputs(1, 16).double()
    gate, up = exact.chunk(2, -1)
    torch.testing.assert_close(reference(exact), gate / (1 + torch.exp(-gate)) * up, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("width", [7, 1000, 1030])
def test_activation_stays_inside_its_rows(monkeypatch, width):
    """NaN around the input reaches no result, the new buffer is filled, and what lies around it is not touched."""
    both = _inputs(3, width)
    wanted = reference(both)
    frame = torch.full((both.numel() + 2 * 2048,), torch.nan, device=DEVICE)
    frame[2048:-2048] = both.flatten()
    result = torch.full((3 * width + 2 * 2048,), torch.nan, device=DEVICE)
    monkeypatch.setattr(torch, "empty", lambda *size, **_: result[2048:-2048].view(size))
    torch.testing.assert_close(silu_mul(frame[2048:-2048].view(3, -1)), wanted, rtol=1e-6, atol=1e-6)
    assert torch.isnan(result[:2048]).all()
    assert torch.isnan(result[-2048:]).all()


def test_activation_of_no_rows():
    """No tokens: nothing is launched and the shape is right."""
    assert silu_mul(torch.empty(0, 8)).shape == (0, 4)


def test_activation_refuses_what_does_not_fit():
    """Odd widths, other shapes and strided rows are named with what they are."""
    both = _inputs(4, 8)
    for wrong, message in (
        (both[:, :3].contiguous(), "has the shape"),
        (both[0], "has the shape"),
        (both.t(), "strides"),
    ):
        with pytest.raises(ValueError, match=message):
            silu_mul(wrong)


def test_activation_compiles_without_spills():
    """Every case fits a Hopper GPU."""
    code = (
        "from kernels.gpu import activation, aot\n"
        "for case in activation.cases():\n"
        "    found = aot.compile_case(case)\n"
        "    assert not found.spilled_bytes and found.registers <= 64, (case.name, found)\n"
    )
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=plain)
