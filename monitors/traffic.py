"""The last requests in a few numbers: lengths, temperature, acceptance, what was found cached.

A bounded window over request outcomes, for advice.  Knows no versions' roles and no alerts; the
watcher feeds it and reads it.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque

import msgspec

from adapter.contracts import Counts, RequestOutcome

_WINDOW = 2000  # requests looked back on


class SegmentTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """One segment's requests; `counts` are the draft model's rounds."""

    requests: int
    counts: Counts


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """What the last requests looked like.

    Medians are over requests.  `counts` are the draft model's rounds, `matched` those of matching
    proposers; `accepted_share` says for each position of a draft in what share of rounds its token was kept,
    rounds whose draft was shorter included: under an adaptive controller it is no chance of being kept.
    """

    requests: int
    speculated: int
    prompt_tokens: int
    cached_tokens: int
    delivered_tokens: int
    median_prompt: float
    median_delivered: float
    median_temperature: float
    counts: Counts
    matched: Counts
    accepted_share: tuple[float, ...]
    segments: dict[str, SegmentTraffic]

    @property
    def prefill_ratio(self) -> float | None:
        """Prompt tokens that had to be computed for each token delivered."""
        return (self.prompt_tokens - self.cached_tokens) / self.delivered_tokens if self.delivered_tokens else None

    @property
    def cached_share(self) -> float | None:
        """Share of prompt tokens found in the prefix cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None


class TrafficWindow:
    """Keeps the last outcomes and sums them up when asked."""

    def __init__(self, size: int = _WINDOW) -> None:
        self._outcomes: deque[RequestOutcome] = deque(maxlen=size)

    def add(self, outcome: RequestOutcome) -> None:
        """Take in a finished request; cancelled and failed ones say nothing about lengths."""
        if outcome.finish_reason in ("stop", "length"):
            self._outcomes.append(outcome)

    def summarise(self) -> Traffic | None:
        """Sum up the window, or None while it is empty."""
        rows = list(self._outcomes)
        if not rows:
            return None
        counts = sum((row.counts for row in rows), Counts())
        accepted: Counter[int] = Counter()
        by_segment: dict[str, list[RequestOutcome]] = {}
        for row in rows:
            accepted.update(dict(enumerate(row.accepted_by_position)))
            by_segment.setdefault(row.segment, []).append(row)
        positions = range(max(accepted, default=-1) + 1)
        return Traffic(
            requests=len(rows), speculated=sum(bool(row.counts.num_drafted) for row in rows),
            prompt_tokens=sum(row.prompt_tokens for row in rows), cached_tokens=sum(row.cached_tokens for row in rows),
            delivered_tokens=sum(row.delivered_tokens for row in rows),
            median_prompt=statistics.median(row.prompt_tokens for row in rows),
            median_delivered=statistics.median(row.delivered_tokens for row in rows),
            median_temperature=statistics.median(row.sampling.temperature for row in rows),
            counts=counts, matched=sum((row.unversioned for row in rows), Counts()),
            accepted_share=tuple(accepted[i] / counts.num_rounds for i in positions) if counts.num_rounds else (),
            segments={
                name: SegmentTraffic(requests=len(mine), counts=sum((row.counts for row in mine), Counts()))
                for name, mine in sorted(by_segment.items())
            },
        )  # fmt: skip
