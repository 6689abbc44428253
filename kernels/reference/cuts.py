"""Find where top-k, top-p and min-p cut each row, as one number a row.

    border = the smallest logit that stays, in the order and with the ties of `kernels.sampling.shape_logits`

Shapes: logits [rows, vocab] in any float dtype; result [rows] float32, -inf where a row is not cut.  On the CPU this
is `shape_logits` itself; elsewhere a sort of every row, which asks the device nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kernels.sampling import RowParams


def cut_borders(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Return the smallest raw logit that stays in each row; -inf where nothing is cut or the row is greedy.

    Shapes: logits [rows, vocab]; result [rows] float32.
    """
    raw = logits.float()
    cut = is_cut(params, raw.shape[1])
    if not raw.is_cpu:
        return sorted_borders(raw, params)
    borders = raw.new_full((len(raw),), -torch.inf)
    if bool(cut.any()):
        from kernels.sampling import shape_logits  # it imports `kernels.dispatch`, which imports this package

        rows = torch.nonzero(cut).squeeze(1)
        part = raw[rows]
        stays = shape_logits(part, params.rows(rows)) > -torch.inf
        borders[rows] = _smallest(part, stays)
    return borders


def is_cut(params: RowParams, vocab: int) -> torch.Tensor:
    """Say which rows have anything to cut.  Shapes: result [rows] bool."""
    cut = ((params.top_k > 0) & (params.top_k < vocab)) | (params.top_p < 1)
    if params.min_p is not None:
        cut = cut | (params.min_p > 0)
    return cut & (params.temperature > 0)


def sorted_borders(raw: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Return what `cut_borders` does, by sorting every row and asking nothing of the host.

    Shapes: raw [rows, vocab] float32; result [rows] float32.
    """
    vocab, sampled = raw.shape[1], params.temperature > 0
    scaled = raw / torch.where(sampled, params.temperature, 1.0)[:, None]
    values = torch.sort(scaled, dim=-1, descending=True).values
    k = torch.where((params.top_k > 0) & (params.top_k < vocab), params.top_k, vocab)
    border = values.gather(1, k[:, None] - 1)
    total = torch.logsumexp(scaled.masked_fill(scaled < border, -torch.inf), dim=-1, keepdim=True)
    mass = torch.exp(values.masked_fill(values < border, -torch.inf) - total)
    needed = (mass.cumsum(-1) - mass < params.top_p[:, None]).sum(-1, keepdim=True)
    nucleus = values.gather(1, (needed - 1).clamp_min(0))
    border = torch.where(params.top_p[:, None] < 1, torch.maximum(border, nucleus), border)
    if params.min_p is not None:
        relative = values[:, :1] + torch.log(params.min_p)[:, None]
        border = torch.where(params.min_p[:, None] > 0, torch.maximum(border, relative), border)
    return torch.where(is_cut(params, vocab), _smallest(raw, scaled >= border), -torch.inf)


def _smallest(raw: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    """Return the smallest logit of each row that stays; -inf where none does."""
    least = raw.masked_fill(~stays, torch.inf).amin(-1)
    return torch.where(stays.any(-1), least, -torch.inf)
