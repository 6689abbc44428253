"""What else computes the same on a GPU: plain torch, torch.compile, and libraries where they can be imported."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.functional import linear, silu

from kernels.reference.lora_merge import Module


def eager_sampler(logits: torch.Tensor, drafted: torch.Tensor, top_k: int) -> object:
    """The passes an ordinary rejection sampler makes over probabilities in memory, and a separate top-k for a log."""
    probabilities = torch.softmax(logits.float() / 0.8, dim=-1)
    noise = torch.empty_like(probabilities).exponential_()
    said = (probabilities / noise).argmax(-1)
    kept = probabilities.gather(1, drafted.clamp_min(0).long()[:, None])
    if not top_k:
        return said, kept
    found = torch.topk(logits, top_k, dim=-1)
    return said, kept, found.values.float() - torch.logsumexp(logits.float(), -1, keepdim=True), found.indices


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


def compiled_sampler(logits: torch.Tensor, drafted: torch.Tensor, top_k: int) -> object:
    """The same passes through torch.compile."""
    return _compiled(eager_sampler)(logits, drafted, top_k)


def sorted_nucleus(logits: torch.Tensor) -> object:
    """The border of a nucleus of 0.9 from a sorted row."""
    values = torch.sort(logits.float() / 0.8, dim=-1, descending=True).values
    mass = torch.softmax(values, dim=-1).cumsum(-1)
    return values.gather(1, (mass < 0.9).sum(-1, keepdim=True))


def flex(
    made: tuple[torch.Tensor, ...], batch: int, context: int, queries: int, heads: int, kv_heads: int
) -> object:  # fmt: skip
    """FlexAttention on keys and values that lie side by side."""
    from torch.nn.attention.flex_attention import flex_attention

    query, keys, values, _ = made
    dim = query.shape[-1]
    q = query.view(batch, queries, heads, dim).transpose(1, 2)
    k, v = (item.view(batch, context, kv_heads, dim).transpose(1, 2) for item in (keys, values))
    return _compiled(flex_attention)(q, k, v, enable_gqa=True)


def varlen(made: tuple[torch.Tensor, ...], starts: torch.Tensor, context: int, queries: int, kv_heads: int) -> object:
    """PyTorch's own attention over sequences of several lengths, keys and values side by side."""
    from torch.nn.attention.varlen import varlen_attn

    query, keys, values, _ = made
    batch = len(starts) - 1
    ends = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * context
    k, v = (item.view(batch * context, kv_heads, -1) for item in (keys, values))
    return varlen_attn(query, k, v, starts, ends, queries, context, enable_gqa=True)


def _plain_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    residual.add_(x)
    wide = residual.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def compiled_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> object:
    """Add and norm through torch.compile."""
    return _compiled(_plain_norm)(x, residual, weight)


def _plain_silu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def compiled_silu(gate_up: torch.Tensor) -> object:
    """Gated activation through torch.compile."""
    return _compiled(_plain_silu)(gate_up)


def _dense_loss(states: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    log_q = torch.log_softmax(linear(states, head).float(), dim=-1)
    p, own = logprobs.exp(), log_q.gather(1, ids)
    tail = (1 - own.exp().sum(-1)).clamp_min(1e-6)
    p_tail = (1 - p.sum(-1)).clamp_min(1e-6)
    return ((p * (logprobs - own)).sum(-1) + p_tail * (p_tail / tail).log()).sum()


def compiled_loss(states: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> object:
    """The same loss on dense logits through torch.compile, with its gradient."""
    return torch.autograd.grad(_compiled(_dense_loss)(states, head, ids, logprobs), states)


def liger_loss(states: torch.Tensor, head: torch.Tensor) -> object:
    """Liger's fused linear Jensen-Shannon loss with a teacher of the same size, where it is installed.

    It pays for the teacher's product, which a loss against logged log-probs does not need.
    """
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0)(states, head, states.detach(), head)
    return torch.autograd.grad(loss, states)


def merge_in_torch(modules: list[Module]) -> object:
    """Merge every module in plain torch, without figures."""
    for out, base, a, b in modules:
        out.copy_(base.float() + 2.0 * (b @ a))
    return modules
