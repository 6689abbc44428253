"""The offline gate: would the candidate be accepted more often than what is live, on the same positions?

Every draft is loaded from its stored file and merged by the code that serving uses (`adapter.lora`), with the
weights rounded to the pair's dtype and the arithmetic in float32.  What acceptance is, `distill.scoring` says;
what must be shown, `distill.verdict`.  Called by `distill.job`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import torch
from numpy.typing import NDArray

from adapter.contracts import ArtifactError, VerifiedBlock
from adapter.lora import base_weights, merge, merge_artifact
from adapter.models import DTYPES, load_draft
from adapter.pairs import Pair
from distill.goodput import Costs
from distill.scoring import score_blocks
from distill.verdict import CHAMPION, Anchor, GateRules, Scores, compare, unscored

log = structlog.get_logger(__name__)


def judge(
    pair: Pair,
    root: Path,
    *,
    candidate: str,
    references: dict[str, str | None],
    blocks: Sequence[VerifiedBlock],
    anchor: Sequence[VerifiedBlock] = (),
    rules: GateRules,
    trainer_scores: Scores | None = None,
    costs: Costs | None = None,
    allowed: torch.Tensor | None = None,
    drafts: StoredDrafts | None = None,
) -> dict[str, Any]:
    """Compare an artifact of `root` with others (None is the base draft) on held-out blocks.

    A draft is scored once, whatever names it goes by.  A champion that cannot be loaded any more is left out, a
    candidate that cannot be is rejected, and without live there is nothing to beat: undecided.

    Args:
        references: "live", "floor" and "champion:<segment>", each with an artifact's hash.
        trainer_scores: what `score_blocks` gave for the trainer's own float32 factors, unmerged, on `blocks`.
        allowed: ids of the trimmed draft vocabulary in force, int64, ascending.
        drafts: what was opened before for the same pair; whatever it scored already is not scored again.

    The result is JSON, what `distill.verdict.compare` returns and `sha256` by name: to be kept with the version.
    """
    drafts = drafts or StoredDrafts(pair, root, rules, allowed)
    names = {"sha256": {"candidate": candidate, **references}}
    try:
        own, own_anchor = drafts.scores(candidate, blocks), drafts.scores(candidate, anchor)
    except ArtifactError as error:
        return unscored("rejected", str(error)) | names
    live = references["live"]
    try:
        scores, live_anchor = {"live": drafts.scores(live, blocks)}, drafts.scores(live, anchor)
    except ArtifactError as error:
        return unscored("undecided", f"what is live cannot be loaded, so there is nothing to beat: {error}") | names
    for name, sha256 in references.items():
        if sha256 == live:
            continue
        try:
            scores[name] = drafts.scores(sha256, _asked(name, blocks))
        except ArtifactError as error:
            log.warning("gate_reference_not_loaded", reference=name, error=str(error))
    anchored = Anchor(anchor, own_anchor, live_anchor) if anchor else None
    return compare(blocks, own, scores, rules, anchor=anchored, trainer=trainer_scores, costs=costs) | names


def _asked(name: str, blocks: Sequence[VerifiedBlock]) -> list[VerifiedBlock]:
    """Return the blocks a reference is compared on: all, or those of the segment whose champion it is."""
    if not name.startswith(CHAMPION):
        return list(blocks)
    return [block for block in blocks if block.segment == name.removeprefix(CHAMPION)]


@dataclass
class StoredDrafts:
    """Scores drafts, loaded as serving loads them; one model in memory, no block scored twice by the same draft."""

    pair: Pair
    root: Path
    rules: GateRules
    allowed: torch.Tensor | None
    model: Any = field(init=False)
    pristine: dict[str, torch.Tensor] = field(init=False)
    _loaded: list[str | None] = field(init=False, default_factory=list)  # empty: nothing is merged
    _known: dict[tuple[str | None, int], tuple[VerifiedBlock, NDArray[Any]]] = field(
        init=False,
        default_factory=dict,  # blocks are kept, so that no other one can get the id of one that is gone
    )

    def __post_init__(self) -> None:
        self.model = load_draft(self.pair, DTYPES[self.pair.dtype])
        self.pristine = base_weights(self.model, list(self.pair.lora_shapes))

    def scores(self, sha256: str | None, blocks: Sequence[VerifiedBlock]) -> Scores:
        """Return the acceptance of every record under one draft."""
        new = [block for block in blocks if (sha256, id(block)) not in self._known]
        if new:
            self._load(sha256)
            head = self.model.get_output_embeddings().weight.detach()
            found = score_blocks(self.model, head, new, self.rules.coupling, self.allowed)
            self._known |= {(sha256, id(block)): (block, part) for block, part in zip(new, found, strict=True)}
        return [self._known[sha256, id(block)][1] for block in blocks]

    def _load(self, sha256: str | None) -> None:
        if self._loaded == [sha256]:
            return
        self._loaded = []
        self.model.to(DTYPES[self.pair.dtype])
        if sha256 is None:
            merge(self.model, self.pristine, {}, 1.0)
        else:
            merge_artifact(
                self.model, self.pristine, self.pair, self.root, sha256, max_norm_ratio=self.rules.max_norm_ratio
            )
        self.model.float()
        self._loaded = [sha256]
