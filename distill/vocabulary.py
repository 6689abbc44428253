"""The tokens a draft scores, and where they lie in its output head.

Knows nothing about laws or blocks.  Used by `distill.laws`, `distill.scoring` and `distill.tuning`.
"""

from __future__ import annotations

import torch

_ABSENT = -40.0  # log-prob of what has no chance, in place of -inf, which would give NaN times zero


class Vocabulary:
    """The tokens a draft scores, and where they lie in its head.

    Args:
        allowed: [size] int64, ascending; None for all of them.
        full: how many tokens the target has.
    """

    def __init__(self, allowed: torch.Tensor | None, full: int) -> None:
        self.allowed = allowed
        self._place = torch.arange(full)
        self._fillers = torch.arange(0)
        if allowed is not None:
            self._place = torch.full((full,), -1)
            self._place[allowed] = torch.arange(len(allowed))
            self._fillers = torch.arange(len(allowed))

    def head_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the rows of an output head [full, h] that are scored, [size, h]."""
        return weight if self.allowed is None else weight[self.allowed]

    def translate(self, ids: torch.Tensor, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return places in the trimmed head, with tokens that are not in it replaced by others without a chance.

        Shapes: ids, logprobs and both results [n, k].
        """
        places = self._place[ids]
        missing = places < 0
        if not missing.any():
            return places, logprobs
        k = ids.shape[1]
        spare = self._fillers[-2 * k :]  # k at least of them are not in the row already
        taken = (spare[None, :, None] == places[:, None, :]).any(-1)
        free = spare[torch.argsort(taken.int(), dim=1, stable=True)[:, :k]]
        return torch.where(missing, free, places), torch.where(missing, _ABSENT, logprobs)
