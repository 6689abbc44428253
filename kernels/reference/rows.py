"""Statistics of rows of logits."""

from __future__ import annotations

import torch

_BLOCK = 64


def exact_topk(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest of each row and their indices, without sorting the vocabulary.

    The k largest entries lie in the k blocks with the largest maxima, so one streaming pass finds
    the blocks and the selection runs over k * 64 entries instead of the whole row.
    Shapes: values [rows, vocab]; both results [rows, k], values in falling order.
    """
    rows, vocab = values.shape
    num_blocks = vocab // _BLOCK
    if vocab % _BLOCK or num_blocks <= k:
        top = torch.topk(values, min(k, vocab), dim=-1)
        return top.values, top.indices
    blocks = values.view(rows, num_blocks, _BLOCK)
    best = torch.topk(blocks.amax(-1), k, dim=-1).indices
    candidates = blocks.gather(1, best[:, :, None].expand(-1, -1, _BLOCK)).reshape(rows, -1)
    top = torch.topk(candidates, k, dim=-1)
    indices = best.gather(1, top.indices // _BLOCK) * _BLOCK + top.indices % _BLOCK
    return top.values, indices


def sparse_log_probs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and natural log-probs of the k most likely tokens of each row.

    Shapes: logits [rows, vocab] float32; ids [rows, k] int64; log-probs [rows, k] float32.
    The tail mass is what the returned probabilities leave over.
    """
    values, indices = exact_topk(logits, k)
    return indices, values - torch.logsumexp(logits, dim=-1, keepdim=True)
