"""Put an engine together from settings: models, caches, slots, scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from sqlalchemy import Engine as Database

from adapter.contracts import SettingsError
from adapter.facts import PAIR, Facts
from adapter.hotswap import ACTOR, DraftSlots, HotSwap, check_finite
from adapter.models import DTYPES, load_draft, load_target
from adapter.pairs import Pair
from adapter.registry import Registry
from adapter.settings import Settings
from adapter.streams import StreamPublisher
from kernels.packed_linear import pack_linears, packing_works
from serving.engine import attention
from serving.engine.control.fixed import FixedGamma
from serving.engine.engine import Engine
from serving.engine.proposers.base import Proposer
from serving.engine.proposers.collection import Proposers
from serving.engine.proposers.draft import DraftProposer
from serving.engine.recorder import Recorder
from serving.engine.runner import ModelRunner, Work
from serving.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Built:
    """An engine with the parts whose life it does not manage."""

    engine: Engine
    publisher: StreamPublisher
    hotswap: HotSwap | None


def build_engine(settings: Settings, pair: Pair, database: Database) -> Built:
    """Load the pair, install its base draft in the registry and bring the live version in.

    Raises:
        SettingsError: the settings cannot work with this pair.
        RegistryError: the data folder belongs to another pair.
    """
    attention.register()
    if settings.engine.threads:
        torch.set_num_threads(settings.engine.threads)
    registry = Registry(database)
    registry.install_base(
        target_fingerprint=pair.target_fingerprint, base_fingerprint=pair.base_fingerprint, actor=ACTOR
    )
    target = load_target(pair)
    if pair.dtype == "bfloat16" and packing_works():
        pack_linears(target)
    _check_lengths(settings, target.config.max_position_embeddings)
    num_blocks = settings.engine.kv_tokens // settings.engine.block_tokens + 1
    runner = ModelRunner(target, _pool(target, num_blocks, settings))
    members: list[Proposer] = []
    hotswap = None
    if pair.draft_kind != "none":
        draft = _load_draft(pair, target)
        draft_runner = ModelRunner(draft, _pool(draft, num_blocks, settings))
        keep_laws = settings.engine.coupling == "maximal"
        hotswap = _hotswap(settings, pair, registry, draft_runner, draft)
        members.append(
            DraftProposer(
                draft_runner, keep_laws=keep_laws, vocab=target.config.vocab_size,
                catch_up_tokens=settings.engine.prefill_tokens, resident=hotswap.resident,
            )
        )  # fmt: skip
    publisher = StreamPublisher(
        settings.redis, queue_entries=settings.log.queue_entries, max_entries=settings.log.stream_max_entries,
        timeout_s=settings.log.timeout_s, retry_s=settings.log.retry_s,
    )  # fmt: skip
    engine = Engine(
        runner, Proposers(members), _scheduler(settings, num_blocks), FixedGamma(settings.engine.gamma),
        Recorder(
            publisher, settings.log, target_fingerprint=pair.target_fingerprint, coupling=settings.engine.coupling
        ),
        coupling=settings.engine.coupling, lookahead=settings.engine.gamma_max + 1, hotswap=hotswap,
    )  # fmt: skip
    if hotswap is not None:
        hotswap.start()
        engine.proposers.use(hotswap.model, hotswap.version)
    Facts(database).put(PAIR, msgspec.to_builtins(pair))
    return Built(engine, publisher, hotswap)


def _load_draft(pair: Pair, target: Any) -> Any:
    """Load the base draft in the dtype that drafts fastest here: no output depends on it."""
    if not (torch.cuda.is_available() or packing_works()):
        return load_draft(pair, DTYPES[pair.dtype], shared=target)
    dtype = torch.bfloat16
    draft = load_draft(pair, dtype, shared=target if pair.dtype == "bfloat16" else None)
    if not torch.cuda.is_available():
        pack_linears(draft)
    return draft


def _hotswap(settings: Settings, pair: Pair, registry: Registry, runner: ModelRunner, draft: Any) -> HotSwap:
    vocab = runner.model.config.vocab_size
    # A cache of its own: what a broken candidate writes must not reach the draft in force.
    probe = ModelRunner(runner.model, _pool(draft, 1, settings))

    def check(model: Any) -> None:
        tokens = [i * 7919 % vocab for i in range(settings.engine.block_tokens)]
        if model.config._attn_implementation != attention.IMPLEMENTATION:
            model.set_attn_implementation(attention.IMPLEMENTATION)
        check_finite(probe.forward([Work([0], 0, tokens, 1)], model=model))

    def pack(model: Any) -> None:
        if packing_works():
            pack_linears(model, like=draft)

    slots = DraftSlots(draft, pair, settings.engine.max_lora_norm_ratio, finish=pack)
    return HotSwap(registry, slots, settings.artifacts_dir, poll_s=settings.engine.swap_poll_s, check=check)


def _pool(model: Any, num_blocks: int, settings: Settings) -> attention.KVPool:
    return attention.KVPool(model.config, num_blocks, settings.engine.block_tokens, model.dtype)


def _scheduler(settings: Settings, num_blocks: int) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks, block_tokens=settings.engine.block_tokens, max_batch=settings.engine.max_batch,
        prefill_tokens=settings.engine.prefill_tokens,
    )  # fmt: skip


def _check_lengths(settings: Settings, positions: int) -> None:
    engine = settings.engine
    needed = engine.max_model_len + engine.gamma_max + engine.block_tokens
    if engine.max_model_len > positions:
        raise SettingsError(
            f"engine.max_model_len = {engine.max_model_len}: the target was trained for {positions} positions"
        )
    if engine.gamma > engine.gamma_max:
        raise SettingsError(f"engine.gamma = {engine.gamma} is more than engine.gamma_max = {engine.gamma_max}")
    if engine.kv_tokens < needed:
        raise SettingsError(
            f"engine.kv_tokens = {engine.kv_tokens}: one request of engine.max_model_len needs {needed} cached tokens; "
            "raise kv_tokens or lower max_model_len"
        )
