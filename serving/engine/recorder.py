"""Write down what verification said, and hand it to the log without ever waiting.

Each committed token becomes a record: was it drafted, was the draft right, and what did the target
think (top-k log-probs and tail mass).  Positions after the first rejection never reach this place.

Rejections are always written down.  Of all other positions a share may be, each by a draw of its own that hangs
on request and position alone, so that what is kept says nothing about its neighbours; the chance is written
beside them and whoever adds up divides by it.  A position where nothing was drafted counts as not rejected: a
draft was not wrong there, and there are as many of them as of accepted ones.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from adapter import keys
from adapter.contracts import (
    SCHEMA_VERSION,
    Coupling,
    RequestOutcome,
    Verdict,
    VerifiedBlock,
    VersionCounts,
    VersionSpan,
    Wire,
)
from serving.engine.rounds import Round, TopTokens
from serving.engine.sequence import Sequence

if TYPE_CHECKING:
    from adapter.sections import LogSettings


class Publisher(Protocol):
    """Where records go; must neither block nor raise."""

    def offer(self, stream: str, record: Wire) -> None:
        """Queue a record for a stream."""


@dataclass(slots=True)
class _Open:
    """Records of one request since its last flush."""

    first: int = 0
    count: int = 0
    verdicts: list[int] = field(default_factory=list)
    draft_ids: list[int] = field(default_factory=list)
    draft_logprobs: list[float] = field(default_factory=list)
    topk_ids: list[np.ndarray] = field(default_factory=list)
    topk_logprobs: list[np.ndarray] = field(default_factory=list)
    versions: list[VersionSpan] = field(default_factory=list)


class Recorder:
    """Collect records per request and publish them as verified blocks and outcomes."""

    def __init__(
        self,
        publisher: Publisher,
        settings: LogSettings,
        *,
        target_fingerprint: str,
        coupling: Coupling,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._publisher = publisher
        self._settings = settings
        self._fingerprint = target_fingerprint
        self._coupling = coupling
        self._clock = clock
        self._open: dict[str, _Open] = {}

    @property
    def top_k(self) -> int:
        """How many of the target's likeliest tokens are recorded a position; 0 while nothing is."""
        return self._settings.top_k if self._settings.enabled else 0

    def record(self, rounds: SequenceOf[Round], kept: SequenceOf[list[int]]) -> None:
        """Record a step; kept[i] are the tokens that were committed of rounds[i]."""
        for item, tokens in zip(rounds, kept, strict=True):
            if item.top is not None and tokens and item.request.learn:
                self._append(item, len(tokens), item.top)

    def finish(self, request: Sequence, delivered_tokens: int, now_s: float) -> None:
        """Publish what is left of a finished request, and its outcome."""
        self._flush(request)
        self._open.pop(request.request_id, None)
        if not self._settings.enabled:
            return
        started = request.started_s if request.started_s is not None else now_s
        self._publisher.offer(
            keys.OUTCOMES,
            RequestOutcome(
                schema=SCHEMA_VERSION, request_id=request.request_id, segment=request.segment,
                finish_reason=request.finish_reason or "error", sampling=request.sampling,
                prompt_tokens=request.prompt_tokens, delivered_tokens=delivered_tokens,
                plain_rounds=request.plain_rounds,
                by_version=tuple(VersionCounts(version=v, counts=c) for v, c in request.by_version.items()),
                accepted_by_position=tuple(request.accepted_by_position), unversioned=request.unversioned,
                learn=request.learn,
                cached_tokens=request.num_cached_tokens, queue_s=started - request.arrived_s,
                first_token_s=(request.first_token_s or now_s) - request.arrived_s,
                total_s=now_s - request.arrived_s, finished_at_s=self._clock(),
            ),
        )  # fmt: skip

    def _append(self, item: Round, num_kept: int, top: TopTokens) -> None:
        request, proposal = item.request, item.proposal
        entry = self._open.setdefault(request.request_id, _Open())
        first = len(request.tokens) - num_kept
        if not entry.count:
            entry.first = first
        version = proposal.version  # what was matched, not drafted by a model, says nothing about a draft
        judged = proposal.tokens if version is not None else []
        if version is not None and (not entry.versions or entry.versions[-1].version != version):
            if entry.versions and entry.versions[-1].start == first:
                entry.versions.pop()  # carried over from the last flush, and drafted nothing since
            entry.versions.append(VersionSpan(first, version))
        for j in range(num_kept):
            drafted = j < len(judged)
            verdict = Verdict.UNDRAFTED if not drafted else Verdict(int(j < item.num_accepted))
            entry.verdicts.append(verdict)
            entry.draft_ids.append(judged[j] if drafted else 0)
            entry.draft_logprobs.append(proposal.logprobs[j] if drafted else 0.0)
        entry.topk_ids.append(top.ids[:num_kept])
        entry.topk_logprobs.append(top.logprobs[:num_kept])
        entry.count += num_kept
        if entry.count >= self._settings.flush_tokens:
            self._flush(request)

    def _flush(self, request: Sequence) -> None:
        """Publish the open records; they cover consecutive positions by construction."""
        entry = self._open.get(request.request_id)
        if entry is None or not entry.count:
            return
        kept = self._kept(request, entry)
        last = entry.first + entry.count
        versions = entry.versions[-1:]
        self._open[request.request_id] = _Open(versions=[VersionSpan(last, item.version) for item in versions])
        if not kept.any():
            return
        begin = max(0, entry.first - self._settings.max_context_tokens)
        ids, logprobs = np.concatenate(entry.topk_ids)[kept], np.concatenate(entry.topk_logprobs)[kept]
        tail = 1.0 - np.exp(logprobs.astype("<f4")).sum(-1)
        self._publisher.offer(
            keys.BLOCKS,
            VerifiedBlock(
                schema=SCHEMA_VERSION, request_id=request.request_id, segment=request.segment,
                target_fingerprint=self._fingerprint, coupling=self._coupling, sampling=request.sampling,
                prompt_tokens=request.prompt_tokens, first_position=begin, versions=tuple(entry.versions),
                top_k=ids.shape[1], token_ids=np.array(request.tokens[begin:last], "<u4").tobytes(),
                positions=np.arange(entry.first, last, dtype="<u4")[kept].tobytes(),
                verdicts=np.array(entry.verdicts, "u1")[kept].tobytes(),
                draft_ids=np.array(entry.draft_ids, "<u4")[kept].tobytes(),
                draft_logprobs=np.array(entry.draft_logprobs, "<f4")[kept].tobytes(), topk_ids=ids.tobytes(),
                topk_logprobs=logprobs.tobytes(), tail_mass=np.clip(tail, 0, 1).astype("<f4").tobytes(),
                logged_at_s=self._clock(), tenant=request.tenant, keep_probability=self._settings.accepted_share,
            ),
        )  # fmt: skip

    def _kept(self, request: Sequence, entry: _Open) -> NDArray[np.bool_]:
        """Say which of the open records are written down.  Shapes: result [count]."""
        if self._settings.accepted_share >= 1:
            return np.ones(entry.count, bool)
        key = int.from_bytes(hashlib.sha256(request.request_id.encode()).digest()[:16], "little")
        # position p has the p-th draw of its request, wherever a flush falls
        drawn = np.random.Generator(np.random.Philox(key=key, counter=0)).random(entry.first + entry.count)
        rejected = np.array(entry.verdicts, "u1") == Verdict.REJECTED
        return rejected | (drawn[entry.first :] < self._settings.accepted_share)
