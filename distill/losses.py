"""What the draft is trained to minimise, as a choice of words over one kernel.

`kl` matches the target's law and is stable from scratch; `nla` is -log of the acceptance itself;
`blend` mixes them.  Knows nothing about models or blocks.  Called by `distill.trainer` and
`distill.bootstrap`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from kernels.sparse_loss import SparseTeacherLoss

Kind = Literal["kl", "nla", "blend"]


class LossStats(NamedTuple):
    """Weighted means over the rows; `acceptance` is Σ min(p, q) with the tail lumped (an upper bound)."""

    kl: float
    acceptance: float


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
    kl_share = {"kl": 1.0, "nla": 0.0, "blend": blend}.get(kind)
    if kl_share is None or not 0.0 <= kl_share <= 1.0:
        raise ValueError(f"loss kind {kind!r} with blend {blend}: use 'kl', 'nla', or 'blend' with a share in [0, 1]")
    loss, kl, alpha = SparseTeacherLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head_weight, topk_ids, topk_logprobs, weights, kl_share, chunk_rows
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
