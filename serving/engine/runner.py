"""Run a transformers model over a ragged batch on its paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from serving.engine.attention import IMPLEMENTATION, KVPool, Row, build_layout


@dataclass(frozen=True, slots=True)
class Work:
    """What one request contributes to a forward: new tokens from `start`, logits of the last `num_logits`."""

    block_table: list[int]
    start: int
    token_ids: list[int]
    num_logits: int


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """Logits [rows, vocab] float32 of the wanted rows; hidden [rows, hidden_size] when asked for."""

    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class ModelRunner:
    """A model bound to a KV pool.  Models of one shape may share the pool: see `use`."""

    def __init__(self, model: Any, pool: KVPool) -> None:
        self.pool = pool
        self.model = model
        self.use(model)

    def use(self, model: Any) -> None:
        """Run this model from now on, on the keys and values that are there."""
        if model.config._attn_implementation != IMPLEMENTATION:
            model.set_attn_implementation(IMPLEMENTATION)
        self.model = model

    def forward(self, work: list[Work], model: Any = None) -> torch.Tensor:
        """Process the new tokens of every request and return the logits asked for.

        Shapes: result [sum of num_logits, vocab] float32, in the order of `work`.
        """
        return self.run(work, model).logits

    @torch.inference_mode()
    def run(self, work: list[Work], model: Any = None, *, hidden: bool = False) -> TargetOutput:
        """Process the new tokens of every request; rows of the result follow the order of `work`."""
        if not work:
            return TargetOutput(torch.empty(0, 0))
        order = sorted(range(len(work)), key=lambda i: len(work[i].token_ids))
        rows = [Row(work[i].block_table, work[i].start, len(work[i].token_ids)) for i in order]
        layout = build_layout(rows, self.pool.block_tokens, self.pool.dtype, self.pool.shared)
        tokens = torch.tensor([token for i in order for token in work[i].token_ids])
        used = model or self.model
        wanted = self._wanted(work, order)
        states = used.model(
            input_ids=tokens[None], position_ids=layout.positions[None], use_cache=False, paged=(self.pool, layout)
        ).last_hidden_state[0, wanted]
        return TargetOutput(used.lm_head(states).float(), states if hidden else None)

    @staticmethod
    def _wanted(work: list[Work], order: list[int]) -> torch.Tensor:
        """Flat indices of the wanted rows, in the order of `work`."""
        ends, total = {}, 0
        for i in order:
            total += len(work[i].token_ids)
            ends[i] = total
        return torch.cat([torch.arange(ends[i] - item.num_logits, ends[i]) for i, item in enumerate(work)])
