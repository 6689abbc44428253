"""Blocks of one request belong together: their tokens hang together, and they share context.

No torch.  Used by `distill.batches`, `distill.scoring` and `distill.goodput`.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapter.contracts import VerifiedBlock


def places_by_request(blocks: Sequence[VerifiedBlock]) -> list[list[int]]:
    """Return the indices of each request's blocks, requests in the order in which they first come."""
    found: dict[str, list[int]] = {}
    for i, block in enumerate(blocks):
        found.setdefault(block.request_id, []).append(i)
    return list(found.values())
