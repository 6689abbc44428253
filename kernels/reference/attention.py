"""Attention over a paged cache for a ragged batch, in plain torch on any device.

    result = softmax(scaling * q kᵀ, masked to what a query may see) v

Every request's part of the cache is gathered and its queries are padded to the longest; nothing is read back to
the host.  float64 inputs are computed in float64, everything else in float32.
"""

from __future__ import annotations

import torch


def paged_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, starts: torch.Tensor,
    lengths: torch.Tensor, scaling: float, *, max_query: int,
) -> torch.Tensor:  # fmt: skip
    """Let every query attend to its request's cached tokens up to its own position.

    Shapes: query [tokens, heads, dim]; keys and values [blocks, block_tokens, kv_heads, dim]; tables [requests,
    width] int32, block numbers of which those beyond a request's length are never followed; starts [requests + 1]
    int32: rows starts[i] to starts[i + 1] are request i's last positions; lengths [requests] int32, cached tokens
    with the new ones; result [tokens, heads, dim] in query's dtype, zero in rows of no request.
    max_query: no request has more queries.
    """
    tokens, heads, dim = query.shape
    requests, width = tables.shape
    kv_heads = keys.shape[2]
    if not tokens or not requests or not width:
        return torch.zeros_like(query)
    device = query.device
    edges, ends = starts.long(), lengths.long()[:, None]
    first = ends - (edges[1:] - edges[:-1])[:, None]  # position of a request's first query
    k, v, at = _gather(keys, values, tables, ends)
    number = torch.arange(min(max_query, tokens), device=device)
    rows = (edges[:-1, None] + number).clamp_max(tokens - 1)
    q = _working(query[rows]).view(requests, len(number), kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("rqkgd,rtkd->rkgqt", q * scaling, k)
    hidden = (at > first[:, :, None] + number[:, None]) | (at >= ends[:, :, None])
    # The lowest finite number, not -inf: a row that sees nothing must not become NaN.
    scores = scores.masked_fill(hidden[:, None, None], torch.finfo(scores.dtype).min)
    attended = torch.einsum("rkgqt,rtkd->rqkgd", scores.softmax(-1), v).reshape(-1, heads, dim)
    index = torch.arange(tokens, device=device)
    owner = torch.searchsorted(edges[1:].contiguous(), index, right=True)
    request = owner.clamp_max(requests - 1)
    place = (index - edges[request]).clamp(0, len(number) - 1)
    result = attended[request * len(number) + place].to(query.dtype)
    return result.masked_fill((owner >= requests)[:, None, None], 0.0)


def _working(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _gather(
    keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy every request's keys and values side by side, zeros beyond its length.

    Shapes: ends [requests, 1]; results two of [requests, span, kv_heads, dim] and the positions [span].
    """
    block_tokens = keys.shape[1]
    at = torch.arange(tables.shape[1] * block_tokens, device=tables.device)
    inside = at < ends
    slots = tables.long().repeat_interleave(block_tokens, 1) * block_tokens + at % block_tokens
    slots = torch.where(inside, slots, 0)
    parts = (item.flatten(0, 1)[slots] for item in (keys, values))
    k, v = (_working(part).masked_fill(~inside[:, :, None, None], 0.0) for part in parts)
    return k, v, at
