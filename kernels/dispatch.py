"""The door to statistics of rows of logits: each call takes the fastest form that can be had here.

The truth they are all compared with is `kernels.reference`.
"""

from __future__ import annotations

import torch

from kernels import reference
from kernels.cpu import rows as compiled_rows
from kernels.cpu.library import unavailable

_allowed = True


def allow_compiled(allowed: bool) -> None:
    """Say whether this process may use our C kernels here; until somebody does, it may."""
    global _allowed
    _allowed = allowed


def largest(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest of each row and its place, the first of several; a NaN is larger than everything.

    Shapes: values [rows, width]; results [rows], in the dtype of `values` and int64.
    """
    if _compiled(values):
        return compiled_rows.largest(values)
    found = values.max(-1)
    return found.values, found.indices


def sparse_log_probs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and natural log-probs of the k most likely tokens of each row, the likeliest first.

    Shapes: logits [rows, vocab]; ids [rows, k] int64; log-probs [rows, k] float32.  The tail mass is what the
    returned probabilities leave over.  Which of equally likely tokens come first, nobody says.
    """
    if _compiled(logits) and 0 < k <= logits.shape[1]:
        return compiled_rows.top_log_probs(logits, k)
    return reference.sparse_log_probs(logits, k)


def _compiled(values: torch.Tensor) -> bool:
    return (
        values.dtype == torch.float32 and values.is_cpu and values.is_contiguous() and values.numel() > 0
        and _allowed and unavailable() is None
    )  # fmt: skip
