"""On a CUDA device: kernels against their references through the door, and a whole engine on captured rounds.

The same tests run in the interpreter where there is no device, so that they are known to mean something.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_rig import MIXED, Rig, plain_each, prompts, reference_models, requests_for, shared_rigs

from kernels.reference import cuts as cuts_reference
from kernels.reference import lora_merge as merge_reference
from kernels.sampling import RowParams
from kernels.sparse_loss import walk_by_kernel, walk_by_torch
from serving.engine.control.fixed import FixedGamma

pytest.importorskip("triton")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def on(device: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies of tensors on a device."""
    return [tensor.to(device, copy=True) for tensor in tensors]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [257, 4099])
def test_cuts_on_a_device_are_those_of_the_reference(device, vocab):
    """Top-k, top-p, min-p and greedy rows, bfloat16 logits: the same border to the last bit."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(5, vocab, generator=generator)).bfloat16()
    params = RowParams(
        torch.tensor([0.0, 0.7, 1.0, 1.3, 0.9]), torch.tensor([1.0, 0.9, 1.0, 0.6, 1.0]),
        torch.tensor([0, 0, 7, 20, 0]), torch.arange(5), torch.arange(5) + 3, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1]),
    )  # fmt: skip
    fields = on(device, params.temperature, params.top_p, params.top_k, params.seeds, params.positions, params.min_p)  # type: ignore[arg-type]
    kernel = importlib.import_module("kernels.gpu.cuts")
    found = kernel.cut_borders(logits.to(device), RowParams(*fields)).cpu()
    assert torch.equal(found, cuts_reference.cut_borders(logits, params))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_on_a_device_is_that_of_the_reference(device, dtype):
    """Odd sizes and ranks; where the sum is exact the weights are the same bits, and figures agree."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randint(-8, 8, (77, 130), generator=generator).to(dtype)
    a, b = (torch.randint(-2, 3, shape, generator=generator).float() for shape in ((5, 130), (77, 5)))
    kernel = importlib.import_module("kernels.gpu.lora_merge")
    here, there = torch.empty_like(base), torch.empty_like(base, device=device)
    wanted = merge_reference.merge_all([merge_reference.Module(here, base, a, b)], 0.5)
    found = kernel.merge_all([merge_reference.Module(there, *on(device, base, a, b))], 0.5)
    assert torch.equal(there.cpu(), here)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_on_a_device_is_that_of_the_host(device):
    """KL, α and the gradient of 9 rows over an odd vocabulary, in float32."""
    generator = torch.Generator().manual_seed(2)
    hidden, head = (torch.randn(shape, generator=generator) for shape in ((9, 24), (301, 24)))
    ids = torch.stack([torch.randperm(301, generator=generator)[:7] for _ in range(9)])
    logprobs = torch.log_softmax(torch.randn(9, 7, generator=generator), -1) - 0.1
    weights = torch.rand(9, generator=generator)
    wanted = walk_by_torch(hidden, head, ids, logprobs, weights, 0.5, 4, True)
    found = walk_by_kernel(*on(device, hidden, head, ids, logprobs, weights), 0.5, 4, True)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-4, atol=2e-5)


@pytest.fixture(scope="module")
def rig_for(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Rig]]:
    with shared_rigs(folder, tmp_path_factory) as found:
        yield found


@pytest.mark.gpu
@pytest.mark.parametrize("gamma", [0, 1, 3])
def test_an_engine_on_a_gpu_says_what_plain_sampling_says(rig_for: Callable[..., Rig], gamma: int) -> None:
    """The tiny pair in float32 on captured rounds: every token equals the definition's, computed on the host."""
    rig: Any = rig_for(exact=True, compiled=False, device="cuda")
    ids = prompts(rig.engine.target.model.config.vocab_size)
    said = plain_each(reference_models(rig.pair)[0], ids, MIXED, 40)
    rig.engine.controller = FixedGamma(gamma)
    assert rig.run(requests_for(ids, MIXED, 40, prefix=f"gpu{gamma}-")) == said
