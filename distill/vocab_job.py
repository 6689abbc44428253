"""The draft's vocabulary, chosen anew from what was served and judged by the gate that judges drafts.

A vocabulary of the same size costs the same, so all that counts is how often the draft in force is right with
it: a candidate passes as a draft version does, on the same held-out requests and the same anchor set.  Called by
`distill.job` after every job that reached its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog
import torch
from sqlalchemy import Connection, Engine

from adapter.contracts import ArtifactError, RegistryError, SettingsError
from adapter.draft_vocab import load_vocab
from adapter.hints import announcer
from adapter.pairs import Pair
from adapter.settings import Settings
from adapter.token_counts import read_counts
from adapter.vocab_registry import LiveVocab, Vocabularies
from adapter.vocab_selection import build_vocab, target_vocab_size
from distill.evidence import Evidence
from distill.gate import StoredDrafts
from distill.verdict import Anchor, compare

log = structlog.get_logger(__name__)

_ACTOR = "trainer"


def allowed_tokens(settings: Settings, pair: Pair, sha256: str | None) -> torch.Tensor | None:
    """Return the ids of a stored vocabulary, int64, ascending; None where the draft scores all tokens.

    Raises:
        ArtifactError: it must not be used.
    """
    if not settings.engine.draft_vocab_size or sha256 is None:
        return None
    ids = load_vocab(
        settings.vocabularies_dir, sha256, target_fingerprint=pair.target_fingerprint,
        vocab_size=target_vocab_size(pair),
    )  # fmt: skip
    return torch.from_numpy(ids.astype("int64"))


def renew_vocabulary(
    settings: Settings, engine: Engine, evidence: Evidence, draft: str | None, live: LiveVocab, in_force: StoredDrafts,
    fence: Callable[[Connection], None],
) -> dict[str, Any] | None:  # fmt: skip
    """Choose, judge and, where it passes, promote a vocabulary; return what was judged, None where nothing was.

    `draft` is the artifact in force, None for the base draft; `in_force` scores with the live vocabulary and mostly
    has done so already.  Nothing is touched without automatic promotion, nor
    where counts are missing; what cannot work is logged and never fails the job.
    """
    registry = Vocabularies(engine, announce=announcer(settings))
    pair = in_force.pair
    try:
        counts = read_counts(settings.vocabularies_dir)
        if live.sha256 is None or counts is None or not counts.segments or not settings.monitors.auto_promote:
            return None
        manifest = build_vocab(settings.vocabularies_dir, pair, counts, settings.engine.draft_vocab_size)
        if manifest.sha256 == live.sha256:
            return None
        gate = _judge(settings, evidence, draft, in_force, manifest.sha256)
        if gate["passed"]:
            with engine.begin() as connection:
                fence(connection)
            registry.expect(live.generation)
            row = registry.publish(manifest, actor=_ACTOR, reason=gate["verdict"], automatic=True)
            registry.promote(
                row.number, actor=_ACTOR, reason=gate["verdict"], automatic=True,
                expected_generation=live.generation, evidence=gate,
            )  # fmt: skip
            gate["number"] = row.number
    except (ArtifactError, RegistryError, SettingsError) as error:
        log.warning("vocabulary_not_renewed", reason=str(error))
        return None
    log.info("vocabulary_judged", passed=gate["passed"], verdict=gate["verdict"])
    return gate


def _judge(
    settings: Settings, evidence: Evidence, draft: str | None, in_force: StoredDrafts, new: str
) -> dict[str, Any]:
    allowed = allowed_tokens(settings, in_force.pair, new)
    candidate = StoredDrafts(in_force.pair, settings.artifacts_dir, in_force.rules, allowed)
    anchor = None
    if evidence.anchor:
        before = in_force.scores(draft, evidence.anchor)
        anchor = Anchor(evidence.anchor, candidate.scores(draft, evidence.anchor), before)
    after, before = candidate.scores(draft, evidence.gate), in_force.scores(draft, evidence.gate)
    return compare(evidence.gate, after, {"live": before}, in_force.rules, anchor=anchor)
