"""Some rows of an output head: score a chosen part of the vocabulary only."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from adapter.contracts import ArtifactError
from kernels.cpu.packing import PackedWeight
from kernels.packed_linear import PackedLinear, from_weight
from kernels.sampling import Columns


class TrimmedHead:
    """Some rows of an output head, and which tokens they score.

    Args:
        head: the full head; it is packed for the CPU where that one is.
        token_ids: the tokens to keep, ascending; those the head has no row for are left out.
    """

    def __init__(self, head: torch.nn.Linear, token_ids: NDArray[np.uint32]) -> None:
        ids = torch.from_numpy(token_ids.astype(np.int64))
        ids = ids[ids < head.weight.shape[0]]
        rows = ids.to(head.weight.device)
        if not len(ids):
            raise ArtifactError("the draft has a row for none of the vocabulary's tokens")
        self.token_ids = ids
        self.columns = Columns.of(ids)
        weight = torch.nn.Parameter(head.weight.detach()[rows], requires_grad=False)
        bias = None if head.bias is None else torch.nn.Parameter(head.bias.detach()[rows], requires_grad=False)
        self._linear = from_weight(weight, bias)  # multiplies plainly while it is not packed
        if isinstance(head, PackedLinear):
            self._linear.int8, self._linear.compiled = head.int8, head.compiled
            self._linear.pack()

    @property
    def size(self) -> int:
        """How many tokens are scored."""
        return len(self.token_ids)

    @property
    def weight(self) -> torch.Tensor:
        """The rows that are kept.  Shapes: [size, hidden]."""
        return self._linear.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """Their biases, where the full head has any.  Shapes: [size]."""
        return self._linear.bias

    @property
    def panels(self) -> PackedWeight | None:
        """They and their biases as our own kernels read them; None where torch multiplies."""
        return self._linear.panels

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Score.  Shapes: states [rows, hidden]; result [rows, size]."""
        scores: torch.Tensor = self._linear(states)
        return scores

    def widen(self, logits: torch.Tensor, vocab: int) -> torch.Tensor:
        """Put logits at their tokens' places, -inf elsewhere.  Shapes: [rows, size] to [rows, vocab]."""
        wide = logits.new_full((len(logits), vocab), -torch.inf)
        wide[:, self.token_ids] = logits
        return wide
