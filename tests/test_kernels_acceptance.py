"""Closed-form agreement of draft and target, against simulation of the couplings themselves."""

from __future__ import annotations

import pytest
import torch

from kernels.acceptance import gumbel_acceptance, maximal_acceptance


def _laws(seed: int, size: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.softmax(1.5 * torch.randn(size, generator=generator).double(), -1) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gumbel_acceptance_is_the_share_of_equal_argmaxes(seed):
    """n = 200,000 shared Gumbel draws, seeded; the bound is 5 standard errors (0.0056)."""
    p, q = _laws(seed)
    uniform = torch.rand(200_000, len(p), generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
    noise = -torch.log(-torch.log(uniform.clamp_min(1e-300)))
    share = ((p.log() + noise).argmax(-1) == (q.log() + noise).argmax(-1)).double().mean()
    assert float(gumbel_acceptance(p[None], q[None])) == pytest.approx(float(share), abs=0.0056)


@pytest.mark.parametrize("seed", [3, 4])
def test_maximal_acceptance_is_the_share_rejection_sampling_accepts(seed):
    """n = 200,000 draws from q accepted with min(1, p/q), seeded; the bound is 5 standard errors (0.0056)."""
    p, q = _laws(seed)
    generator = torch.Generator().manual_seed(200 + seed)
    drawn = torch.multinomial(q, 200_000, replacement=True, generator=generator)
    share = (torch.rand(200_000, generator=generator).double() < (p / q)[drawn]).double().mean()
    assert float(maximal_acceptance(p[None], q[None])) == pytest.approx(float(share), abs=0.0056)


def test_no_coupling_beats_the_maximal_one():
    """Gumbel agreement lies between half of the maximal one's odds and the maximal one, on 500 seeded pairs."""
    pairs = [_laws(seed, size=20) for seed in range(500)]
    p, q = (torch.stack(side) for side in zip(*pairs, strict=True))
    best = maximal_acceptance(p, q)
    found = gumbel_acceptance(p, q)
    assert torch.all(found <= best + 1e-12)
    assert torch.all(found >= best / (2 - best) - 1e-12)


def test_equal_laws_always_agree_and_disjoint_ones_never():
    """Zeros on either side are no division by zero."""
    p = torch.tensor([[0.2, 0.8, 0.0], [1.0, 0.0, 0.0]])
    q = torch.tensor([[0.2, 0.8, 0.0], [0.0, 0.5, 0.5]])
    for closed_form in (gumbel_acceptance, maximal_acceptance):
        torch.testing.assert_close(closed_form(p, q), torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-6, rtol=0)


def test_rows_are_independent_of_how_many_there_are():
    """Splitting a long batch gives the same numbers as one row at a time."""
    p, q = (torch.softmax(torch.randn(4099, 3, generator=torch.Generator().manual_seed(s)), -1) for s in (0, 1))
    joined = gumbel_acceptance(p, q)
    torch.testing.assert_close(
        joined[[0, 4096, 4098]], torch.cat([gumbel_acceptance(p[i : i + 1], q[i : i + 1]) for i in (0, 4096, 4098)])
    )
