"""Refuse models whose logits this engine would not reproduce, at start, by name.

Layers that keep less than every position cannot be rolled back by a length, and a runner applies the
output head alone: what a model does to its logits after that would be lost without a word.  Called by
`serving.engine.build`.
"""

from __future__ import annotations

from typing import Any

import torch

from adapter.contracts import SettingsError
from serving.engine.runner import ModelRunner
from serving.engine.work import Work

_NEEDED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings",
)  # fmt: skip
_PROBE_TOKENS = 8
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the largest logit; scaled logits are off by far more


def check_config(role: str, config: Any) -> None:
    """Refuse a configuration that the paged cache does not fit, before anything is loaded.

    Raises:
        SettingsError: it names no key-value heads or sizes as Llama does, or has layers that see less than every
            position.
    """
    missing = [name for name in _NEEDED if not isinstance(getattr(config, name, None), int)]
    if missing:
        raise SettingsError(
            f"{role} of type {config.model_type!r} says nothing of {', '.join(missing)}; only decoders of text "
            "that are configured as Llama is are served"
        )
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None or "sliding_attention" in kinds:
        raise SettingsError(
            f"{role} of type {config.model_type!r} attends over a sliding window of {window} tokens; only models that "
            "attend to every position are served"
        )
    if kinds:
        raise SettingsError(
            f"{role} of type {config.model_type!r} has layers of kind {', '.join(sorted(kinds))}; only models that "
            "attend to every position are served"
        )
    if getattr(config, "final_logit_softcapping", None) is not None:
        raise SettingsError(
            f"{role} of type {config.model_type!r} caps its logits (final_logit_softcapping); only models whose logits "
            "are those of their output head are served"
        )


@torch.inference_mode()
def generic_logits(model: Any) -> torch.Tensor:
    """Return a model's own logits over a few tokens.  Shapes: [tokens, vocab] float32."""
    logits: torch.Tensor = model(input_ids=torch.tensor([_probe(model)], device=model.device), use_cache=False).logits[
        0
    ]
    return logits.float().cpu()


def check_forward(runner: ModelRunner, expected: torch.Tensor) -> None:
    """Compare a runner with what its model said before it was changed to run here; writes to block 0 alone.

    The middle one of the positions counts: bfloat16 rounding can spoil a model's own first one, which
    many models use as a sink of attention, while what is done to logits is done at every position.

    Raises:
        SettingsError: the logits are not the model's own, beyond what its dtype explains.
    """
    model, size = runner.model, runner.pool.block_tokens
    tokens = _probe(model)[:size]
    logits = runner.forward([Work([0], 0, tokens, len(tokens))])
    expected = expected[: len(tokens)]
    off = float(((logits - expected).abs().amax(-1) / expected.abs().amax(-1).clamp_min(1e-9)).median())
    if not off <= _TOLERANCE.get(model.dtype, max(_TOLERANCE.values())):
        raise SettingsError(
            f"target of type {model.config.model_type!r} does more to its logits than its output head: here they are "
            f"off by {off:.0%} of the largest; only models whose logits are those of their output head are served"
        )


def _probe(model: Any) -> list[int]:
    return [index * 7919 % model.config.vocab_size for index in range(_PROBE_TOKENS)]
