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

    @torch.inference_mode()
    def forward(self, work: list[Work], model: Any = None) -> torch.Tensor:
        """Process the new tokens of every request and return the logits asked for.

        Shapes: result [sum of num_logits, vocab] float32, in the order of `work`.
        """
        order = sorted(range(len(work)), key=lambda i: len(work[i].token_ids))
        rows = [Row(work[i].block_table, work[i].start, len(work[i].token_ids)) for i in order]
        layout = build_layout(rows, self.pool.block_tokens, self.pool.dtype, self.pool.shared)
        tokens = torch.tensor([token for i in order for token in work[i].token_ids])
        out = (model or self.model)(
            input_ids=tokens[None],
            position_ids=layout.positions[None],
            use_cache=False,
            logits_to_keep=self._wanted(work, order),
            paged=(self.pool, layout),
        )
        return out.logits[0].float()

    @staticmethod
    def _wanted(work: list[Work], order: list[int]) -> torch.Tensor:
        """Flat indices of the wanted rows, in the order of `work`."""
        ends, total = {}, 0
        for i in order:
            total += len(work[i].token_ids)
            ends[i] = total
        return torch.cat([torch.arange(ends[i] - item.num_logits, ends[i]) for i, item in enumerate(work)])
