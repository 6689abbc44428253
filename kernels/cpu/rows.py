"""Call the C kernels on rows of logits: the largest, and the most likely with their log-probs."""

from __future__ import annotations

import torch

from kernels.cpu.library import load


def largest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's first NaN, or else the first of its largest: the value and its place.

    Shapes: x [rows, width] float32, contiguous; results [rows] float32 and int64.
    """
    rows, width = x.shape
    values, places = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.long)
    load().rows_largest(x.data_ptr(), rows, width, values.data_ptr(), places.data_ptr(), _threads(rows))
    return values, places


def top_log_probs(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and natural log-probs of each row's k largest in falling order; of equal ones the first come first.

    Shapes: x [rows, width] float32, contiguous, width >= k >= 1; results [rows, k] int64 and float32.
    """
    (rows, width), library, threads = x.shape, load(), _threads(len(x))
    ids, log_probs = torch.empty(rows, k, dtype=torch.long), torch.empty(rows, k, dtype=torch.float32)
    scratch = torch.empty(library.rows_scratch(width, k, threads), dtype=torch.float32)
    library.rows_top(
        x.data_ptr(), rows, width, k, log_probs.data_ptr(), ids.data_ptr(), scratch.data_ptr(), threads
    )  # fmt: skip
    return ids, log_probs


def _threads(rows: int) -> int:
    return min(rows, torch.get_num_threads())
