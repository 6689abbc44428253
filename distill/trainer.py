"""One training, from the logged blocks to a published version, in a process of its own.

`python -m distill.trainer --job ID --epoch N` is exec'd by the worker with a pipe as stdin and exits
when that pipe closes; run by hand it needs a terminal there.  It reads settings from the environment,
never loads the target, prints JSON lines to stdout (progress, at last {"result": …}) and words to
stderr.  Exit status: 0 published, 2 it would fail again, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import structlog
import torch
from safetensors.torch import save_file
from sqlalchemy import Engine
from transformers.utils import logging as transformers_logging

from adapter import artifacts, keys
from adapter.contracts import ArtifactError, DraftsmithError, VerifiedBlock
from adapter.cores import step_aside, taking
from adapter.database import open_database
from adapter.facts import Facts
from adapter.jobs import Jobs
from adapter.lora import load_factors
from adapter.models import load_draft
from adapter.pairs import Pair, expected_tensors, pair_from_facts, read_config
from adapter.registry import Registry
from adapter.settings import Settings, load_settings
from adapter.streams import StreamReader, connect
from adapter.versions import Draft
from distill.gate import GateRules, judge, score_blocks
from distill.intake import defect_of, drain
from distill.replay import ReplayError, ReplayStore
from distill.selection import Selection, select
from distill.tuning import Factors, Material, Progress, TrainingError, Tuned, train

log = structlog.get_logger(__name__)

Emit = Callable[[dict[str, Any]], None]
FINAL_ERROR = 2
_REDIS_TIMEOUT_S = 5.0
_ACTOR = "trainer"


def run_job(
    settings: Settings, engine: Engine, job_id: str, epoch: int, emit: Emit, clock: Callable[[], float] = time.time
) -> dict[str, Any]:
    """Train, gate and publish one version; return what goes into the job's result.

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
            return _result(draft, seconds=clock() - began)
    folder = settings.data_dir / "jobs" / job_id
    folder.mkdir(parents=True, exist_ok=True)
    store = collect(settings, pair)
    chosen = _selection(folder, store, settings)
    live = registry.live()
    blocks = {name: _load(store, getattr(chosen, name)) for name in ("fresh", "replay", "validation", "gate")}
    tuned, score = _tune(settings, pair, live.artifacts.get(live.live), blocks, folder, emit)
    trained_on = _trained_on(blocks, tuned)
    manifest = _export(settings, pair, tuned.factors, folder, trained_on, clock())
    gate = judge(
        pair,
        settings.artifacts_dir,
        candidate=manifest.sha256,
        live=live.artifacts.get(live.live),
        blocks=blocks["gate"],
        rules=gate_rules(settings),
        trainer_score=score,
    )
    draft = registry.publish(
        parent=live.live,
        state="ready" if gate["passed"] else "rejected",
        artifact_sha256=manifest.sha256,
        artifact_bytes=manifest.size_bytes,
        trained_on=trained_on,
        gate=gate,
        reason=gate["verdict"],
        job_id=job_id,
        actor=_ACTOR,
        fence=fence,
    )
    if gate["passed"]:
        store.mark(chosen.newest)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return _result(draft, seconds=clock() - began)


def collect(settings: Settings, pair: Pair) -> ReplayStore:
    """Move what was logged since into the replay store; with Redis down, open what is on disk."""
    store = ReplayStore(settings.replay_dir, max_blocks=settings.distill.max_blocks)
    client = connect(settings.redis, _REDIS_TIMEOUT_S)
    vocab_size = int(read_config(Path(pair.target_path))["vocab_size"])
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


def gate_rules(settings: Settings) -> GateRules:
    """Read the gate's rules from the settings."""
    return GateRules(
        coupling=settings.engine.coupling,
        min_gain=settings.distill.gate_min_gain,
        confidence=settings.distill.gate_confidence,
        min_requests=settings.distill.gate_min_requests,
        segment_margin=settings.monitors.guard_margin,
        max_norm_ratio=settings.engine.max_lora_norm_ratio,
        seed=settings.distill.seed,
    )


def _selection(folder: Path, store: ReplayStore, settings: Settings) -> Selection:
    """Choose blocks once a job: a retry that trained on other blocks could not use its checkpoint."""
    path = folder / "selection.json"
    known = {ref.sequence for ref in store.refs}
    try:
        chosen = msgspec.json.decode(path.read_bytes(), type=Selection)
        if known.issuperset((*chosen.fresh, *chosen.replay, *chosen.validation, *chosen.gate)):
            return chosen
    except (OSError, msgspec.MsgspecError):
        pass
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    chosen = select(store, settings.distill)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.encode(chosen))
    os.replace(temporary, path)
    return chosen


def _load(store: ReplayStore, sequences: Iterable[int]) -> list[VerifiedBlock]:
    refs = {ref.sequence: ref for ref in store.refs}
    return [store.load(refs[sequence]) for sequence in sequences]


def _tune(
    settings: Settings, pair: Pair, live: str | None, blocks: dict[str, list[VerifiedBlock]], folder: Path, emit: Emit
) -> tuple[Tuned, float | None]:
    """Train; return the result and the trainer's own score of the unmerged factors on the gate's blocks."""
    model = load_draft(pair, torch.float32)
    tuned = train(
        model,
        pair.lora_shapes,
        Material(fresh=blocks["fresh"], replay=blocks["replay"], validation=blocks["validation"]),
        settings.distill,
        coupling=settings.engine.coupling,
        start=_live_factors(settings, pair, live),
        checkpoint=folder / "checkpoint.pt",
        report=_Throttle(emit),
    )
    head = model.get_output_embeddings().weight.detach()
    scores = score_blocks(model, head, blocks["gate"], settings.engine.coupling)
    joined = torch.cat([torch.from_numpy(part) for part in scores]) if scores else torch.empty(0)
    return tuned, float(joined.mean()) if len(joined) else None


def _live_factors(settings: Settings, pair: Pair, live: str | None) -> Factors | None:
    """Return what is live as a starting point, or None when it has none of this rank."""
    if live is None:
        return None
    try:
        manifest = artifacts.load_manifest(settings.artifacts_dir, live)
        if manifest.rank != settings.distill.rank:
            return None
        path = artifacts.verify(
            settings.artifacts_dir,
            live,
            target_fingerprint=pair.target_fingerprint,
            base_fingerprint=pair.base_fingerprint,
            expected=expected_tensors(pair, manifest.rank),
        )
    except ArtifactError as error:
        log.warning("warm_start_impossible", error=str(error))
        return None
    ratio = manifest.scale / (settings.distill.alpha / settings.distill.rank)
    return {name: value * ratio if name.endswith("lora_B") else value for name, value in load_factors(path).items()}


def _export(
    settings: Settings, pair: Pair, factors: Factors, folder: Path, trained_on: dict[str, Any], now: float
) -> artifacts.Manifest:
    path = folder / "adapter.safetensors"
    save_file({name: value.contiguous() for name, value in factors.items()}, path)
    return artifacts.store(
        settings.artifacts_dir,
        path,
        target_fingerprint=pair.target_fingerprint,
        base_fingerprint=pair.base_fingerprint,
        rank=settings.distill.rank,
        scale=settings.distill.alpha / settings.distill.rank,
        trained_on=trained_on,
        created_at_s=now,
    )


def _trained_on(blocks: dict[str, list[VerifiedBlock]], tuned: Tuned) -> dict[str, Any]:
    learned = blocks["fresh"] + blocks["replay"]
    segments: dict[str, int] = {}
    for block in learned:
        segments[block.segment] = segments.get(block.segment, 0) + 1
    return {
        "blocks": len(learned),
        "fresh_blocks": len(blocks["fresh"]),
        "requests": len({block.request_id for block in learned}),
        "records": sum(block.num_records for block in learned),
        "tokens": tuned.tokens,
        "steps": tuned.steps,
        "segments": segments,
        "from_s": min((block.logged_at_s for block in learned), default=None),
        "to_s": max((block.logged_at_s for block in learned), default=None),
        "validation_before": tuned.acceptance_before,
        "validation_after": tuned.acceptance_after,
    }


def _result(draft: Draft, *, seconds: float) -> dict[str, Any]:
    return {
        "version": draft.version,
        "state": draft.state,
        "verdict": draft.gate.get("verdict", draft.reason),
        "seconds": round(seconds, 3),
        "blocks": draft.trained_on.get("blocks", 0),
        "tokens": draft.trained_on.get("tokens", 0),
        "gate": draft.gate,
    }


class _Throttle:
    """Pass progress on at most twice a second, and always the first and the last step."""

    def __init__(self, emit: Emit, every_s: float = 0.5) -> None:
        self._emit, self._every_s, self._last = emit, every_s, float("-inf")

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= self._every_s or progress.step == progress.steps:
            self._last = now
            self._emit(msgspec.to_builtins(progress))


def _exit_with_parent() -> None:
    """Leave at once when stdin ends: the worker that holds the other end is gone."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def _print_line(message: dict[str, Any]) -> None:
    sys.stdout.write(msgspec.json.encode(message).decode() + "\n")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Run one job; see the module docstring for streams and exit status."""
    parser = argparse.ArgumentParser(prog="python -m distill.trainer", description="Train one draft version.")
    parser.add_argument("--job", required=True, help="id of a job this process's parent has claimed")
    parser.add_argument("--epoch", required=True, type=int, help="fencing epoch of that claim")
    arguments = parser.parse_args(argv)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    transformers_logging.disable_progress_bar()
    threading.Thread(target=_exit_with_parent, name="parent-watch", daemon=True).start()
    try:
        settings = load_settings()
        step_aside(settings.distill.nice)
        torch.set_num_threads(settings.distill.threads)
        engine = open_database(settings.database)
        with taking(settings.run_dir, settings.distill.threads):
            result = run_job(settings, engine, arguments.job, arguments.epoch, _print_line)
        _print_line({"result": result})
    except ReplayError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except DraftsmithError as error:
        sys.stderr.write(f"{error}\n")
        return FINAL_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
