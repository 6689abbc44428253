"""The tokens a draft scores, and where they lie in its output head.

Knows nothing about laws or blocks.  Used by `distill.laws`, `distill.scoring` and `distill.tuning`.
"""

from __future__ import annotations

import torch

_ABSENT = -40.0  # log-prob of what has no chance, in place of -inf, which would give NaN times zero


class Vocabulary:
    """The tokens a draft says, as rows of its head.

    Args:
        allowed: token ids, int64, ascending; None for all of them.
        full: how many rows the head has; ids beyond it, of a target that pads its vocabulary, are not said.

    Raises:
        ValueError: the head has a row for none of the allowed tokens.
    """

    def __init__(self, allowed: torch.Tensor | None, full: int) -> None:
        self._place = torch.arange(full)
        self._rows: torch.Tensor | None = None
        if allowed is not None:
            self._rows = allowed[allowed < full]
            if not len(self._rows):
                raise ValueError(f"none of the {len(allowed)} allowed tokens lies in the draft's vocabulary of {full}")
            self._place = torch.full((full,), -1)
            self._place[self._rows] = torch.arange(len(self._rows))

    def head_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the rows of an output head [full, h] that are scored, [size, h]."""
        return weight if self._rows is None else weight[self._rows]

    def find(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of token ids in the trimmed head, -1 for those the draft cannot say."""
        known = ids < len(self._place)
        return torch.where(known, self._place[ids.clamp_max(len(self._place) - 1)], -1)

    def translate(self, ids: torch.Tensor, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows in the trimmed head, with tokens that are not in it replaced by others without a chance.

        Shapes: ids, logprobs and both results [n, k]; rows are distinct where ids are.
        """
        places = self.find(ids)
        missing = places < 0
        if not missing.any():
            return places, logprobs
        k = ids.shape[1]
        size = len(self._place) if self._rows is None else len(self._rows)
        spare = torch.arange(size)[-2 * k :]  # k at least of them are not in the row already
        taken = (spare[None, :, None] == places[:, None, :]).any(-1)
        free = spare[torch.argsort(taken.int(), dim=1, stable=True)[:, :k]]
        return torch.where(missing, free, places), torch.where(missing, _ABSENT, logprobs)
