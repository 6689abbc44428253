"""What sampling and verification say, as tensors that stay on their device."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Draws:
    """One drawn token a row.

    Shapes: all [rows]; `tokens` and `columns` int64 (they differ only where rows hold some of the vocabulary);
    `logprobs` float32, of the drawn token under the raw law (temperature 1, nothing cut); `finite` bool: the row
    holds no NaN and no +inf, and is not -inf all over.  A row that is not finite draws column 0, at -inf.
    """

    tokens: torch.Tensor
    columns: torch.Tensor
    logprobs: torch.Tensor
    finite: torch.Tensor


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What became of each request's drafted tokens, and what every row says about the target.

    A request: `accepted` [requests] int32, how many drafted tokens are kept; `tokens` [requests] int64, the
    recovered or the bonus token; `finite` [requests] bool, whether all of its rows are finite.  A request without
    rows keeps 0, says -1 and is finite.

    A row: `said` [rows] int64, the target's own token; `logprobs` [rows] float32, of the drafted token, and of
    `said` where no token was drafted; `topk_ids` [rows, k] int32 and `topk_logprobs` [rows, k] float16, the
    likeliest first and of equally likely tokens the lowest id first; `tail` [rows] float32, what the k leave over;
    `residual` [rows] float32 or None, the chance that the row's drafted token is rejected, 1 - Σ min(p, q) of the
    processed laws (0 where no token was drafted; in greedy rows 1 where the drafted token is not `said`).
    Log-probs and tails are of the raw law.  Rows past a request's first rejection hold what these formulas give,
    or a residual of 0.  Rows that are not finite say 0 at -inf, with a tail of 1; rows of no request say -1.
    """

    accepted: torch.Tensor
    tokens: torch.Tensor
    finite: torch.Tensor
    said: torch.Tensor
    logprobs: torch.Tensor
    topk_ids: torch.Tensor
    topk_logprobs: torch.Tensor
    tail: torch.Tensor
    residual: torch.Tensor | None
