"""What `bench.kernels` measures of learning: the distillation loss with its gradient, and merging a version."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import kernel_peers as peers
from bench.subject import Gate, Subject
from kernels import dispatch
from kernels.reference.lora_merge import Module

BF16 = torch.bfloat16
TOP_K = 32


def losses(device: torch.device) -> Iterator[Subject]:
    """Yield the distillation loss at the shapes of two pairs."""
    for rows, hidden, vocab in ((4096, 576, 49152), (4096, 1024, 151936), (1024, 1024, 151936)):
        yield _loss(device, rows, hidden, vocab)


def _loss(device: torch.device, rows: int, hidden: int, vocab: int) -> Subject:
    from kernels.sparse_loss import SparseTeacherLoss

    head = torch.randn(vocab, hidden, device=device).mul_(0.02).to(BF16)
    weights = torch.ones(rows, device=device)

    def make(number: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator(device=device).manual_seed(number)
        states = torch.randn(rows, hidden, generator=generator, device=device).to(BF16)
        ids = torch.randint(0, vocab, (rows, TOP_K), generator=generator, device=device)
        logprobs = torch.log_softmax(torch.randn(rows, TOP_K, generator=generator, device=device), -1) - 0.05
        return states.requires_grad_(True), ids, logprobs

    def call(made: tuple[torch.Tensor, ...]) -> object:
        loss = SparseTeacherLoss.apply(made[0], head, made[1], made[2], weights, 0.5, 1024)[0]
        return torch.autograd.grad(loss, made[0])

    return Subject(
        "sparse loss", {"rows": rows, "hidden": hidden, "vocab": vocab}, 5 * rows * vocab * 2, make, call,
        rows * hidden * 2, flops=4 * rows * vocab * hidden, launches=8,
        rivals={
            "torch.compile, dense": lambda made: peers.compiled_loss(made[0], head, made[1], made[2]),
            "liger": lambda made: peers.liger_loss(made[0], head),
        }, gate=Gate("60 % of Liger", "vs_peer", 0.6, False, "liger"),
    )  # fmt: skip


def merges(device: torch.device) -> Iterator[Subject]:
    """All linear layers of a 135 M and of a half-billion model, as a swap merges them."""
    for name, hidden, ffn, layers, kv in (("135 M", 576, 1536, 30, 192), ("0.5 B", 896, 4864, 24, 128)):
        yield _merge(device, name, hidden, ffn, layers, kv)


def _merge(device: torch.device, name: str, hidden: int, ffn: int, layers: int, kv: int) -> Subject:
    shapes = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
    size = sum(rows * columns for rows, columns in shapes) * layers * 2

    def make(number: int) -> list[Module]:
        made = []
        for rows, columns in shapes * layers:
            base = torch.full((rows, columns), 0.01 * number, dtype=BF16, device=device)
            a, b = torch.full((16, columns), 0.01, device=device), torch.full((rows, 16), 0.01, device=device)
            made.append(Module(torch.empty_like(base), base, a, b))
        return made

    return Subject(
        "lora merge", {"model": name, "rank": 16}, 2 * size, make,
        lambda modules: dispatch.merge_all(modules, 2.0), 2 * size,
        launches=len(shapes) * layers, against=peers.merge_in_torch,
        gate=Gate("1 millisecond", "ms", 1.0, False) if name == "0.5 B" else None,
    )  # fmt: skip
