"""From the log to the blocks of one training: collect, choose once, load.

Called by `distill.job`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog

from adapter import keys
from adapter.contracts import VerifiedBlock
from adapter.pairs import Pair
from adapter.settings import Settings
from adapter.streams import StreamReader, connect
from adapter.vocab_selection import target_vocab_size
from distill.intake import defect_of, drain
from distill.replay import ReplayStore
from distill.selection import Selection, select

log = structlog.get_logger(__name__)

_REDIS_TIMEOUT_S = 5.0
_PARTS = ("fresh", "replay", "validation", "gate", "anchor")


@dataclass(frozen=True, slots=True)
class Evidence:
    """The blocks of one training by what they are for, and the newest one the choice knew of."""

    fresh: list[VerifiedBlock]
    replay: list[VerifiedBlock]
    validation: list[VerifiedBlock]
    gate: list[VerifiedBlock]
    anchor: list[VerifiedBlock]
    newest: int
    store: ReplayStore

    @property
    def learned(self) -> list[VerifiedBlock]:
        """What is trained on."""
        return self.fresh + self.replay

    def mark(self) -> None:
        """Remember that all of it went into a version that passed its gate; it is replay from now on."""
        self.store.mark(self.newest)

    def summary(self) -> dict[str, Any]:
        """Return what a version's record says of the blocks it was trained on."""
        segments: dict[str, int] = {}
        for block in self.learned:
            segments[block.segment] = segments.get(block.segment, 0) + 1
        return {
            "blocks": len(self.learned),
            "fresh_blocks": len(self.fresh),
            "requests": len({block.request_id for block in self.learned}),
            "records": sum(block.num_records for block in self.learned),
            "segments": segments,
            "tenants": len({block.tenant for block in self.learned}),
            "from_s": min((block.logged_at_s for block in self.learned), default=None),
            "to_s": max((block.logged_at_s for block in self.learned), default=None),
        }


def collect(settings: Settings, pair: Pair, clock: Callable[[], float] = time.time) -> ReplayStore:
    """Move what was logged since into the replay store; with Redis down, open what is on disk."""
    store = ReplayStore(
        settings.replay_dir, max_blocks=settings.distill.max_blocks, max_bytes=settings.distill.replay_bytes,
        max_age_s=settings.distill.replay_age_s, target_fingerprint=pair.target_fingerprint, clock=clock,
    )  # fmt: skip
    client = connect(settings.redis, _REDIS_TIMEOUT_S)
    vocab_size = target_vocab_size(pair)
    reader = StreamReader(client, keys.BLOCKS, keys.TRAINER_GROUP, f"{socket.gethostname()}:{os.getpid()}")
    try:
        report = drain(
            store,
            reader,
            lambda block: defect_of(block, target_fingerprint=pair.target_fingerprint, vocab_size=vocab_size),
        )
    finally:
        client.close()
    log.info(
        "blocks_collected",
        stored=report.stored,
        repeated=report.repeated,
        buried=report.buried,
        torn=store.torn,
        kept=len(store.refs),
    )
    return store


def choose(folder: Path, store: ReplayStore, settings: Settings) -> Evidence:
    """Choose blocks once a job: a retry that trained on other blocks could not use its checkpoint."""
    chosen = _earlier(folder / "selection.json", store)
    if chosen is None:
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        chosen = select(store, settings.distill)
        path = folder / "selection.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(chosen))
        os.replace(temporary, path)
    refs = {ref.sequence: ref for ref in store.refs}

    def load(sequences: Iterable[int]) -> list[VerifiedBlock]:
        return [store.load(refs[sequence]) for sequence in sequences]

    return Evidence(**{part: load(getattr(chosen, part)) for part in _PARTS}, newest=chosen.newest, store=store)


def _earlier(path: Path, store: ReplayStore) -> Selection | None:
    """Return what an earlier attempt of the job chose, if all of it is still there."""
    known = {ref.sequence for ref in store.refs}
    try:
        chosen = msgspec.json.decode(path.read_bytes(), type=Selection)
    except (OSError, msgspec.MsgspecError):
        return None
    return chosen if known.issuperset(sequence for part in _PARTS for sequence in getattr(chosen, part)) else None
