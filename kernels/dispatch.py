"""The door to every operation: each call takes the fastest form that can be had where its tensors lie.

On CUDA that is a Triton kernel of `kernels.gpu`; on the CPU our C kernels where they can be compiled, else
torch.  The truth they are all compared with is `kernels.reference`, which also runs where nothing else does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.cpu import rows as compiled_rows
from kernels.cpu.library import unavailable
from kernels.noise import Purpose
from kernels.reference.rows import sparse_log_probs as reference_log_probs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernels.reference.lora_merge import Module
    from kernels.sampling import RowParams
    from kernels.verdicts import Draws, Verdicts

_allowed = True


def allow_compiled(allowed: bool) -> None:
    """Say whether this process may use our C kernels here; until somebody does, it may."""
    global _allowed
    _allowed = allowed


# -- rows of logits ------------------------------------------------------------------------------


def largest(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest of each row and its place, the first of several; a NaN is larger than everything.

    Shapes: values [rows, width]; results [rows], in the dtype of `values` and int64.
    """
    if _compiled(values):
        return compiled_rows.largest(values)
    found = values.max(-1)
    return found.values, found.indices


def sparse_log_probs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and natural log-probs of the k most likely tokens of each row, the likeliest first.

    Shapes: logits [rows, vocab]; ids [rows, k] int64; log-probs [rows, k] float32.  The tail mass is what the
    returned probabilities leave over.  Which of equally likely tokens come first, nobody says.
    """
    if _compiled(logits) and 0 < k <= logits.shape[1]:
        return compiled_rows.top_log_probs(logits, k)
    return reference_log_probs(logits, k)


def cut_borders(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Return the smallest logit that top-k, top-p and min-p leave in each row; -inf where nothing is cut.

    Shapes: logits [rows, vocab]; result [rows] float32.
    """
    if logits.is_cuda:
        from kernels.gpu.cuts import cut_borders as form
    else:
        from kernels.reference.cuts import cut_borders as form
    return form(logits, params)


def draw(
    logits: torch.Tensor, params: RowParams, purpose: Purpose = Purpose.SAMPLE, *, borders: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
) -> Draws:  # fmt: skip
    """Draw a token a row, as `kernels.sampling.draw` does; see `kernels.verdicts.Draws` for the result.

    Shapes: logits [rows, columns]; borders [rows]; token_ids [columns], ascending, where not all are scored.
    """
    if logits.is_cuda:
        from kernels.gpu.sampler import draw as form
    else:
        from kernels.reference.verify import draw as form
    return form(logits, params, purpose, borders=borders, token_ids=token_ids)


def verify(
    logits: torch.Tensor, params: RowParams, starts: torch.Tensor, drafted: torch.Tensor, *, coupling: str,
    borders: torch.Tensor | None = None, draft_logits: torch.Tensor | None = None,
    draft_borders: torch.Tensor | None = None, top_k: int = 0, with_residual: bool = True,
) -> Verdicts:  # fmt: skip
    """Judge drafted tokens and record what the target thought; see `kernels.reference.verify`."""
    if logits.is_cuda:
        from kernels.gpu.sampler import verify as form
    else:
        from kernels.reference.verify import verify as form
    return form(
        logits, params, starts, drafted, coupling=coupling, borders=borders, draft_logits=draft_logits,
        draft_borders=draft_borders, top_k=top_k, with_residual=with_residual,
    )  # fmt: skip


# -- layers --------------------------------------------------------------------------------------


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Add `x` to the residual in place, where there is one, and return the norm of the sum.

    Shapes: x, residual and result [tokens, hidden]; weight [hidden].
    """
    if x.is_cuda:
        from kernels.gpu.norm import add_rms_norm as form
    else:
        from kernels.reference.layers import add_rms_norm as form
    return form(x, residual, weight, epsilon)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up.  Shapes: gate_up [tokens, 2 * width]; result [tokens, width]."""
    if gate_up.is_cuda:
        from kernels.gpu.activation import silu_mul as form
    else:
        from kernels.reference.layers import silu_mul as form
    return form(gate_up)


def rope_and_write(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor,
    keys: torch.Tensor, values: torch.Tensor, *, heads: int,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Rotate queries and keys, write keys and values into the cache, and return the queries.

    Shapes: as `kernels.reference.layers.rope_and_write` has them.
    """
    if qkv.is_cuda:
        from kernels.gpu.rope_cache import rope_and_write as form
    else:
        from kernels.reference.layers import rope_and_write as form
    return form(qkv, cos, sin, positions, slots, keys, values, heads=heads, norms=norms)


def paged_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, starts: torch.Tensor,
    lengths: torch.Tensor, scaling: float, *, max_query: int,
) -> torch.Tensor:  # fmt: skip
    """Attend over the paged cache.  Shapes: as `kernels.reference.attention.paged_attention` has them."""
    if query.is_cuda:
        from kernels.gpu.attention import paged_attention as form
    else:
        from kernels.reference.attention import paged_attention as form  # type: ignore[assignment]
    return form(query, keys, values, tables, starts, lengths, scaling, max_query=max_query)


# -- weights -------------------------------------------------------------------------------------


def merge_all(modules: Sequence[Module], scale: float) -> torch.Tensor:
    """Write W0 + scale * B A into every module, and return the figures of each; see `kernels.reference.lora_merge`.

    Shapes: result [modules, 3] float32: squared norms of the update and of W0, numbers that are not finite.
    """
    if modules and modules[0].out.is_cuda:
        from kernels.gpu.lora_merge import merge_all as form
    else:
        from kernels.reference.lora_merge import merge_all as form
    return form(modules, scale)


def _compiled(values: torch.Tensor) -> bool:
    return (
        values.dtype == torch.float32 and values.is_cpu and values.is_contiguous() and values.numel() > 0
        and _allowed and unavailable() is None
    )  # fmt: skip
