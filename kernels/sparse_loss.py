"""Distillation loss against a sparse teacher: the target's top-k log-probs plus one lumped tail.

Per row, with student logits z = W h, q = softmax(z), the teacher's top-k set K with probabilities p,
and the tails p_t = 1 - Σ_K p, q_t = 1 - Σ_K q (both clamped to 1e-6):

    KL   = Σ_K p log(p/q) + p_t log(p_t/q_t)     dKL/dz_j  = q_j - p_j             for j in K
                                                           = q_j (1 - p_t/q_t)     elsewhere
    α    = Σ_K min(p, q) + min(p_t, q_t)         dNLA/dz_j = -(1/α) q_j (1[q_j < p_j] - Q),
    NLA  = -log α                                  Q = Σ q over what the student gives too little;
                                                   elsewhere 1[...] compares the two tails.
    loss = Σ_rows weight (kl_share KL + (1 - kl_share) NLA)

Outside K every gradient is q_j times one number per row, so dL/dh = c (q with K zeroed) W + Σ_K g_j W_j:
a chunk of logits is written by one GEMM, turned into q in place by one fused softmax, and read by the
second GEMM.  The head is frozen, so its gradient is never formed.  On CUDA one kernel between the two GEMMs makes
figures and gradient of a chunk (`kernels.gpu.sparse_loss`): logits in the dtype of the head, statistics in float32.

Shapes: hidden [n, h]; head [vocab, h]; topk_ids [n, k] int64; topk_logprobs [n, k]; weights [n].
Knows nothing about blocks, models or optimizers.  Called by `distill.losses`.
"""

from __future__ import annotations

from typing import Any

import torch

_TINY = 1e-6  # floor of both tails and of the acceptance
_MIN_NORMAL = 1e-37
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # float16 would lose gradients below 6e-8
_KERNEL_ROWS = 512


def teacher_law(topk_logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return p over the top-k and the tail; sums above one (float16 log-probs round) are scaled back.

    Shapes: topk_logprobs [n, k]; results [n, k] and [n].
    """
    p = topk_logprobs.exp()
    p = p / p.sum(-1, keepdim=True).clamp_min(1.0)
    return p, (1.0 - p.sum(-1)).clamp_min(_TINY)


class SparseTeacherLoss(torch.autograd.Function):
    """Weighted loss of all rows, its exact gradient with respect to `hidden`, and per-row figures.

    `apply(hidden, head, topk_ids, topk_logprobs, weights, kl_share, chunk_rows)` returns
    (loss [], KL [n], α [n]); only the loss is differentiable, and only towards `hidden`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_logprobs: torch.Tensor,
        weights: torch.Tensor,
        kl_share: float,
        chunk_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Walk the rows in chunks; the gradient for an upstream of one is kept for `backward`."""
        with_gradient = ctx.needs_input_grad[0]
        walk = walk_by_kernel if hidden.is_cuda and head.dtype in _KERNEL_DTYPES else walk_by_torch
        kl, alpha, grad = walk(
            hidden.detach(), head, topk_ids, topk_logprobs, weights.detach(), kl_share, chunk_rows, with_gradient
        )
        if grad is not None:
            ctx.save_for_backward(grad.to(hidden.dtype))
        ctx.mark_non_differentiable(kl, alpha)
        weights = weights.detach().to(kl.dtype)
        loss = weights @ kl * kl_share - weights @ alpha.log() * (1.0 - kl_share)
        return loss, kl, alpha

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the kept gradient."""
        (grad,) = ctx.saved_tensors
        return grad * upstream[0].to(grad.dtype), None, None, None, None, None, None


def walk_by_torch(
    hidden: torch.Tensor,
    head: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_logprobs: torch.Tensor,
    weights: torch.Tensor,
    kl_share: float,
    chunk_rows: int,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return KL [n], α [n] and, where asked, the gradient [n, h] for an upstream of one; all in the head's dtype."""
    rows, vocab = hidden.shape[0], head.shape[0]
    inputs, weights = hidden.to(head.dtype), weights.to(head.dtype)
    buffer = head.new_empty(min(chunk_rows, rows), vocab)
    kl, alpha = head.new_empty(rows), head.new_empty(rows)
    grad = torch.empty_like(inputs) if with_gradient else None
    for start in range(0, rows, chunk_rows):
        part = slice(start, min(start + chunk_rows, rows))
        ids, p, p_tail = topk_ids[part], *teacher_law(topk_logprobs[part].to(head.dtype))
        q_all = torch.mm(inputs[part], head.t(), out=buffer[: ids.shape[0]])
        torch.softmax(q_all, dim=-1, out=q_all)
        q = q_all.gather(1, ids)
        q_tail = (1.0 - q.sum(-1)).clamp_min(_TINY)
        kl[part], alpha[part] = _figures(p, p_tail, q, q_tail)
        if grad is None:
            continue
        inside, outside = _slopes(p, p_tail, q, q_tail, alpha[part], kl_share)
        q_all.scatter_(1, ids, 0.0)
        torch.mm(q_all, head, out=grad[part])
        grad[part].mul_((outside * weights[part]).unsqueeze(1))
        inside = inside.mul_(weights[part].unsqueeze(1)).contiguous()
        grad[part] += torch.nn.functional.embedding_bag(ids, head, mode="sum", per_sample_weights=inside)
    return kl, alpha, grad


def walk_by_kernel(
    hidden: torch.Tensor,
    head: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_logprobs: torch.Tensor,
    weights: torch.Tensor,
    kl_share: float,
    chunk_rows: int,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return what `walk_by_torch` does, KL and α in float32, with one kernel a chunk between the two products.

    Chunks have at least 512 rows: below that, reading the head twice a chunk costs more than the products.
    """
    from kernels.gpu.sparse_loss import loss_rows

    rows, vocab = hidden.shape[0], head.shape[0]
    chunk_rows = max(chunk_rows, _KERNEL_ROWS)
    inputs, weights = hidden.to(head.dtype), weights.float().contiguous()
    topk_ids, topk_logprobs = topk_ids.contiguous(), topk_logprobs.contiguous()
    buffer = head.new_empty(min(chunk_rows, rows), vocab)
    kl, alpha = (head.new_empty(rows, dtype=torch.float32) for _ in range(2))
    grad = torch.empty_like(inputs) if with_gradient else None
    for start in range(0, rows, chunk_rows):
        part = slice(start, min(start + chunk_rows, rows))
        logits = torch.mm(inputs[part], head.t(), out=buffer[: part.stop - start])
        loss_rows(
            logits, topk_ids[part], topk_logprobs[part], weights[part], kl_share, kl[part], alpha[part],
            with_gradient=with_gradient,
        )  # fmt: skip
        if grad is not None:
            torch.mm(logits, head, out=grad[part])
    return kl, alpha, grad


def _figures(
    p: torch.Tensor, p_tail: torch.Tensor, q: torch.Tensor, q_tail: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL [n] and α [n] of one chunk."""
    kl = (torch.xlogy(p, p) - p * q.clamp_min(_MIN_NORMAL).log()).sum(-1) + p_tail * (p_tail / q_tail).log()
    alpha = torch.minimum(p, q).sum(-1) + torch.minimum(p_tail, q_tail)
    return kl, alpha.clamp(_TINY, 1.0)


def _slopes(
    p: torch.Tensor, p_tail: torch.Tensor, q: torch.Tensor, q_tail: torch.Tensor, alpha: torch.Tensor, kl_share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dL/dz inside K [n, k], and the factor of q_j outside K [n]."""
    inside = torch.zeros_like(q)
    outside = torch.zeros_like(q_tail)
    if kl_share:
        inside += kl_share * (q - p)
        outside += kl_share * (1.0 - p_tail / q_tail)
    if kl_share != 1.0:
        short, short_tail = (q < p).to(q.dtype), (q_tail < p_tail).to(q.dtype)
        mass = (q * short).sum(-1) + q_tail * short_tail
        scale = (kl_share - 1.0) / alpha
        inside += scale.unsqueeze(1) * q * (short - mass.unsqueeze(1))
        outside += scale * (short_tail - mass)
    return inside, outside


def dense_reference(
    hidden: torch.Tensor,
    head: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_logprobs: torch.Tensor,
    weights: torch.Tensor,
    kl_share: float,
) -> torch.Tensor:
    """Compute the same loss with dense float64 tensors and ordinary autograd; the truth for tests."""
    log_q_all = torch.log_softmax(hidden.double() @ head.double().t(), dim=-1)
    p, p_tail = teacher_law(topk_logprobs.double())
    log_q = log_q_all.gather(1, topk_ids)
    outside = torch.ones_like(log_q_all).scatter(1, topk_ids, 0.0)
    q_tail = (log_q_all.exp() * outside).sum(-1).clamp_min(_TINY)
    kl = (torch.xlogy(p, p) - p * log_q).sum(-1) + p_tail * (p_tail / q_tail).log()
    alpha = torch.minimum(p, log_q.exp()).sum(-1) + torch.minimum(p_tail, q_tail)
    return (weights.double() * (kl_share * kl - (1.0 - kl_share) * alpha.log())).sum()
