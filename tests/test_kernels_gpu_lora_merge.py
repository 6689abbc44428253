"""The kernel that merges LoRA factors, against the sum written down in float32 and float64."""

from __future__ import annotations

import os

import pytest
import torch

from kernels.gpu import lora_merge
from kernels.reference import lora_merge as reference
from kernels.reference.lora_merge import Module

SHAPES = [(1, 1, 1), (33, 129, 3), (64, 256, 16), (31, 40, 5), (5, 300, 64), (100, 7, 37)]
DTYPES = [torch.float32, torch.bfloat16]


def module_of(
    rows: int, columns: int, rank: int, *, weight: torch.dtype = torch.float32, factor: torch.dtype = torch.float32
) -> Module:
    """Random factors, and an output full of NaN."""
    generator = torch.Generator().manual_seed(rows + columns + rank)
    base = torch.randn(rows, columns, generator=generator).to(weight)
    a = (0.1 * torch.randn(rank, columns, generator=generator)).to(factor)
    b = torch.randn(rows, rank, generator=generator).to(factor)
    return Module(torch.full_like(base, float("nan")), base, a, b)


def narrowed(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to the nearest, as a GPU does; Triton's interpreter cuts float32 off where bfloat16 ends."""
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        values = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return values.to(dtype)


def merged(module: Module, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    stats = torch.full((3,), float("nan"))
    lora_merge.merge(*module, scale, stats)
    return module.out, stats


def written_down(module: Module, scale: float) -> torch.Tensor:
    """The sum of outer products, each product and each sum rounded to float32."""
    update = torch.zeros_like(module.base, dtype=torch.float32)
    for row, column in zip(module.a.float(), module.b.float().t(), strict=True):
        update = update + column[:, None] * row[None, :]
    return narrowed(module.base.float() + update * scale, module.out.dtype)


@pytest.mark.parametrize("factor", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_merge_has_the_bits_of_the_sum(
    rows: int, columns: int, rank: int, weight: torch.dtype, factor: torch.dtype
) -> None:
    """Odd shapes and ranks give the float32 sum rounded once, bit for bit, and figures within 1e-5."""
    module = module_of(rows, columns, rank, weight=weight, factor=factor)
    out, stats = merged(module, 0.37)
    assert torch.equal(out, written_down(module, 0.37))
    exact = 0.37 * (module.b.double() @ module.a.double())
    wanted = torch.stack((exact.square().sum(), module.base.double().square().sum(), exact.new_zeros(())))
    torch.testing.assert_close(stats.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weight", DTYPES)
def test_merge_equals_the_reference_where_sums_are_exact(weight: torch.dtype) -> None:
    """With factors of small whole numbers every order of adding gives the same sum, so all bits agree."""
    module = module_of(40, 200, 21, weight=weight)
    module = module._replace(a=(module.a * 30).round(), b=(module.b * 3).round())
    other, stats, ours = torch.empty(40, 200), torch.empty(3), torch.empty(3)
    reference.merge(other, module.base, module.a, module.b, 0.25, stats)
    lora_merge.merge(*module, 0.25, ours)
    assert torch.equal(module.out, narrowed(other, weight))
    torch.testing.assert_close(ours, stats, rtol=1e-6, atol=0)


def test_merge_is_one_rounding_from_the_reference() -> None:
    """On random factors bf16 weights differ from the reference's in at most one in a thousand, by one unit."""
    module = module_of(100, 300, 48, weight=torch.bfloat16)
    ours, other = torch.empty(100, 300), torch.empty(100, 300)
    reference.merge(other, module.base, module.a, module.b, 2.0, torch.empty(3))
    lora_merge.merge(ours, module.base, module.a, module.b, 2.0, torch.empty(3))
    bits = (ours.bfloat16().view(torch.int16).int() - other.bfloat16().view(torch.int16).int()).abs()
    assert int(bits.max()) <= 1
    assert float((bits > 0).float().mean()) <= 1e-3


def test_merge_starts_from_the_base_and_may_overwrite_it() -> None:
    """Merging twice from W0 gives the same bits as once; into W0 itself, the same again; W0 stays elsewhere."""
    module = module_of(33, 70, 4, weight=torch.bfloat16)
    before = module.base.clone()
    first = merged(module, 1.0)[0].clone()
    assert torch.equal(merged(module, 1.0)[0], first)
    assert torch.equal(module.base, before)
    inside = module._replace(out=module.base)
    assert torch.equal(merged(inside, 1.0)[0], first)


def test_merge_stays_inside_its_weight() -> None:
    """Numbers before and after the weight are not written, and NaN around the factors never enters."""
    module = module_of(33, 129, 3)
    wall = torch.full((33 * 129 + 512,), 7.0)
    guarded_a, guarded_b = torch.full((5 * 129,), float("nan")), torch.full((35 * 3,), float("nan"))
    a, b = guarded_a[129:-129].view(3, 129), guarded_b[3:-3].view(33, 3)
    a.copy_(module.a)
    b.copy_(module.b)
    out = wall[256:-256].view(33, 129)
    got, stats = merged(Module(out, module.base, a, b), 1.0)
    assert torch.equal(got, written_down(module, 1.0))
    assert float(stats[2]) == 0
    assert torch.all(wall[:256] == 7.0)
    assert torch.all(wall[-256:] == 7.0)


@pytest.mark.filterwarnings("ignore:.*encountered")  # numpy's, where the interpreter overflows as it should
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e38])
def test_merge_counts_what_is_not_finite(odd: float) -> None:
    """One bad number of a factor makes a row of bad updates, counted exactly; so does a product that overflows."""
    module = module_of(40, 130, 3)
    module.b[7, 1] = odd
    module.a[1] = 1e3
    assert float(merged(module, 1.0)[1][2]) == 130


def test_merging_many_says_the_same_as_one_by_one() -> None:
    """Modules of different sizes share one buffer of sums; no figure leaks into another's."""
    modules = [module_of(*shape) for shape in SHAPES]
    stats = lora_merge.merge_all(modules, 0.5)
    for module, row in zip(modules, stats, strict=True):
        copy = module._replace(out=torch.empty_like(module.base))
        out, alone = merged(copy, 0.5)
        assert torch.equal(out, module.out)
        torch.testing.assert_close(row, alone, rtol=1e-6, atol=0)
    assert lora_merge.merge_all([], 0.5).shape == (0, 3)
    torch.testing.assert_close(reference.merge_all(modules, 0.5), stats, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base": torch.zeros(4, 7)}, "both must be \\[out, in\\]"),
        ({"a": torch.zeros(3, 8)}, "rank 1 to"),
        ({"a": torch.zeros(2, 9)}, "do not make an update"),
        ({"b": torch.zeros(2, 4).t()}, "contiguous"),
        ({"b": torch.zeros(4, 2).double()}, "float64"),
    ],
)
def test_merge_refuses_in_words(change: dict[str, torch.Tensor], words: str) -> None:
    """Shapes, dtypes and strides that do not fit are named, and of many modules none is written."""
    good, bad = module_of(4, 8, 2), module_of(4, 8, 2)._replace(**change)
    with pytest.raises(ValueError, match=words):
        lora_merge.merge_all([good, bad], 1.0)
    assert good.out.isnan().all()
