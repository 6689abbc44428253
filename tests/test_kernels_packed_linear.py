"""Packed linear layers: the same product, and never a stale weight."""

from __future__ import annotations

import copy

import pytest
import torch

from kernels.packed_linear import PackedLinear, can_pack, can_quantize, from_weight, pack_linears, packing_works

needs_packing = pytest.mark.skipif(not packing_works(), reason="this CPU has no bfloat16 instructions to pack for")

needs_float32 = pytest.mark.skipif(not can_pack(torch.float32), reason="packing float32 does not pay on this CPU")
needs_int8 = pytest.mark.skipif(not (packing_works() and can_quantize()), reason="this CPU multiplies no int8 natively")


def small_model() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(40, 56, bias=False, dtype=torch.bfloat16),
        torch.nn.Linear(56, 24, bias=True, dtype=torch.bfloat16),
    ).requires_grad_(False)


@needs_packing
@pytest.mark.parametrize("rows", [1, 3, 8, 65])
def test_packed_product_is_the_dense_product(rows: int) -> None:
    """A packed layer gives what float32 arithmetic on the same weights gives, within bfloat16 rounding."""
    model = small_model()
    x = torch.randn(rows, 40, dtype=torch.bfloat16)
    dense = x.float() @ model[0].weight.float().T

    pack_linears(model)

    assert isinstance(model[0], PackedLinear)
    torch.testing.assert_close(model[0](x).float(), dense, rtol=2e-2, atol=2e-2)


@needs_packing
def test_packing_again_follows_the_weight() -> None:
    """After an in-place change of the weight, packing again is enough; the parameter keeps its address."""
    model = small_model()
    pack_linears(model)
    address = model[0].weight.data_ptr()
    x = torch.ones(2, 40, dtype=torch.bfloat16)

    model[0].weight.zero_()
    pack_linears(model)

    assert float(model[0](x).abs().max()) == 0.0
    assert model[0].weight.data_ptr() == address


@needs_packing
def test_layers_with_a_bias_are_left_alone() -> None:
    """Only what the packed form can express is replaced."""
    model = small_model()

    pack_linears(model)

    assert type(model[1]) is torch.nn.Linear


@needs_packing
def test_a_copy_is_not_packed_and_still_right() -> None:
    """A deep copy owns its weight and multiplies with it, not with the original's packed form."""
    model = small_model()
    pack_linears(model)

    twin = copy.deepcopy(model)
    twin[0].weight.zero_()

    x = torch.ones(1, 40, dtype=torch.bfloat16)
    assert twin[0].packed is None
    assert float(twin[0](x).abs().max()) == 0.0
    assert float(model[0](x).abs().max()) > 0.0


@needs_packing
def test_a_shared_weight_is_packed_once() -> None:
    """A model that shares a weight with a packed one uses its packed copy; what differs is packed anew."""
    model = small_model()
    pack_linears(model)
    twin = copy.deepcopy(model, {id(model[0].weight): model[0].weight})
    other = copy.deepcopy(model)

    pack_linears(twin, like=model)
    pack_linears(other, like=model)

    assert twin[0].packed is model[0].packed
    assert other[0].packed is not model[0].packed


@needs_float32
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 64, 65])
def test_float32_keeps_its_precision(rows: int) -> None:
    """Whichever copy of the weight a number of rows uses, the product is float32's, bias included."""
    torch.manual_seed(4)
    weight, bias = torch.nn.Parameter(torch.randn(72, 40)), torch.nn.Parameter(torch.randn(72))
    for linear in (from_weight(weight), from_weight(weight, bias)):
        linear.pack()
        x = torch.randn(rows, 40)
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if linear.bias is None else bias.double())
        torch.testing.assert_close(linear(x).double(), exact, rtol=0, atol=1e-5)


@needs_packing
def test_no_rows_give_no_rows() -> None:
    """A chunk of a prompt wants no logits; an empty product keeps its width."""
    model = small_model()
    pack_linears(model)
    assert model[0](torch.zeros(0, 40, dtype=torch.bfloat16)).shape == (0, 56)


def _inexact() -> PackedLinear:
    model = small_model()
    pack_linears(model, int8=True)
    return model[0]


@needs_int8
@pytest.mark.parametrize("rows", [1, 8, 32, 33])
def test_int8_is_close_and_only_for_small_batches(rows: int) -> None:
    """Up to 32 rows the error is below 2 per cent of a row's size; more rows are multiplied in bfloat16."""
    layer = _inexact()
    x = torch.randn(rows, 40, dtype=torch.bfloat16) * torch.logspace(-2, 3, rows)[:, None].bfloat16()
    dense = x.float() @ layer.weight.float().T
    error = (layer(x).float() - dense).norm(dim=-1) / dense.norm(dim=-1)
    assert float(error.max()) < 0.02
    exact = torch.ops.mkldnn._linear_pointwise(x, layer.packed, None, "none", [], "")
    assert torch.equal(layer(x), exact) == (rows == 33)


@needs_int8
def test_int8_rows_do_not_depend_on_batch_mates() -> None:
    """A row is quantised by its own largest value, so a wild neighbour costs it nothing."""
    layer = _inexact()
    x = torch.randn(4, 40, dtype=torch.bfloat16)
    wild = x.clone()
    wild[1:] *= 1000
    assert torch.equal(layer(x)[0], layer(wild)[0])


@needs_int8
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_int8_hides_no_broken_number(broken: float) -> None:
    """What is not finite in weight or input is not finite in the product, so a broken draft is still noticed."""
    layer = _inexact()
    x = torch.ones(2, 40, dtype=torch.bfloat16)
    assert torch.isfinite(layer(x)).all()
    x[0, 3] = broken
    assert not torch.isfinite(layer(x)[0]).all()
    layer.weight[5, 5] = broken
    layer.pack()
    assert not torch.isfinite(layer(torch.ones(1, 40, dtype=torch.bfloat16))[0, 5])


@needs_int8
def test_int8_follows_the_weight_and_stays_out_of_copies() -> None:
    """Packing again quantises again; a deep copy has neither packed form."""
    model = small_model()
    pack_linears(model, int8=True)
    twin = copy.deepcopy(model)
    model[0].weight.zero_()
    pack_linears(model, int8=True)
    x = torch.ones(2, 40, dtype=torch.bfloat16)
    assert float(model[0](x).abs().max()) == 0.0
    assert twin[0].quantized is None
    assert float(twin[0](x).abs().max()) > 0.0
