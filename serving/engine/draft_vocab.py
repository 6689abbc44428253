"""Score only a chosen part of the vocabulary when drafting, and follow which part that is.

Versions of one base share the output head, so they share its chosen rows too.  `DraftVocab` follows the
registry of vocabularies as `HotSwap` follows that of versions, in the same thread: it builds the next head off
the hot path and `poll`, called between two rounds, only moves a reference.  It also hands committed tokens to
the counts a new vocabulary is chosen from.  Called by the draft proposer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
import torch
from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from adapter.contracts import ArtifactError
from adapter.draft_vocab import FULL, load_vocab
from adapter.following import ACTOR, Follower, forbid
from adapter.pairs import Pair
from adapter.settings import Settings
from adapter.token_counts import TokenCounts, read_counts, write_counts
from adapter.vocab_registry import LiveVocab, Vocabularies
from adapter.vocab_selection import build_vocab, shipped_ranking, target_vocab_size
from serving.engine.trimmed_head import TrimmedHead

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class VocabReceipt:
    """One change of vocabulary: what is scored now, what was before, and how long the loop stood still."""

    number: int
    replaced: int
    size: int | None
    generation: int
    pause_ms: float
    at_s: float


class DraftVocab(Follower[TrimmedHead | None]):
    """Keep the head in force equal to the registry's live vocabulary.

    Args:
        head: the output head that all resident drafts share.
        folder: where vocabularies and the file of counts lie.
        save_s: how often counts are written, while there are new ones.
        clock: epoch seconds.
    """

    def __init__(
        self,
        registry: Vocabularies,
        folder: Path,
        head: torch.nn.Linear,
        *,
        target_fingerprint: str,
        vocab_size: int,
        counts: TokenCounts,
        save_s: float = 10.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(FULL, None, generation=1)
        self._registry = registry
        self._folder = folder
        self._full_head = head
        self._fingerprint = target_fingerprint
        self._vocab_size = vocab_size
        self._counts = counts
        self._save_s = save_s
        self._saved_at_s = clock()
        self._unsaved = 0
        self._clock = clock
        self._heads: dict[int, TrimmedHead] = {}
        self.last: VocabReceipt | None = None
        self.tokens_counted = 0  # committed since start
        self.tokens_inside = 0  # of those, in the vocabulary in force

    @property
    def number(self) -> int:
        """The number of the vocabulary in force."""
        return self._in_force[1]

    @property
    def head(self) -> TrimmedHead | None:
        """Its head; None scores the full vocabulary."""
        return self._in_force[2]

    @property
    def size(self) -> int:
        """How many tokens the draft scores now."""
        return self._vocab_size if self.head is None else self.head.size

    def counters(self) -> dict[str, int]:
        """Return the snapshot's fields about the vocabulary."""
        return {
            "draft_vocab_number": self.number, "draft_vocab_size": self.size,
            "draft_vocab_counted": self.tokens_counted, "draft_vocab_inside": self.tokens_inside,
        }  # fmt: skip

    def count(self, segment: str, tokens: list[int]) -> None:
        """Note committed tokens; only appends."""
        self._counts.add(segment, tokens)

    def poll(self) -> VocabReceipt | None:
        """Flip to the vocabulary that is ready, if any.  Called between two rounds; moves references only."""
        flipped = self._flip()
        if flipped is None:
            return None
        (generation, number, head), (replaced, pause_ms) = self._in_force, flipped
        size = None if head is None else head.size
        self.last = VocabReceipt(number, replaced, size, generation, pause_ms, self._clock())
        log.info(
            "draft_vocab_swapped", number=number, replaced=replaced, size=self.size, generation=generation,
            pause_ms=round(pause_ms, 3),
        )  # fmt: skip
        return self.last

    def refresh(self) -> None:
        """Fold counts, ask the registry once and prepare what it wants.  Called by the swapper's thread."""
        self._fold()
        try:
            wanted = self._registry.live()
        except (SQLAlchemyError, OSError):  # the swapper asks the same database and says so
            return
        if wanted.generation > max(self._prepared() or 0, self.generation):
            self._prepare(wanted)

    def save(self) -> None:
        """Write the counts now."""
        self._saved_at_s, self._unsaved = self._clock(), 0
        try:
            write_counts(self._folder, self._counts.snapshot())
        except OSError as error:
            log.warning("token_counts_not_written", error=str(error))

    def _fold(self) -> None:
        ids = self._counts.fold()
        if len(ids):
            head = self.head
            mask = None if head is None else np.isin(ids, head.token_ids.cpu().numpy())
            self.tokens_counted += len(ids)
            self.tokens_inside += len(ids) if mask is None else int(mask.sum())
            self._unsaved += len(ids)
        if self._unsaved and self._clock() - self._saved_at_s >= self._save_s:
            self.save()

    def _prepare(self, wanted: LiveVocab) -> None:
        try:
            head = None if wanted.sha256 is None else self._head(wanted.live, wanted.sha256)
        except ArtifactError as error:
            self._refuse(wanted.live, error)
            return
        with self._lock:
            self._ready = (wanted.generation, wanted.live, head)
            keep = {self.number, wanted.live, wanted.previous}
        self._heads = {number: item for number, item in self._heads.items() if number in keep}

    def _head(self, number: int, sha256: str) -> TrimmedHead:
        """Return the head of a vocabulary; live and previous stay in memory, so going back needs no disk."""
        if number not in self._heads:
            begin = time.perf_counter()
            ids = load_vocab(
                self._folder, sha256, target_fingerprint=self._fingerprint, vocab_size=self._vocab_size
            )  # fmt: skip
            self._heads[number] = TrimmedHead(self._full_head, ids)
            seconds = round(time.perf_counter() - begin, 3)
            log.info("draft_vocab_loaded", number=number, size=len(ids), seconds=seconds)
        return self._heads[number]

    def _refuse(self, number: int, error: ArtifactError) -> None:
        log.error("draft_vocab_refused", number=number, reason=str(error))
        forbid(self._registry, number, str(error))


def open_vocabulary(settings: Settings, pair: Pair, database: Database, head: torch.nn.Linear) -> DraftVocab | None:
    """Follow the vocabularies of a deployment; None where settings say that the draft scores all tokens.

    A deployment that never had one starts with the default size chosen from the ranking shipped for its
    target, if there is one.

    Raises:
        SettingsError: the configured size leaves no room beside the special tokens.
    """
    width, size = target_vocab_size(pair), settings.engine.draft_vocab_size
    if not size:
        return None
    registry, folder = Vocabularies(database), settings.vocabularies_dir
    counts = TokenCounts(width, pair.target_fingerprint)
    try:
        if (earlier := read_counts(folder)) is not None:
            counts.restore(earlier)
    except ArtifactError as error:
        log.warning("token_counts_unreadable", error=str(error))
    if size < width and shipped_ranking(pair) is not None and not registry.rows():
        manifest = build_vocab(folder, pair, None, size)
        row = registry.publish(manifest, actor=ACTOR, reason="the ranking shipped for this target", automatic=True)
        registry.promote(row.number, actor=ACTOR, reason="first vocabulary", automatic=True)
    vocabulary = DraftVocab(
        registry, folder, head, target_fingerprint=pair.target_fingerprint, vocab_size=width, counts=counts
    )
    vocabulary.refresh()
    return vocabulary
