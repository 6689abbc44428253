"""Turn a chunk of student logits into its loss figures and, in place, into the gradient of the logits.

    z -> weight * dL/dz,   KL and α a row,   as `kernels.sparse_loss` defines them

Shapes: logits [rows, vocab] fp32 or bf16, contiguous, overwritten; ids [rows, k] int64, distinct within a row;
logprobs [rows, k], -inf allowed; weights [rows]; figures KL and α [rows] float32.

One program a row, two passes: the first finds the log-sum-exp, then the k tokens of the teacher decide the row's
two numbers (what a token inside K gets is its own, outside K it is q_j times one factor), the second writes
q_j times the factor and then the k slopes over it.  Chunks have 512 rows or more, so a program a row fills the GPU
and no row is split; a row of 151936 bf16 numbers is still in L2 for the second pass.

Precision: logits are what the matrix product leaves, bf16 or float32.  Everything made of them, log-sum-exp, q, both
tails, KL, α and the slopes, is float32; the gradient is rounded to the dtype of the logits once, when it is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.aot import Case

DTYPES = (torch.float32, torch.bfloat16)
_MAX_K = 1024
_TILE = 4096
_WARPS = 8
NEVER = tl.constexpr(float("-inf"))
FLOOR = tl.constexpr(-1e30)  # below every logit, and still a number to reckon with
TINY = tl.constexpr(1e-6)  # floor of both tails and of α, as in `kernels.sparse_loss`
MIN_NORMAL = tl.constexpr(1e-37)


@triton.jit
def _log_sum(row, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """Return log Σ exp of a row; eight neighbours share one running maximum."""
    peak = tl.full([TILE // 8], FLOOR, tl.float32)
    mass = tl.zeros([TILE // 8], tl.float32)
    for first in range(0, VOCAB, TILE):
        columns = first + tl.arange(0, TILE)
        z = tl.load(row + columns, mask=columns < VOCAB, other=NEVER).to(tl.float32)
        eight = tl.reshape(z, [TILE // 8, 8])
        higher = tl.maximum(peak, tl.max(eight, axis=1))
        mass = mass * tl.exp(peak - higher) + tl.sum(tl.exp(eight - higher[:, None]), axis=1)
        peak = higher
    top = tl.max(peak, axis=0)
    return top + tl.log(tl.sum(mass * tl.exp(peak - top), axis=0))


@triton.jit(do_not_specialize=["kl_share"])
def _loss_rows(
    logits, ids, logprobs, weights, kl_out, alpha_out, kl_share, VOCAB: tl.constexpr, K: tl.constexpr,
    PADDED: tl.constexpr, WITH_GRADIENT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    row = logits + at * VOCAB
    total = _log_sum(row, VOCAB, TILE)
    slot = tl.arange(0, PADDED)
    used = slot < K
    token = tl.load(ids + at * K + slot, mask=used, other=0)
    p = tl.exp(tl.load(logprobs + at * K + slot, mask=used, other=NEVER).to(tl.float32))
    p = p / tl.maximum(tl.sum(p, axis=0), 1.0)
    p_tail = tl.maximum(1.0 - tl.sum(p, axis=0), TINY)
    log_q = tl.load(row + token, mask=used, other=NEVER).to(tl.float32) - total
    q = tl.exp(log_q)
    q_tail = tl.maximum(1.0 - tl.sum(q, axis=0), TINY)
    both = tl.log(tl.maximum(p, MIN_NORMAL)) - tl.log(tl.maximum(q, MIN_NORMAL))
    kl = tl.sum(tl.where(p > 0, p * both, 0.0), axis=0) + p_tail * tl.log(p_tail / q_tail)
    alpha = tl.sum(tl.minimum(p, q), axis=0) + tl.minimum(p_tail, q_tail)
    alpha = tl.minimum(tl.maximum(alpha, TINY), 1.0)
    tl.store(kl_out + at, kl)
    tl.store(alpha_out + at, alpha)
    if WITH_GRADIENT:
        weight = tl.load(weights + at).to(tl.float32)
        short, short_tail = tl.where(q < p, 1.0, 0.0), tl.where(q_tail < p_tail, 1.0, 0.0)
        lacking = tl.sum(q * short, axis=0) + q_tail * short_tail
        scale = (kl_share - 1.0) / alpha
        inside = weight * (kl_share * (q - p) + scale * q * (short - lacking))
        outside = weight * (kl_share * (1.0 - p_tail / q_tail) + scale * (short_tail - lacking))
        tl.debug_barrier()  # every thread has read its logits of K
        for first in range(0, VOCAB, TILE):
            columns = first + tl.arange(0, TILE)
            z = tl.load(row + columns, mask=columns < VOCAB, other=NEVER).to(tl.float32)
            tl.store(row + columns, (tl.exp(z - total) * outside).to(row.dtype.element_ty), mask=columns < VOCAB)
        tl.debug_barrier()  # what is written twice is written here last
        tl.store(row + token, inside.to(row.dtype.element_ty), mask=used)


def loss_rows(
    logits: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor, weights: torch.Tensor, kl_share: float,
    kl: torch.Tensor, alpha: torch.Tensor, *, with_gradient: bool,
) -> None:  # fmt: skip
    """Write KL and α of every row and, where asked, replace the logits by weight * dL/dz.

    Shapes: logits [rows, vocab]; ids and logprobs [rows, k]; weights, kl and alpha [rows], the last two float32.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a tensor that is not contiguous.
    """
    _check(logits, ids, logprobs, weights, kl, alpha)
    rows, vocab = logits.shape
    if not rows:
        return
    k = ids.shape[1]
    _loss_rows[(rows,)](
        logits, ids, logprobs, weights, kl, alpha, float(kl_share), VOCAB=vocab, K=k,
        PADDED=triton.next_power_of_2(k), WITH_GRADIENT=with_gradient, TILE=_TILE, num_warps=_WARPS,
    )  # fmt: skip


def _check(
    logits: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor, weights: torch.Tensor, kl: torch.Tensor,
    alpha: torch.Tensor,
) -> None:  # fmt: skip
    if logits.dim() != 2 or logits.dtype not in DTYPES:
        raise ValueError(f"logits is {logits.dtype} {list(logits.shape)}; it must be float32 or bfloat16 [rows, vocab]")
    rows, vocab = logits.shape
    if ids.shape != logprobs.shape or ids.dim() != 2 or len(ids) != rows or not 0 < ids.shape[1] <= min(_MAX_K, vocab):
        raise ValueError(
            f"ids has the shape {list(ids.shape)} and logprobs {list(logprobs.shape)}; both must be [{rows}, k], "
            f"k 1 to {min(_MAX_K, vocab)}"
        )
    if ids.dtype != torch.int64:
        raise ValueError(f"ids is {ids.dtype}; it must be torch.int64")
    for name, tensor, dtypes in (
        ("weights", weights, DTYPES), ("kl", kl, (torch.float32,)), ("alpha", alpha, (torch.float32,))
    ):  # fmt: skip
        if list(tensor.shape) != [rows] or tensor.dtype not in dtypes:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be {dtypes[0]} [{rows}]")
    named = {"logits": logits, "ids": ids, "logprobs": logprobs, "weights": weights, "kl": kl, "alpha": alpha}
    for name, tensor in named.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has the strides {list(tensor.stride())}; it must be contiguous")


def cases() -> list[Case]:
    """Name the specialisations that real models use."""
    return [
        Case(
            f"sparse_loss vocab={vocab} k={k} {dtype} gradient={gradient}", _loss_rows,
            {"logits": f"*{dtype}", "ids": "*i64", "logprobs": "*fp32", "weights": "*fp32", "kl_out": "*fp32",
             "alpha_out": "*fp32", "kl_share": "fp32"},
            {"VOCAB": vocab, "K": k, "PADDED": triton.next_power_of_2(k), "WITH_GRADIENT": gradient, "TILE": _TILE},
            warps=_WARPS, aligned=("logits", "ids", "logprobs", "weights", "kl_out", "alpha_out"),
        )
        for vocab in (49152, 151936)
        for k in (16, 32)
        for dtype in ("bf16", "fp32")
        for gradient in (True, False)
    ]  # fmt: skip
