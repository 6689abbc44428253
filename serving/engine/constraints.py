"""What makes one request's law its own beyond temperature and nucleus: bias, penalties, bans, grammar.

Every rule is a function of the committed tokens and the drafted ones before a row, so it holds row
by row inside a drafted block and nothing has to be undone when a draft is rejected.  Requests
without such rules have none of this.
"""

from __future__ import annotations

import torch


class Constraints:
    """The rules of one request."""

    def apply(self, logits: torch.Tensor, drafted: list[int], first: int = 0) -> None:
        """Change the logits of a round in place.

        Shapes: logits [rows, vocab] float32; row j decides the token after the committed tokens and
        drafted[: first + j].
        """
        raise NotImplementedError

    def commit(self, tokens: list[int]) -> None:
        """Take in tokens that were committed."""
        raise NotImplementedError
