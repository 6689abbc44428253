"""Log-probs a client asked for: what the target thought of each committed token, and of the alternatives.

They come from the raw logits, before temperature, penalties and cuts, so speculation, sampling
parameters and batch mates do not move them.
"""

from __future__ import annotations

import torch

from adapter.contracts import TokenLogprob
from kernels.dispatch import sparse_log_probs


def token_logprobs(logits: torch.Tensor, tokens: list[int], num_top: int | None) -> list[TokenLogprob] | None:
    """Return one entry a token, or None when the request did not ask.

    Shapes: logits [rows, vocab] float32 with rows >= len(tokens); row j decided tokens[j].
    """
    if num_top is None:
        return None
    rows = logits[: len(tokens)]
    if not len(tokens):
        return []
    chosen = rows.gather(1, torch.tensor(tokens)[:, None]).squeeze(1) - torch.logsumexp(rows, dim=-1)
    if not num_top:
        return [TokenLogprob(logprob=value) for value in chosen.tolist()]
    ids, logprobs = sparse_log_probs(rows, min(num_top, rows.shape[1]))
    return [
        TokenLogprob(logprob=value, top_ids=tuple(top), top_logprobs=tuple(top_values))
        for value, top, top_values in zip(chosen.tolist(), ids.tolist(), logprobs.tolist(), strict=True)
    ]
