"""Put an engine together from settings: models, caches, slots, scheduler."""

from __future__ import annotations

import random
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog
import torch
from sqlalchemy import Engine as Database
from transformers import AutoConfig

from adapter.contracts import SettingsError
from adapter.facts import PAIR, STARTING, Facts
from adapter.following import ACTOR
from adapter.hotswap import DraftSlots, HotSwap, check_finite
from adapter.models import DTYPES, load_draft, load_target
from adapter.pairs import Pair
from adapter.registry import Registry
from adapter.settings import Settings
from adapter.streams import StreamPublisher
from kernels.cpu.library import unavailable
from kernels.dispatch import allow_compiled, merge_all
from kernels.packed_linear import packing_works
from serving.engine import attention
from serving.engine.control.adaptive import adaptive
from serving.engine.control.base import Controller
from serving.engine.control.cost_model import CostModel
from serving.engine.control.fixed import FixedGamma
from serving.engine.control.router import Router
from serving.engine.control.timing import cost_table
from serving.engine.device.build import MOST_RECORDED, choose_device, device_rounds, positions_of, timers_of
from serving.engine.device.rounds import DeviceRounds
from serving.engine.draft_vocab import DraftVocab, open_vocabulary
from serving.engine.engine import Engine
from serving.engine.fitness import check_config, check_forward, generic_logits
from serving.engine.grammar import Grammars
from serving.engine.host_rounds import HostRounds
from serving.engine.memory import available_bytes, measure_pair, plan_memory, tokens_of_one_request
from serving.engine.proposers.base import Proposer
from serving.engine.proposers.collection import Proposers
from serving.engine.proposers.draft import DraftProposer
from serving.engine.proposers.ngram import NgramProposer
from serving.engine.proposers.past import PastOutputs
from serving.engine.recorder import Recorder
from serving.engine.rounds import Rounds
from serving.engine.runner import Forwards, ModelRunner
from serving.engine.scheduler import Scheduler
from serving.engine.threads import Threads
from serving.engine.work import Work

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Built:
    """An engine with the parts whose life it does not manage."""

    engine: Engine
    publisher: StreamPublisher
    hotswap: HotSwap | None
    grammars: Grammars
    threads: Threads


def build_engine(settings: Settings, pair: Pair, database: Database, *, programs: bool | None = None) -> Built:
    """Load the pair, install its base draft in the registry and bring the live version in.

    `programs`: run rounds as programs made for a device; None does so where the models are on one.

    Raises:
        SettingsError: the settings cannot work with this pair.
        RegistryError: the data folder belongs to another pair.
    """
    attention.register()
    threads = _threads(settings)
    registry = Registry(database)
    registry.install_base(
        target_fingerprint=pair.target_fingerprint, base_fingerprint=pair.base_fingerprint, actor=ACTOR
    )
    place = _place(settings, programs)
    target = _target(settings, pair, place)
    draft, hotswap = None, None
    if pair.draft_kind != "none" and DraftProposer.name in settings.engine.proposers:
        draft, hotswap = _draft(settings, pair, registry, database, target, place)
    proposers = Proposers([*([draft] if draft else []), *_matching(settings, target.model.config.vocab_size)])
    publisher = _publisher(settings)
    coupling = settings.engine.coupling
    host = HostRounds(target, proposers, coupling=coupling)
    rounds: Rounds = device_rounds(settings.engine, host, target, proposers) if place.positions else host
    engine = Engine(
        target, proposers, _scheduler(settings, target, draft),
        _controller(settings, pair, target, proposers, rounds),
        Recorder(publisher, settings.log, target_fingerprint=pair.target_fingerprint, coupling=coupling), rounds,
        lookahead=settings.engine.gamma_max + 1, hotswap=hotswap,
        router=Router(random.Random(secrets.randbits(32))) if settings.engine.alternates else None,
    )  # fmt: skip
    if hotswap is not None:
        hotswap.start()
        engine.proposers.use(hotswap.model, hotswap.version)
    if isinstance(rounds, DeviceRounds) and place.device.type == "cuda":
        rounds.warm(engine.recorder.top_k)
    _say_served(Facts(database), pair)
    grammars = Grammars(Path(pair.target_path) / "tokenizer.json", target.model.config.vocab_size)
    return Built(engine, publisher, hotswap, grammars, threads)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where models run; `positions` is 0 where rounds stay with the host, `packs` lays weights out for a CPU."""

    device: torch.device
    positions: int
    packs: bool


def _place(settings: Settings, programs: bool | None) -> _Place:
    engine = settings.engine
    device = choose_device(engine.device)
    if device.type == "cuda" and settings.log.top_k > MOST_RECORDED:
        raise SettingsError(
            f"log.top_k = {settings.log.top_k}: on a GPU at most {MOST_RECORDED} tokens a position can be recorded"
        )
    programs = device.type != "cpu" if programs is None else programs
    return _Place(device, positions_of(engine) if programs else 0, engine.pack and not programs)


def _target(settings: Settings, pair: Pair, place: _Place) -> ModelRunner:
    """Check the pair, share out the memory, and load the target with its cache.

    Raises:
        SettingsError: it cannot be served so.
    """
    config = AutoConfig.from_pretrained(pair.target_path)
    check_config("target", config)
    _check_lengths(settings, config.max_position_embeddings)
    if pair.draft_kind == "model":
        check_config("draft", AutoConfig.from_pretrained(str(pair.draft_path)))
    sizes = measure_pair(
        pair, settings.engine, draft_dtype=_draft_dtype(pair, place.device), packs=place.packs,
        fixed_place=place.positions > 0,
    )  # fmt: skip
    plan = plan_memory(settings.engine, sizes, available_bytes(device=place.device))
    log.info("memory_planned", kv_tokens=plan.kv_tokens, **{f"{name}_gib": gib for name, gib in plan.terms().items()})
    _say_compiled(settings)
    model = load_target(pair).to(place.device)
    expected = generic_logits(model)
    pool = _pool(model, plan.kv_tokens // settings.engine.block_tokens + 1, settings)
    runner = ModelRunner(model, pool, _forwards(settings, packs=place.packs), positions=place.positions)
    check_forward(runner, expected)
    return runner


def _draft(
    settings: Settings, pair: Pair, registry: Registry, database: Database, target: ModelRunner, place: _Place
) -> tuple[DraftProposer, HotSwap]:
    """Load the draft with its cache, and what follows the registry of its versions."""
    engine = settings.engine
    model = _load_draft(pair, target.model)
    forwards = _forwards(settings, packs=place.packs, int8=engine.draft_int8)
    runner = ModelRunner(model, _pool(model, target.pool.num_blocks, settings), forwards, positions=place.positions)
    vocabulary = open_vocabulary(settings, pair, database, model.get_output_embeddings())
    hotswap = _hotswap(settings, pair, registry, runner, model, vocabulary)
    proposer = DraftProposer(
        runner, keep_laws=engine.coupling == "maximal", vocab=target.model.config.vocab_size,
        catch_up_tokens=engine.prefill_tokens, resident=hotswap.resident, vocabulary=vocabulary,
    )  # fmt: skip
    return proposer, hotswap


def _threads(settings: Settings) -> Threads:
    """Compute with what the settings say from here on, less what a training uses: its cores must not be timed."""
    if settings.engine.threads:
        torch.set_num_threads(settings.engine.threads)
    threads = Threads(settings.run_dir)
    threads.follow()
    return threads


def _publisher(settings: Settings) -> StreamPublisher:
    return StreamPublisher(
        settings.redis, queue_entries=settings.log.queue_entries, max_entries=settings.log.stream_max_entries,
        max_bytes=settings.log.stream_max_bytes, timeout_s=settings.log.timeout_s, retry_s=settings.log.retry_s,
    )  # fmt: skip


def _say_served(facts: Facts, pair: Pair) -> None:
    """Let the API and the others know what is served, now that all of it is loaded."""
    facts.put(PAIR, msgspec.to_builtins(pair))
    facts.drop(STARTING)


def _controller(
    settings: Settings, pair: Pair, target: ModelRunner, proposers: Proposers, rounds: Rounds
) -> Controller:  # fmt: skip
    """Build what chooses draft lengths; an adaptive one times the pair first, unless it was timed before."""
    engine = settings.engine
    if engine.controller == "fixed" or not proposers.members or not engine.gamma_max:
        order = (DraftProposer.name,) if proposers.draft else tuple(proposers.members)
        return FixedGamma(min(engine.gamma, engine.gamma_max), order if engine.gamma_max else ())
    proposers.follow()
    draft = proposers.draft.runner if proposers.draft else None
    table = cost_table(settings, pair, target, draft, timers_of(rounds, draft))
    return adaptive(
        CostModel(table), gamma_max=engine.gamma_max, hysteresis=engine.hysteresis,
        switchback_share=engine.switchback_share, explore_share=engine.explore_share,
        seed=secrets.randbits(32),
    )  # fmt: skip


def _matching(settings: Settings, vocab: int) -> list[Proposer]:
    """Build the proposers that need no model; under the maximal coupling they give their laws."""
    laws = vocab if settings.engine.coupling == "maximal" else None
    built: list[Proposer] = [NgramProposer(vocab=laws), PastOutputs(max_tokens=settings.engine.past_tokens, vocab=laws)]
    return [member for member in built if member.name in settings.engine.proposers]


def _load_draft(pair: Pair, target: Any) -> Any:
    """Load the base draft; it borrows the target's embedding and head where both have one dtype."""
    dtype, device = _draft_dtype(pair, target.device), target.device
    return load_draft(pair, dtype, shared=target if DTYPES[pair.dtype] == dtype else None).to(device)


def _forwards(settings: Settings, *, packs: bool, int8: bool = False) -> Forwards:
    engine = settings.engine
    return Forwards(lean=engine.lean, pack=packs, int8=int8, compiled=engine.compiled)


def _say_compiled(settings: Settings) -> None:
    """Compile the C kernels now, once for all models, and say so where that cannot be done."""
    engine = settings.engine
    allow_compiled(engine.compiled)
    if engine.compiled and (reason := unavailable()) and engine.lean and engine.pack:
        log.warning("not_compiled", reason=reason, effect="torch computes instead, several times slower")


def _draft_dtype(pair: Pair, device: torch.device) -> torch.dtype:
    """Return the dtype that drafts fastest there: no output depends on it."""
    return torch.bfloat16 if device.type == "cuda" or packing_works() else DTYPES[pair.dtype]


def _hotswap(
    settings: Settings, pair: Pair, registry: Registry, runner: ModelRunner, draft: Any, vocabulary: DraftVocab | None
) -> HotSwap:
    vocab, forwards = runner.model.config.vocab_size, runner.forwards
    # A cache of its own: what a broken candidate writes must not reach the draft in force.
    probe = ModelRunner(runner.model, _pool(draft, 1, settings), forwards, positions=runner.positions)

    def check(model: Any) -> None:
        tokens = [i * 7919 % vocab for i in range(settings.engine.block_tokens)]
        check_finite(probe.forward([Work([0], 0, tokens, 1)], model=model))

    def finish(model: Any) -> None:
        forwards.prepare(model, like=draft)

    slots = DraftSlots(
        draft, pair, settings.engine.max_lora_norm_ratio, finish=finish, write=merge_all,
        alternates=settings.engine.alternates,
    )  # fmt: skip
    return HotSwap(
        registry, slots, settings.artifacts_dir, poll_s=settings.engine.swap_poll_s, check=check,
        companion=vocabulary.refresh if vocabulary is not None else lambda: None,
    )  # fmt: skip


def _pool(model: Any, num_blocks: int, settings: Settings) -> attention.KVPool:
    return attention.KVPool(model.config, num_blocks, settings.engine.block_tokens, model.dtype, model.device)


def _scheduler(settings: Settings, target: ModelRunner, draft: DraftProposer | None) -> Scheduler:
    return Scheduler(
        num_blocks=target.pool.num_blocks, block_tokens=settings.engine.block_tokens,
        max_batch=settings.engine.max_batch, prefill_tokens=settings.engine.prefill_tokens,
        prefix_cache=settings.engine.prefix_cache,
        draft_version=draft.version_of if draft is not None else lambda request: 0, clean=target.pool.clear,
    )  # fmt: skip


def _check_lengths(settings: Settings, positions: int) -> None:
    engine = settings.engine
    needed = tokens_of_one_request(engine)
    if engine.max_model_len > positions:
        raise SettingsError(
            f"engine.max_model_len = {engine.max_model_len}: the target was trained for {positions} positions"
        )
    if engine.controller == "fixed" and engine.gamma > engine.gamma_max:  # the adaptive one never asks for gamma
        raise SettingsError(f"engine.gamma = {engine.gamma} is more than engine.gamma_max = {engine.gamma_max}")
    if 0 < engine.kv_tokens < needed:
        raise SettingsError(
            f"engine.kv_tokens = {engine.kv_tokens}: one request of engine.max_model_len needs {needed} cached tokens; "
            "raise kv_tokens or lower max_model_len"
        )
