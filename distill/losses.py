"""What the draft is trained to minimise, as a choice of words over one kernel.

`kl` matches the target's law and is stable from scratch; `nla` is -log of the acceptance itself; `blend`
mixes them.  A `Schedule` says which mixture a training uses when.  Knows nothing about models or blocks.
Called by `distill.tuning` and `distill.bootstrap`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from kernels.sparse_loss import SparseTeacherLoss

Kind = Literal["kl", "nla", "blend"]
Objective = Literal["kl", "nla", "blend", "lk"]

_KL_ONLY = 0.3  # share of a training before `blend` lets the acceptance itself join
_LK_RATE = 3.0


class LossStats(NamedTuple):
    """Weighted means over the rows; `acceptance` is Σ min(p, q) with the tail lumped (an upper bound)."""

    kl: float
    acceptance: float


def kl_share(objective: Objective, *, done: float, acceptance: float | None) -> float:
    """Return the share of KL in the loss of a step; -log(acceptance) has the rest.

    `kl` and `nla` are one and zero; `blend` is one over the first three tenths and a half after; `lk` falls as the
    draft gets better, exp(-3 α), the schedule of "LK losses" (arXiv 2602.23881).

    Args:
        done: how much of the training is over, in [0, 1].
        acceptance: of the last steps, None before the first.
    """
    if objective == "lk":
        return math.exp(-_LK_RATE * acceptance) if acceptance is not None else 1.0
    if objective == "blend":
        return 1.0 if done < _KL_ONLY else 0.5
    return 1.0 if objective == "kl" else 0.0


def sparse_teacher_loss(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_logprobs: torch.Tensor,
    weights: torch.Tensor,
    *,
    kind: Kind = "kl",
    blend: float = 0.5,
    chunk_rows: int = 256,
) -> tuple[torch.Tensor, LossStats]:
    """Return Σ_rows weight · loss and its statistics; give weights that sum to one for a mean.

    The sum is not divided by anything, so that micro-batches of one step simply add up.

    Args:
        hidden: [n, h], what the head reads; the only thing that receives a gradient.
        head_weight: [vocab, h], frozen; float32 is the fast type on a CPU.
        topk_ids: [n, k] int64, distinct within a row.
        topk_logprobs: [n, k] natural, temperature 1; what they leave over is the tail.
        weights: [n], zero leaves a row out.
        blend: share of `kl` under kind "blend"; the rest is `nla`.
        chunk_rows: rows whose logits exist at the same time.

    Raises:
        ValueError: shapes that do not fit, ids outside the vocabulary, or an unknown kind.
    """
    _check(hidden, head_weight, topk_ids, topk_logprobs, weights)
    share_of_kl = {"kl": 1.0, "nla": 0.0, "blend": blend}.get(kind)
    if share_of_kl is None or not 0.0 <= share_of_kl <= 1.0:
        raise ValueError(f"loss kind {kind!r} with blend {blend}: use 'kl', 'nla', or 'blend' with a share in [0, 1]")
    loss, kl, alpha = SparseTeacherLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head_weight, topk_ids, topk_logprobs, weights, share_of_kl, chunk_rows
    )
    share = weights / weights.sum().clamp_min(1e-12)
    return loss, LossStats(kl=float(share.to(kl.dtype) @ kl), acceptance=float(share.to(alpha.dtype) @ alpha))


def _check(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_logprobs: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    rows = hidden.shape[0]
    fits = (
        hidden.dim() == 2
        and hidden.shape[1] == head_weight.shape[1]
        and topk_ids.shape == topk_logprobs.shape
        and topk_ids.shape[:1] == weights.shape == (rows,)
    )
    if not fits:
        raise ValueError(
            "expected hidden [n, h], head [vocab, h], ids and log-probs [n, k], weights [n]; got "
            f"{[tuple(t.shape) for t in (hidden, head_weight, topk_ids, topk_logprobs, weights)]}"
        )
    if rows and (int(topk_ids.min()) < 0 or int(topk_ids.max()) >= head_weight.shape[0]):
        raise ValueError(
            f"top-k ids run from {int(topk_ids.min())} to {int(topk_ids.max())}, the vocabulary has "
            f"{head_weight.shape[0]} entries; these records belong to another target"
        )
