"""Does a version that is kept already know this traffic?  Then going back to it beats training.

Any draft can be scored on logged text by teacher forcing, so every kept version is, on the newest blocks: none
of them was trained on these.  One fits where its gain over what is live is certain and large enough to matter;
what more a training could bring, the next one may.  The gate then judges it like any candidate.  Called by
`distill.job`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from adapter.contracts import ArtifactError, VerifiedBlock
from adapter.versions import AuditEntry, Draft
from distill.resampling import ratio_interval, sum_by
from distill.scoring import weighted_mean
from distill.verdict import Scores

log = structlog.get_logger(__name__)

MOST_KEPT = 8
_RECORDS = 4096
_TAKEN_BACK_S = 86400.0


class Scorer(Protocol):
    """Scores stored drafts on blocks."""

    def scores(self, sha256: str | None, blocks: Sequence[VerifiedBlock]) -> Scores:
        """Return the acceptance of every record; None is the base draft."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How one kept version does on the newest blocks: its acceptance, the live one's, and the gain's interval."""

    draft: Draft
    acceptance: float
    live: float
    interval: tuple[float, float]

    @property
    def sentence(self) -> str:
        """Say it in words."""
        low, high = self.interval
        gain = self.acceptance - self.live
        return (
            f"v{self.draft.version} knows this traffic: acceptance {self.live:.3f} → {self.acceptance:.3f} "
            f"({gain:+.3f} [{low:+.3f}, {high:+.3f}]) on the newest requests"
        )


def kept_versions(
    drafts: Sequence[Draft], live: int, audit: Sequence[AuditEntry] = (), *, now_s: float = 0.0
) -> list[Draft]:
    """Return the versions worth a look, newest first: they passed their gate and are neither live nor forbidden.

    One that was taken back automatically within the last day, as `audit` tells, gets no second chance yet.
    """
    taken_back = {
        row.from_version
        for row in audit
        if row.verb == "roll_back" and row.automatic and now_s - row.at_s < _TAKEN_BACK_S
    }
    known = [draft for draft in drafts if draft.state == "ready" and draft.artifact_sha256 and draft.version != live]
    return [draft for draft in known if draft.version not in taken_back][:MOST_KEPT]


def newest_blocks(blocks: Sequence[VerifiedBlock], segments: Sequence[str] = ()) -> list[VerifiedBlock]:
    """Return the newest blocks, of `segments` where some are named, up to 4,096 records."""
    chosen: list[VerifiedBlock] = []
    records = 0
    for block in sorted(blocks, key=lambda block: -block.logged_at_s):
        if segments and block.segment not in segments:
            continue
        if records + block.num_records > _RECORDS and chosen:
            break
        chosen.append(block)
        records += block.num_records
    return chosen


def best_fit(
    scorer: Scorer, versions: Sequence[Draft], live: str | None, blocks: Sequence[VerifiedBlock], *, min_gain: float,
    confidence: float, seed: int,
) -> Fit | None:  # fmt: skip
    """Return the version with the largest certain gain of at least `min_gain`; None where no version fits.

    The confidence is shared by all versions that are looked at (Bonferroni).  One that cannot be loaded any more is
    left out.
    """
    if not versions or not blocks:
        return None
    under_live, found = scorer.scores(live, blocks), []
    for draft in versions:
        try:
            own = scorer.scores(draft.artifact_sha256, blocks)
        except ArtifactError as error:
            log.warning("kept_version_left_out", version=draft.version, reason=str(error))
            continue
        fit = _compare(draft, blocks, own, under_live, 1 - (1 - confidence) / len(versions), seed)
        if fit.interval[0] > 0 and fit.acceptance - fit.live >= min_gain:
            found.append(fit)
    return max(found, key=lambda fit: fit.acceptance, default=None)


def _compare(
    draft: Draft, blocks: Sequence[VerifiedBlock], own: Scores, live: Scores, confidence: float, seed: int
) -> Fit:
    weights = [block.row_weights() for block in blocks]
    sums = sum_by(
        [block.request_id for block in blocks],
        [float(w @ (a - b)) for w, a, b in zip(weights, own, live, strict=True)],
        [float(w.sum()) for w in weights],
    )
    interval = ratio_interval(sums[:, 0], sums[:, 1], confidence=confidence, seed=seed)
    acceptance, under_live = weighted_mean(blocks, own), weighted_mean(blocks, live)
    return Fit(draft, acceptance or 0.0, under_live or 0.0, interval)
