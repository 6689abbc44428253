"""Write the records of `adapter.contracts` to bytes, and read them with every check a reader needs."""

from __future__ import annotations

from typing import TypeVar

import msgspec
import numpy as np

from adapter.contracts import READABLE_SCHEMAS, RequestOutcome, Verdict, VerifiedBlock, Wire, WireError

_T = TypeVar("_T", VerifiedBlock, RequestOutcome)


def to_wire(record: Wire) -> bytes:
    """Write a record as msgpack."""
    return msgspec.msgpack.encode(record)


def block_from_wire(data: bytes) -> VerifiedBlock:
    """Read a verified block and check that its arrays agree in length.

    Raises:
        WireError: not msgpack, a wrong type, an unknown schema, or arrays of unequal length.
    """
    block = _decode(data, VerifiedBlock)
    num, k = len(block.verdicts), block.top_k
    if k < 1:
        raise WireError(f"verified block {block.request_id!r}: top_k is {k}; expected 1 or more")
    if num and max(block.verdicts) > max(Verdict):
        raise WireError(f"verified block {block.request_id!r}: verdict {max(block.verdicts)} has no meaning")
    expected = {
        "positions": 4 * num,
        "draft_ids": 4 * num,
        "draft_logprobs": 4 * num,
        "tail_mass": 4 * num,
        "topk_ids": 4 * num * k,
        "topk_logprobs": 2 * num * k,
    }
    for field, size in expected.items():
        if len(getattr(block, field)) != size:
            raise WireError(
                f"verified block {block.request_id!r}: {field} has {len(getattr(block, field))} "
                f"bytes, expected {size} for {num} records of top-{k}"
            )
    if not 0 < block.keep_probability <= 1:
        raise WireError(
            f"verified block {block.request_id!r}: keep_probability is {block.keep_probability}; expected above 0, at "
            "most 1"
        )
    positions = block.array("positions").astype(np.int64)
    if (np.diff(positions) <= 0).any():
        raise WireError(f"verified block {block.request_id!r}: its positions do not rise")
    tokens = len(block.token_ids) // 4
    if len(block.token_ids) % 4 or (
        num and not (block.first_position < positions.min() and positions.max() < block.first_position + tokens)
    ):
        raise WireError(f"verified block {block.request_id!r}: positions point outside its {tokens} tokens")
    return block


def outcome_from_wire(data: bytes) -> RequestOutcome:
    """Read a request outcome.

    Raises:
        WireError: not msgpack, a wrong type, or an unknown schema.
    """
    return _decode(data, RequestOutcome)


def _decode(data: bytes, kind: type[_T]) -> _T:
    try:
        record = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise WireError(f"not a {kind.__name__}: {error}") from error
    if record.schema not in READABLE_SCHEMAS:
        known = " and ".join(str(version) for version in READABLE_SCHEMAS)
        raise WireError(f"{kind.__name__} has schema {record.schema}; this build reads {known}")
    return record
