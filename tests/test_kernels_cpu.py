"""The C kernels: exact products whatever the storage and the batch, and an honest no where they cannot be had."""

from __future__ import annotations

import copy
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.cpu import library
from kernels.cpu.forward import linear
from kernels.cpu.packing import Format, PackedWeight, pack
from kernels.packed_linear import can_compile, from_weight, pack_linears

needs_kernels = pytest.mark.skipif(not can_compile(), reason=f"no C kernels here: {library.unavailable()}")

SIZES = [(96, 128), (50, 64), (33, 160), (1, 32), (31, 40), (64, 1536), (7, 3)]  # outputs, inputs
ROWS = (1, 2, 5, 12, 13, 24, 37, 48, 97, 200)


def weight_of(kind: Format, outputs: int, inputs: int) -> torch.Tensor:
    """A float32 weight that this format can say exactly, and no shorter one."""
    made = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs * inputs))
    if kind == Format.BFLOAT16:
        return made.bfloat16().float()
    if kind == Format.FLOAT32 or inputs % 32:
        return made
    blocks = made.view(outputs, -1, 32)
    if kind == Format.INT8:
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
        return ((blocks / scale).round() * scale).view(outputs, inputs)
    low = blocks.amin(-1, keepdim=True).half().float()
    scale = ((blocks.amax(-1, keepdim=True) - low) / 15).half().float()
    q = ((blocks - low) / scale).round().clamp(0, 15)
    q[..., 3], q[..., 9] = 0, 15
    return (q * scale + low).view(outputs, inputs)


def cases() -> list[tuple[int, int, Format]]:
    return [(*size, kind) for size in SIZES for kind in formats_for(size[1])]


def formats_for(inputs: int) -> list[Format]:
    return [kind for kind in Format if inputs % 32 == 0 or kind in (Format.FLOAT32, Format.BFLOAT16)]


def as_float32(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedWeight:
    """The same weight in the longest format: one entry that nothing shorter can say, on an output of its own."""
    odd = torch.full((32, weight.shape[1]), torch.pi)
    filled = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % 32))
    both = pack(torch.cat([filled, odd]), None)
    assert both.format == Format.FLOAT32
    return PackedWeight(both.panels, bias, *weight.shape, Format.FLOAT32)


@needs_kernels
@pytest.mark.parametrize(
    ("outputs", "inputs", "kind"), [(*size, kind) for size in SIZES for kind in formats_for(size[1])]
)
def test_a_product_is_the_float64_product(outputs: int, inputs: int, kind: Format) -> None:
    """Within float32's rounding, bias included, for any number of rows; the format is the shortest exact one."""
    weight, bias = weight_of(kind, outputs, inputs), torch.randn(outputs)
    packed = pack(weight, bias)
    assert packed.format == kind
    for rows in ROWS:
        x = torch.randn(rows, inputs)
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(linear(x, packed).double(), exact, rtol=0, atol=3e-6 * inputs**0.5 + 1e-6)


@needs_kernels
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_a_row_is_the_same_bits_in_every_batch_and_format(outputs: int, inputs: int) -> None:
    """What speculation must not change: neither batch mates nor how the weight is stored move a single bit."""
    for kind in formats_for(inputs):
        weight, bias = weight_of(kind, outputs, inputs), torch.randn(outputs)
        packed, longest = pack(weight, bias), as_float32(weight, bias)
        x = torch.randn(max(ROWS), inputs)
        alone = torch.cat([linear(row[None], packed) for row in x])
        for rows in ROWS:
            assert torch.equal(linear(x[:rows], packed), alone[:rows])
        assert torch.equal(linear(x, longest), alone)


@needs_kernels
def test_one_huge_input_costs_the_others_no_digits() -> None:
    """Some models have single inputs in the thousands; n=200 rows, seed 1: no worse than torch by more than a fifth."""
    torch.manual_seed(1)
    x, weight = torch.randn(200, 1536), torch.randn(64, 1536) / 40
    x[:, 7] = 5000.0
    exact = x.double() @ weight.double().T
    ours = (linear(x, pack(weight)).double() - exact).abs().mean()
    torchs = (torch.nn.functional.linear(x, weight).double() - exact).abs().mean()
    assert float(ours) <= 1.2 * float(torchs)


@needs_kernels
@pytest.mark.parametrize("kind", [Format.INT4, Format.INT8, Format.BFLOAT16])
def test_a_weight_that_cannot_be_said_shorter_is_not(kind: Format) -> None:
    """One weight off by one unit in the last place is enough to be kept in full."""
    weight = weight_of(kind, 40, 64)
    weight[17, 33] = torch.nextafter(weight[17, 33], torch.tensor(torch.inf))
    packed = pack(weight)
    assert packed.format != kind
    x = torch.randn(3, 64)
    assert torch.equal(linear(x, packed), linear(x, as_float32(weight, None)))


@needs_kernels
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("exact", [True, False])
def test_no_broken_number_is_hidden(broken: float, exact: bool) -> None:
    """What is not finite in weight or input is not finite in the product, rounded weights included."""
    weight = weight_of(Format.INT8, 40, 64)
    x = torch.ones(2, 64)
    x[1, 60] = broken
    heard = linear(x, pack(weight, exact=exact))
    assert torch.isfinite(heard[0]).all()
    assert not torch.isfinite(heard[1]).any()
    weight[5, 5] = broken
    heard = linear(torch.ones(1, 64), pack(weight, exact=exact))[0]
    assert not torch.isfinite(heard[5])
    assert torch.isfinite(heard[:5]).all()


@needs_kernels
@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1.0, 1e3, 1e6, 1e8, 1e12])
def test_a_rounded_weight_is_close_whatever_its_size(size: float) -> None:
    """Below 1 per cent of a row's size, n=64 rows, seed 2; a size that float16 scales cannot hold is not rounded so."""
    torch.manual_seed(2)
    weight, x = (torch.randn(96, 256) * size).bfloat16(), torch.randn(64, 256)
    weight[:, :32] = 0.0
    packed = pack(weight, exact=False)
    assert packed.format == (Format.INT8 if 1e-2 <= size <= 1e6 else Format.BFLOAT16)
    exact = x @ weight.float().T
    assert float(((linear(x, packed) - exact).norm(dim=-1) / exact.norm(dim=-1)).max()) < 0.01


@needs_kernels
def test_large_weights_are_laid_out_in_slices() -> None:
    """A weight of several slices of which only the last needs the longest form is kept in one form throughout."""
    weight = torch.randn(2500, 32).bfloat16().float()
    assert pack(weight).format == Format.BFLOAT16
    weight[2499, 31] = torch.pi
    packed, x = pack(weight), torch.randn(3, 32)
    assert packed.format == Format.FLOAT32
    torch.testing.assert_close(linear(x, packed), x @ weight.T, rtol=0, atol=1e-4)


@needs_kernels
def test_products_of_many_shapes_and_types() -> None:
    """Leading dimensions stay, bfloat16 comes back as bfloat16, parts of larger tensors and no rows work."""
    weight = torch.randn(40, 64)
    packed = pack(weight)
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(linear(x, packed), x @ weight.T, rtol=0, atol=1e-4)
    assert linear(x.bfloat16(), packed).dtype == torch.bfloat16
    assert linear(x[:0], packed).shape == (0, 3, 40)
    wide = torch.randn(5, 128)
    assert torch.equal(linear(wide[:, ::2], packed), linear(wide[:, ::2].contiguous(), packed))


@needs_kernels
def test_layers_follow_their_weight_and_copies_do_not_share_it() -> None:
    """Packing again after a change in place is enough, and a deep copy multiplies with its own weight."""
    made = torch.nn.Sequential(torch.nn.Linear(64, 40, bias=False)).requires_grad_(False)
    pack_linears(made, compiled=True)
    twin = copy.deepcopy(made)
    made[0].weight.zero_()
    pack_linears(made, compiled=True)
    x = torch.ones(2, 64)
    assert float(made[0](x).abs().max()) == 0.0
    assert twin[0].panels is None
    assert float(twin[0](x).abs().max()) > 0.0


@needs_kernels
def test_what_is_shared_is_packed_once() -> None:
    """A model that shares a weight with a packed one uses its copy."""
    made = torch.nn.Sequential(torch.nn.Linear(64, 40, bias=False)).requires_grad_(False)
    pack_linears(made, compiled=True)
    twin = copy.deepcopy(made, {id(made[0].weight): made[0].weight})
    pack_linears(twin, like=made, compiled=True)
    assert twin[0].panels is made[0].panels
    layer = from_weight(torch.nn.Parameter(torch.randn(4, 64)))
    assert layer.panels is None


# -- the library -------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No library loaded yet, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library._load.cache_clear()
    yield tmp_path
    library._load.cache_clear()


def compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


def test_without_a_compiler_the_reason_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is raised at import; whoever asks hears what is missing and what to do."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler was found; install gcc or name one in CC" in str(library.unavailable())
    with pytest.raises(library.LibraryUnavailable, match="no C compiler"):
        library.load()


def test_an_older_cpu_is_told_so(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AVX-512 nothing is compiled."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert library.unavailable() == "this CPU has no AVX-512"
    assert not (fresh / "cache").exists()


@needs_kernels
def test_a_compiler_that_fails_leaves_nothing_behind(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's last line is the reason, and no half-written library waits for the next start."""
    broken = compiler(
        fresh / "broken-cc", '[ "$1" = --version ] && echo 1 && exit; echo "ld: no room left" >&2; exit 1'
    )
    monkeypatch.setenv("CC", broken)
    assert str(library.unavailable()) == f"{broken} could not build the C kernels: ld: no room left"
    assert not list((fresh / "cache").rglob("*.so"))


@needs_kernels
def test_what_is_no_library_is_built_again(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else under its name in the cache costs one compilation and no service."""
    assert library.unavailable() is None
    (built,) = (fresh / "cache").rglob("*.so")
    other = fresh / "other" / built.relative_to(fresh / "cache")  # where it lies it is loaded already
    other.parent.mkdir(parents=True)
    other.write_text("not a library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "other"))
    library._load.cache_clear()
    assert library.unavailable() is None
    assert other.stat().st_size == built.stat().st_size


@needs_kernels
def test_without_a_place_to_keep_it_a_library_is_still_built(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder that cannot be made is no reason to be slow."""
    (fresh / "cache").write_text("a file")
    monkeypatch.setattr(tempfile, "tempdir", str(fresh))
    assert library.unavailable() is None
    assert [path.name for path in fresh.iterdir()] == ["cache"]


@needs_kernels
def test_a_library_is_built_once_and_by_what_it_depends_on(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start loads what the first one built; another compiler builds its own."""
    assert library.unavailable() is None
    built = list((fresh / "cache").rglob("*.so"))
    assert len(built) == 1
    before = built[0].stat().st_mtime_ns
    library._load.cache_clear()
    assert library.unavailable() is None
    assert built[0].stat().st_mtime_ns == before
    other = compiler(fresh / "other-cc", '[ "$1" = --version ] && echo other && exit; exec cc "$@"')
    monkeypatch.setenv("CC", other)
    library._load.cache_clear()
    assert library.unavailable() is None
    assert len(list((fresh / "cache").rglob("*.so"))) == 2
