"""A draft model's round in one call of compiled code, where that can say all of it.

It covers requests that draw greedily or with a temperature and nothing else, on models and heads that are packed for
our own kernels.  `DraftLoop.run` says None to everything else, which then goes stage by stage.  Knows nothing about
proposals or versions.  Called by `serving.engine.proposers.draft` and where the draft is timed.
"""

from __future__ import annotations

from typing import Any

from adapter.contracts import Sampling
from kernels.cpu.drafting import Ask, Drafted, Drafter
from kernels.packed_linear import PackedLinear
from serving.engine.runner import ModelRunner
from serving.engine.trimmed_head import TrimmedHead
from serving.engine.work import Work


class DraftLoop:
    """Draft with the models of one runner, on its pool and with the head it has in force.

    Args:
        vocab: width of the target's logits; no token beyond it is drafted.
    """

    def __init__(self, runner: ModelRunner, vocab: int) -> None:
        self._runner = runner
        self._vocab = vocab

    def run(
        self, work: list[Work], gammas: list[int], samplings: list[Sampling], model: Any
    ) -> list[Drafted] | None:  # fmt: skip
        """Read each request's tokens and draft gammas[i] after them, 0 only reads; None if that is not covered here.

        Shapes: all lists, and the result, [requests].

        Raises:
            IndexError: a request's blocks do not hold what is read, or a token does not exist.
        """
        if not all(map(_plain, samplings)):
            return None
        asks = [
            Ask(item.block_table, item.start, item.token_ids, gamma, sampling.temperature, sampling.seed)
            for item, gamma, sampling in zip(work, gammas, samplings, strict=True)
        ]
        drafter = self._drafter(model, max(ask.end for ask in asks))
        return None if drafter is None else drafter.draft(asks)

    def _drafter(self, model: Any, end: int) -> Drafter | None:
        """Return what drafts with a model up to `end` positions: as it is packed now, with the head in force."""
        lean, head = self._runner.forwards.of(model), self._runner.head
        linear = model.lm_head if head is None else head
        panels = linear.panels if isinstance(linear, TrimmedHead | PackedLinear) else None
        if lean is None or lean.compiled is None or panels is None:
            return None
        token_ids = linear.token_ids if isinstance(linear, TrimmedHead) else None
        return lean.compiled.drafter(lean.embedding, panels, token_ids, self._vocab, self._runner.pool, end)


def _plain(sampling: Sampling) -> bool:
    """Whether a request's draws need its logits and its temperature only; its constraints nobody asks about here."""
    return sampling.temperature == 0 or (sampling.top_k == 0 and sampling.top_p >= 1 and sampling.min_p == 0)
