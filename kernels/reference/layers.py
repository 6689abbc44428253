"""The pointwise parts of a decoder layer in plain torch: norm, rotation with cache write, gated activation.

Nothing is read back to the host.  float64 inputs are computed in float64, everything else in float32, and a
result is rounded where the Llama architecture of transformers rounds it.
"""

from __future__ import annotations

import torch


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Add x to the residual in place and return the root mean square norm of the sum, or of x where there is none.

        norm(h) = weight * round(h / sqrt(mean(h²) + epsilon))

    Shapes: x and residual [tokens, hidden]; weight [hidden]; result [tokens, hidden] in x's dtype.  The sum is
    rounded to the residual's dtype before it is normed; statistics are float32.
    """
    if residual is not None:
        x = residual.add_(x)
    return _norm(x, weight, epsilon).to(x.dtype)


def rope_and_write(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor,
    keys: torch.Tensor, values: torch.Tensor, *, heads: int,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Rotate queries and keys by their positions, write keys and values into the cache and return the queries.

        rotate(h) = h * cos + swap(h) * sin      swap exchanges the halves of h; sin carries the sign

    Shapes: qkv [tokens, (heads + 2 * kv_heads) * dim]; cos and sin [positions, dim], the first half of sin negated;
    positions [tokens], beyond the tables the nearest row is taken; slots [tokens], -1 writes nothing and no slot
    may occur twice; keys and values [blocks, block_tokens, kv_heads, dim]; result [tokens, heads, dim].
    norms: weights [dim] of queries and of keys and the epsilon of a norm of each head before it is rotated.
    """
    kv_heads, dim = keys.shape[2:]
    parts = qkv.view(len(qkv), heads + 2 * kv_heads, dim)
    query, key, value = parts.split((heads, kv_heads, kv_heads), dim=1)
    if norms is not None:
        query = _norm(query, norms[0], norms[2]).to(qkv.dtype)
        key = _norm(key, norms[1], norms[2]).to(qkv.dtype)
    rows = positions.long().clamp(0, len(cos) - 1)
    turns = _working(cos[rows])[:, None], _working(sin[rows])[:, None]
    _write(keys, _rotate(key, *turns).to(keys.dtype), slots)
    _write(values, value.to(values.dtype), slots)
    return _rotate(query, *turns).to(qkv.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of rows that hold gate and up side by side.

    Shapes: gate_up [tokens, 2 * width]; result [tokens, width].  silu(gate) is rounded before the product.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    activated = torch.nn.functional.silu(_working(gate)).to(gate_up.dtype)
    return (_working(activated) * _working(up)).to(gate_up.dtype)


def _working(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Norm the last dimension; rounded to x's dtype before the product with the weight."""
    wide = _working(x)
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return _working(scaled.to(x.dtype)) * _working(weight)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    wide = _working(x)
    return wide * cos + wide.roll(x.shape[-1] // 2, -1) * sin


def _write(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """Write rows to their slots.  Those without one repeat the row with the largest, or what slot 0 holds."""
    if not len(rows):
        return
    flat = cache.view(-1, *cache.shape[2:])
    slots = slots.long()
    source = torch.where(slots >= 0, torch.arange(len(slots), device=slots.device), slots.argmax())
    places = slots[source]
    kept = flat[places.clamp_min(0)]
    flat.index_copy_(0, places.clamp_min(0), torch.where((places >= 0)[:, None, None], rows[source], kept))
