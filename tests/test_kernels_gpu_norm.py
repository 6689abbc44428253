"""Add and norm: transformers' own norm, the definition in float64, rounding, and poisoned memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernels.gpu.norm import add_rms_norm
from kernels.reference.layers import add_rms_norm as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPSILON = 1e-5
HIDDEN = (1, 8, 100, 576, 1024, 4096, 4608)
TRUNCATES = DEVICE.type == "cpu"  # the interpreter does so where it makes bfloat16
ULP = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def _inputs(tokens: int, hidden: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(hidden)
    x, residual = torch.randn(2, tokens, hidden, generator=generator).to(dtype)
    weight = 1 + torch.randn(hidden, generator=generator).to(dtype)
    return x.contiguous().to(DEVICE), residual.contiguous().to(DEVICE), weight.to(DEVICE)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_norm_is_the_definition(hidden, with_residual):
    """In float32 kernel and reference are the formula in float64 to 2e-6, and the residual becomes the sum."""
    x, residual, weight = _inputs(5, hidden)
    total = x.double() + residual.double() if with_residual else x.double()
    wanted = weight.double() * total / (total.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    for form in (reference, add_rms_norm):
        changed = residual.clone() if with_residual else None
        got = form(x, changed, weight, EPSILON)
        torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=2e-6)
        if changed is not None:
            assert torch.equal(changed, residual + x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norm_rounds_as_transformers(dtype):
    """The sum, the normed row and the product with the weight are rounded where LlamaRMSNorm rounds.

    Sums in another order may move a statistic by a bit of float32 and so a result across an edge of its dtype: at
    most 1 in 200 numbers may differ, by one unit.  In the interpreter every rounding of bfloat16 cuts off, which
    takes up to three units.
    """
    x, residual, weight = _inputs(16, 576, dtype)
    module = LlamaRMSNorm(576, EPSILON).to(DEVICE, dtype)
    module.weight.data.copy_(weight)
    wanted = module(residual + x).detach()
    for form in (reference, add_rms_norm):
        got = form(x, residual.clone(), weight, EPSILON)
        assert got.dtype == dtype
        loose = TRUNCATES and form is add_rms_norm and dtype == torch.bfloat16
        torch.testing.assert_close(got, wanted, rtol=ULP[dtype] * (4 if loose else 1), atol=0.02 if loose else 1e-6)
        if dtype != torch.float32 and not loose:
            assert float((got != wanted).float().mean()) < 1 / 200


def test_norm_computes_float64_in_float64():
    """The reference loses nothing of float64 inputs."""
    x, residual, weight = (item.double() for item in _inputs(3, 100))
    total = x + residual
    wanted = weight * total / (total.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    torch.testing.assert_close(reference(x, residual, weight, EPSILON), wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("hidden", [7, 100, 576])
def test_norm_stays_inside_its_rows(monkeypatch, hidden):
    """NaN on both sides of every tensor reaches no result, new buffers are filled, and the margins keep their NaN."""
    x, residual, weight = _inputs(3, hidden)
    wanted = reference(x, residual.clone(), weight, EPSILON)
    framed = []
    for item in (x, residual, weight):
        frame = torch.full((item.numel() + 2 * 512,), torch.nan, device=DEVICE)
        frame[512:-512] = item.flatten()
        framed.append((frame, frame[512:-512].view(item.shape)))
    frame = torch.full((3 * hidden + 2 * 512,), torch.nan, device=DEVICE)
    monkeypatch.setattr(torch, "empty_like", lambda like: frame[512:-512].view(like.shape))
    got = add_rms_norm(*(item for _, item in framed), EPSILON)
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)
    for outer in (frame, *(item for item, _ in framed)):
        assert torch.isnan(outer[:512]).all()
        assert torch.isnan(outer[-512:]).all()


def test_norm_rows_do_not_depend_on_each_other():
    """A row alone has the bits it has in a batch, and a NaN spoils its own row only."""
    x, residual, weight = _inputs(6, 576)
    x[2, 5] = torch.nan
    together = add_rms_norm(x, residual.clone(), weight, EPSILON)
    for row in (0, 1, 3, 5):
        alone = add_rms_norm(x[row : row + 1], residual[row : row + 1].clone(), weight, EPSILON)
        assert torch.equal(alone[0], together[row])
    assert torch.isnan(together[2]).all()
    assert torch.isfinite(together[3:]).all()


def test_norm_of_no_rows():
    """No tokens: nothing is launched and the shape is right."""
    assert add_rms_norm(torch.empty(0, 8), torch.empty(0, 8), torch.ones(8), EPSILON).shape == (0, 8)


def test_norm_refuses_what_does_not_fit():
    """Each wrong shape or dtype is named with what it is."""
    x, residual, weight = _inputs(4, 8)
    for arguments, message in (
        ((x[0], None, weight), "x has the shape"), ((x, residual[:2], weight), "it must be like x"),
        ((x, residual.half(), weight), "it must be like x"), ((x, residual, weight[:4]), "weight has the shape"),
        ((x[:, :4], None, weight[:4]), "x has the strides"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            add_rms_norm(*arguments, EPSILON)


def test_norm_compiles_without_spills():
    """Every case fits a Hopper GPU: a row stays in registers."""
    code = (
        "from kernels.gpu import aot, norm\n"
        "for case in norm.cases():\n"
        "    found = aot.compile_case(case)\n"
        "    assert not found.spilled_bytes and found.registers <= 64, (case.name, found)\n"
    )
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=plain)
