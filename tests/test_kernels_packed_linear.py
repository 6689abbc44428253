"""Packed linear layers: the same product, and never a stale weight."""

from __future__ import annotations

import copy

import pytest
import torch

from kernels.packed_linear import PackedLinear, pack_linears, packing_works

needs_packing = pytest.mark.skipif(not packing_works(), reason="this CPU has no bfloat16 instructions to pack for")


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
