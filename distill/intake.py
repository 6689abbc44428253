"""Moves verified blocks from the Redis stream to the replay store; never stops for a bad entry.

An entry is acknowledged after its block is on disk, so a kill at any moment loses nothing; what
cannot be read, or belongs to another target, goes to the dead-letter stream with the reason.
No torch.  Called by `distill.evidence`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import structlog

from adapter import keys
from adapter.contracts import VerifiedBlock, WireError
from adapter.streams import BROKEN, Entry, StreamReader
from adapter.wire import block_from_wire
from distill.replay import ReplayStore

log = structlog.get_logger(__name__)

_BATCH = 64
_LOGPROB_SLACK = 0.02  # float16 rounds a log-prob of zero slightly up
_MASS_SLACK = 0.02


@dataclass(frozen=True, slots=True)
class DrainReport:
    """What one drain did. `error` is set when Redis could not be read to the end."""

    stored: int = 0
    repeated: int = 0
    buried: int = 0
    error: str | None = None


def defect_of(block: VerifiedBlock, *, target_fingerprint: str, vocab_size: int | None) -> str | None:
    """Return why a readable block cannot be trained on, or None."""
    if block.target_fingerprint != target_fingerprint:
        return f"block of target {block.target_fingerprint[:12]}, this trainer serves {target_fingerprint[:12]}"
    if not block.num_records:
        return "block without records"
    if block.top_k < 1:
        return f"top_k is {block.top_k}; at least 1 log-prob a position is needed"
    logprobs = block.array("topk_logprobs").astype(np.float32)
    if np.isnan(logprobs).any() or float(logprobs.max()) > _LOGPROB_SLACK:
        return "target log-probs that are NaN or above zero"
    tail = block.array("tail_mass").astype(np.float32)
    if not ((tail >= -_MASS_SLACK) & (tail <= 1 + _MASS_SLACK)).all():
        return "tail mass that is NaN or no probability"
    if not (math.isfinite(block.logged_at_s) and math.isfinite(block.sampling.temperature)):
        return f"logged at {block.logged_at_s} s, temperature {block.sampling.temperature}; both must be finite"
    if vocab_size is not None:
        largest = max(int(block.array("topk_ids").max()), int(block.array("token_ids").max()))
        if largest >= vocab_size:
            return f"token id {largest} outside the vocabulary of {vocab_size}"
    return None


def drain(
    store: ReplayStore, reader: StreamReader, defect: Callable[[VerifiedBlock], str | None], *, batch: int = _BATCH
) -> DrainReport:
    """Move everything the stream holds for this group into the store; never raises for Redis.

    Entries another trainer read and never acknowledged come first.  An entry that cannot be read, or
    that `defect` objects to, goes to the dead-letter stream with the reason.
    """
    report = DrainReport()
    try:
        with store.writing():
            while entries := reader.claim(0, batch):
                report = _keep(store, reader, entries, defect, report)
            while entries := reader.read(batch):
                report = _keep(store, reader, entries, defect, report)
    except BROKEN as error:
        report = replace(report, error=str(error) or type(error).__name__)
        log.warning("drain_stopped", error=report.error, stored=report.stored)
    return report


def _keep(
    store: ReplayStore,
    reader: StreamReader,
    entries: list[Entry],
    defect: Callable[[VerifiedBlock], str | None],
    report: DrainReport,
) -> DrainReport:
    good: list[tuple[Entry, VerifiedBlock]] = []
    bad: list[tuple[Entry, str]] = []
    for entry in entries:
        try:
            block = block_from_wire(entry.payload)
            reason = defect(block)
        except (WireError, ValueError) as error:
            block, reason = None, str(error)
        if block is None or reason is not None:
            bad.append((entry, reason or "unreadable"))
        else:
            good.append((entry, block))
    stored = store.append([(block, entry.payload) for entry, block in good])
    reader.ack([entry for entry, _ in good])
    for entry, reason in bad:
        reader.bury(entry, keys.BLOCKS_DEAD, reason)
    return DrainReport(
        stored=report.stored + stored, repeated=report.repeated + len(good) - stored, buried=report.buried + len(bad)
    )
