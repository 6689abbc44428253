"""Noise inside kernels: the words of `kernels.noise`, and numbers as good as the sampler counts on."""

from __future__ import annotations

import pytest
import torch

from kernels.noise import Purpose, philox, to_uniform

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
of_kernels = pytest.importorskip("kernels.gpu.noise")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EDGES = [0, 1, 2, 1 << 22, (1 << 24) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - (1 << 26), (1 << 32) - 2, (1 << 32) - 1]


@triton.jit
def _words(seed, position, blocks, out, COUNT: tl.constexpr, PURPOSE: tl.constexpr):
    """Write the words of many counters, those of one side by side."""
    at = tl.arange(0, COUNT)
    k0, k1 = of_kernels.key_of(tl.load(seed))
    where = (tl.load(position) & 0xFFFFFFFF).to(tl.uint32)
    b0, b1, b2, b3 = of_kernels.philox(tl.load(blocks + at).to(tl.uint32), where, k0, k1, PURPOSE)
    tl.store(out + tl.arange(0, 4 * COUNT), of_kernels.neighbours(b0, b1, b2, b3).to(tl.int64))


@triton.jit
def _numbers(words, near, exact, misses, COUNT: tl.constexpr):
    """Write both forms of Gumbel noise, and one minus the uniform number, of many words."""
    at = tl.arange(0, COUNT)
    bits = tl.load(words + at).to(tl.uint32)
    tl.store(near + at, of_kernels.gumbel32(bits))
    tl.store(exact + at, of_kernels.gumbel64(bits))
    tl.store(misses + at, of_kernels.misses(bits))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("purpose", list(Purpose))
def test_noise_words_are_those_of_the_reference(device, purpose):
    """Key, counter and lanes sit where `kernels.noise` has them, for seeds and positions past 32 bits as well."""
    blocks = torch.tensor([0, 1, 2, 3, 12287, 37983, 65536, 123456])
    for seed, position in ((0, 0), (7, 5), (-3, 1 << 31), ((1 << 62) + 12345, (1 << 32) + 9)):
        seeds, positions = torch.tensor([seed]), torch.tensor([position])
        out = torch.full((32 + 8,), -1, device=device)
        _words[(1,)](seeds.to(device), positions.to(device), blocks.to(device), out, COUNT=8, PURPOSE=int(purpose))
        expected = philox(seeds.expand(8), blocks, positions.expand(8), purpose)
        assert torch.equal(out[:32].cpu(), expected.flatten())
        assert bool((out[32:] == -1).all())


@pytest.mark.parametrize("device", DEVICES)
def test_noise_in_float32_is_within_what_the_sampler_allows(device):
    """gumbel32 is within 1e-5 of the exact noise at 4,096 words, the smallest and the largest among them.

    The sampler allows 1e-4.  A plain -log(-log u) in float32 is off by more than that, or infinite, near u = 1.
    """
    words = torch.randint(0, 1 << 32, (4096,), generator=torch.Generator().manual_seed(1))
    words[: len(EDGES)] = torch.tensor(EDGES)
    words[len(EDGES) : 2000] = (1 << 32) - 1 - torch.logspace(0, 9.6, 2000 - len(EDGES), dtype=torch.float64).long()
    near, misses = (torch.empty(4096, device=device) for _ in range(2))
    exact = torch.empty(4096, dtype=torch.float64, device=device)
    _numbers[(1,)](words.to(device), near, exact, misses, COUNT=4096)
    true = -torch.log(-torch.log(to_uniform(words)))
    assert float((exact.cpu() - true).abs().max()) < 1e-12
    assert float((near.cpu().double() - true).abs().max()) < 1e-5
    assert float((misses.cpu().double() / (1 - to_uniform(words)) - 1).abs().max()) < 1e-6
    assert bool((true <= -torch.log(1 - to_uniform(words))).all()), "the bound candidates are found by"
