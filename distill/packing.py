"""Attention for many sequences laid end to end in one row, so that training pads nothing.

Each sequence attends causally within itself, by torch's own attention one sequence at a time; everything
else in a transformer works token by token.  Knows nothing about blocks or losses.  Used by
`distill.batches`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

PACKED = "draftsmith_packed"


def use_packed_attention(model: Any) -> None:
    """Make a model read rows of several sequences; its forward then takes `lengths`, a list of ints.

    Raises:
        ValueError: the model attends within a window, which packed rows do not know.
    """
    if model.config._attn_implementation == PACKED:
        return
    if getattr(model.config, "sliding_window", None) and getattr(model.config, "use_sliding_window", True):
        raise ValueError(
            f"this draft attends within a window of {model.config.sliding_window} tokens; drafts with full attention "
            "can be trained"
        )
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)
    model.set_attn_implementation(PACKED)


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    lengths: list[int],
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each stretch of `lengths` tokens.

    Shapes: query [1, heads, t, d]; key and value [1, key heads, t, d] with t = Σ lengths; result [1, t, heads, d].
    """
    parts = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None
