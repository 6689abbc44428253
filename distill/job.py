"""One job from its evidence to a verdict: go back to a version that knows this traffic, or train a new one.

Evidence is collected and split; kept versions are scored on its newest blocks; where none fits, candidates are
trained, the best one is stored, loaded again and judged.  Whatever happens is decided under the job's fence, and
a job that was killed between publishing and reporting only reports.  Never loads the target.  Called by
`distill.trainer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog
import torch
from safetensors.torch import save_file
from sqlalchemy import Connection, Engine

from adapter import artifacts
from adapter.contracts import FLOOR_VERSION, ArtifactError
from adapter.facts import CHAMPIONS, ENGINE, Facts
from adapter.jobs import Job, Jobs
from adapter.lora import load_factors
from adapter.models import load_draft
from adapter.pairs import Pair, expected_tensors, pair_from_facts
from adapter.registry import Registry
from adapter.settings import Settings
from adapter.versions import Draft, Live
from adapter.vocab_registry import LiveVocab, Vocabularies
from distill.assignment import Assignment
from distill.evidence import Evidence, choose, collect
from distill.factors import Factors
from distill.gate import StoredDrafts, judge
from distill.goodput import costs_of
from distill.kept import Fit, best_fit, kept_versions, newest_blocks
from distill.ranks import Ranks
from distill.tuning import Material, Progress, TrainingError, Tuned, train
from distill.verdict import CHAMPION, GateRules, Scores
from distill.vocab_job import allowed_tokens, renew_vocabulary

log = structlog.get_logger(__name__)

Emit = Callable[[dict[str, Any]], None]
_ACTOR = "trainer"
_MOST_LOOKS = 8  # most of what judged longer ago has been replaced by newer requests


def run_job(
    settings: Settings, engine: Engine, job_id: str, epoch: int, emit: Emit, clock: Callable[[], float] = time.time,
    ranks: Ranks | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Find or train a version and judge it; return what goes into the job's result.

    Only rank 0 of `ranks` calls this; the others help with the training itself (`distill.assignment`).

    Raises:
        TrainingError: it cannot work, now or later.
        RegistryError: the job was taken over or cancelled; nothing was published.
    """
    began = clock()
    registry, jobs = Registry(engine), Jobs(engine)
    pair = pair_from_facts(Facts(engine))
    if pair is None or pair.draft_kind == "none":
        raise TrainingError("no draft is served from this data folder; start `draftsmith serve` with a draft first")
    fence = jobs.fence(job_id, epoch)
    with engine.execution_options(readonly=True).begin() as connection:
        fence(connection)
    for draft in registry.drafts():
        if draft.job_id == job_id:  # killed between publishing and reporting
            action = "admit" if draft.state == "ready" and not draft.gate.get("passed", True) else "train"
            return _result(action, draft, draft.gate, clock() - began, compared_with=draft.parent)
    folder = settings.data_dir / "jobs" / job_id
    folder.mkdir(parents=True, exist_ok=True)
    evidence = choose(folder, collect(settings, pair, clock), settings)
    run = _Run(
        settings, engine, pair, evidence, registry.drafts(), registry.live(), Vocabularies(engine).live(),
        jobs.get(job_id), folder, ranks or Ranks.alone(),
    )  # fmt: skip
    fit = run.look_back(clock())
    if fit is not None:
        gate = run.judge(fit.draft.artifact_sha256 or "", None)
        gate["verdict"] = f"{fit.sentence}; {gate['verdict']}"
        if gate["passed"]:
            return _result("switch", fit.draft, gate, clock() - began, compared_with=run.live.live)
        if gate["wins"] and settings.engine.alternates and fit.draft.version not in run.live.alternates:
            return _result("admit", fit.draft, gate, clock() - began, compared_with=run.live.live)
        log.info("kept_version_not_taken", version=fit.draft.version, verdict=gate["verdict"])
    tuned, scores = run.tune(emit)
    trained_on = evidence.summary() | _account(tuned)
    manifest = run.store(tuned.factors, trained_on, clock())
    gate = run.judge(manifest.sha256, scores)
    beside = bool(not gate["passed"] and gate["wins"] and settings.engine.alternates)
    draft = registry.publish(
        parent=run.live.live, state="ready" if gate["passed"] or beside else "rejected",
        artifact_sha256=manifest.sha256, artifact_bytes=manifest.size_bytes, trained_on=trained_on, gate=gate,
        reason=gate["verdict"], job_id=job_id, actor=_ACTOR, fence=fence,
    )  # fmt: skip
    if draft.state == "ready":
        run.mark()
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    vocabulary = run.renew_vocabulary(fence)
    result = _result("admit" if beside else "train", draft, gate, clock() - began, compared_with=run.live.live)
    return result if vocabulary is None else result | {"vocabulary": vocabulary}


@dataclass(slots=True)
class _Run:
    """What one job works with."""

    settings: Settings
    engine: Engine
    pair: Pair
    evidence: Evidence
    drafts: list[Draft]
    live: Live
    vocabulary: LiveVocab
    job: Job
    folder: Path
    ranks: Ranks
    _stored: StoredDrafts | None = None

    @property
    def live_sha256(self) -> str | None:
        return self.live.artifacts.get(self.live.live)

    @property
    def stored(self) -> StoredDrafts:
        """Stored drafts as serving loads them; opened when first asked for."""
        if self._stored is None:
            self._stored = StoredDrafts(self.pair, self.settings.artifacts_dir, self.rules(), self.allowed())
        return self._stored

    def look_back(self, now_s: float) -> Fit | None:
        """Return a kept version that knows the newest traffic, of the drifting segments where some are, or None."""
        settings = self.settings.distill
        kept = kept_versions(self.drafts, self.live.live, Registry(self.engine).audit(200), now_s=now_s)
        return best_fit(
            self.stored, kept, self.live_sha256, newest_blocks(self.evidence.fresh, self.job.segments),
            min_gain=settings.switch_min_gain, confidence=settings.gate_confidence, seed=settings.seed,
        )  # fmt: skip

    def tune(self, emit: Emit) -> tuple[Tuned, Scores]:
        """Train; return the result and how the unmerged factors score on the gate's blocks."""
        found = self.evidence
        assignment = Assignment(
            pair=self.pair, judged=found.gate, coupling=self.settings.engine.coupling, allowed=self.allowed(),
            material=Material(fresh=found.fresh, replay=found.replay, validation=found.validation),
            start=self._live_factors(), checkpoint=self.folder / "checkpoint.pt",
        )  # fmt: skip
        self.ranks.hand_out(assignment)
        model = load_draft(self.pair, torch.float32)
        tuned = train(
            model, self.pair.lora_shapes, assignment.material, self.settings.distill, **assignment.terms,
            report=_Throttle(emit), ranks=self.ranks, clock=_clock(self.ranks),
        )  # fmt: skip
        return tuned, assignment.score(model, self.ranks)

    def store(self, factors: Factors, trained_on: dict[str, Any], now: float) -> artifacts.Manifest:
        """Write the artifact."""
        settings, path = self.settings, self.folder / "adapter.safetensors"
        save_file({name: value.contiguous() for name, value in factors.items()}, path)
        return artifacts.store(
            settings.artifacts_dir, path, target_fingerprint=self.pair.target_fingerprint,
            base_fingerprint=self.pair.base_fingerprint, rank=settings.distill.rank,
            scale=settings.distill.alpha / settings.distill.rank, trained_on=trained_on, created_at_s=now,
        )  # fmt: skip

    def judge(self, candidate: str, trainer_scores: Scores | None) -> dict[str, Any]:
        """Ask the gate about an artifact."""
        costs = costs_of(Facts(self.engine).get(ENGINE), self.settings.engine.gamma_max)
        return judge(
            self.pair, self.settings.artifacts_dir, candidate=candidate, references=self._references(),
            blocks=self.evidence.gate, anchor=self.evidence.anchor, rules=self.rules(), trainer_scores=trainer_scores,
            costs=costs, drafts=self.stored,
        )  # fmt: skip

    def rules(self) -> GateRules:
        """Read the gate's rules; blocks that judged candidates which failed since the last pass judge once more."""
        settings = self.settings.distill
        failed = 0
        for draft in self.drafts[:_MOST_LOOKS]:  # newest first
            if draft.state != "rejected":
                break
            failed += 1
        return GateRules(
            coupling=self.settings.engine.coupling, min_gain=settings.gate_min_gain,
            confidence=settings.gate_confidence, min_requests=settings.gate_min_requests,
            segment_margin=self.settings.monitors.guard_margin, max_norm_ratio=self.settings.engine.max_lora_norm_ratio,
            seed=settings.seed, anchor_margin=settings.gate_anchor_margin,
            goodput_margin=settings.gate_goodput_margin, parity_margin=settings.gate_parity_margin, looks=1 + failed,
        )  # fmt: skip

    def allowed(self) -> torch.Tensor | None:
        """Return the ids of the draft vocabulary in force, ascending; None where all tokens are scored."""
        return allowed_tokens(self.settings, self.pair, self.vocabulary.sha256)

    def renew_vocabulary(self, fence: Callable[[Connection], None]) -> dict[str, Any] | None:
        """Judge the vocabulary that the newest traffic would choose, under the draft that is live."""
        return renew_vocabulary(
            self.settings, self.engine, self.evidence, self.live_sha256, self.vocabulary, self.stored, fence
        )

    def mark(self) -> None:
        """Remember that the evidence went into a version that passed."""
        self.evidence.mark()

    def _references(self) -> dict[str, str | None]:
        """Return what the candidate is compared with: live, floor, and the champion of each segment."""
        found: dict[str, str | None] = {"live": self.live_sha256, "floor": None}
        known = {draft.version: draft.artifact_sha256 for draft in self.drafts if draft.state == "ready"}
        for segment, champion in (Facts(self.engine).get(CHAMPIONS) or {}).items():
            version = champion.get("version")
            if version in known and version != FLOOR_VERSION:
                found[CHAMPION + segment] = known[version]
        return found

    def _live_factors(self) -> Factors | None:
        """Return what is live as a starting point, or None when it has none of this rank."""
        settings, live = self.settings.distill, self.live_sha256
        if live is None:
            return None
        try:
            manifest = artifacts.load_manifest(self.settings.artifacts_dir, live)
            if manifest.rank != settings.rank:
                return None
            path = artifacts.verify(
                self.settings.artifacts_dir, live, target_fingerprint=self.pair.target_fingerprint,
                base_fingerprint=self.pair.base_fingerprint, expected=expected_tensors(self.pair, manifest.rank),
            )  # fmt: skip
        except ArtifactError as error:
            log.warning("warm_start_impossible", error=str(error))
            return None
        ratio = manifest.scale / (settings.alpha / settings.rank)
        return {name: value * ratio if name.endswith("lora_B") else value for name, value in load_factors(path).items()}


def _account(tuned: Tuned) -> dict[str, Any]:
    return {
        "tokens": tuned.tokens,
        "steps": tuned.steps,
        "seconds": round(tuned.seconds, 3),
        "learning_rate": tuned.learning_rate,
        "rates": tuned.rates,
        "curve": tuned.curve,
        "validation_before": tuned.acceptance_before,
        "validation_after": tuned.acceptance_after,
    }


def _result(
    action: str, draft: Draft, gate: dict[str, Any], seconds: float, *, compared_with: int | None
) -> dict[str, Any]:
    return {
        "action": action,
        "version": draft.version,
        "state": draft.state,
        "verdict": gate.get("verdict", draft.reason),
        "seconds": round(seconds, 3),
        "blocks": draft.trained_on.get("blocks", 0) if action != "switch" else 0,
        "tokens": draft.trained_on.get("tokens", 0) if action != "switch" else 0,
        "compared_with": compared_with,
        "gate": gate,
    }


def _clock(ranks: Ranks) -> Callable[[], float]:
    """Return a clock of computing, which stands still while serving goes first; one process of several waits, too."""
    return time.thread_time if ranks.size == 1 else time.monotonic


class _Throttle:
    """Pass progress on at most twice a second, and always the last step."""

    def __init__(self, emit: Emit, every_s: float = 0.5) -> None:
        self._emit, self._every_s, self._last = emit, every_s, float("-inf")

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= self._every_s or progress.step == progress.steps:
            self._last = now
            self._emit(msgspec.to_builtins(progress))
