"""Put an engine together from settings: models, caches, slots, scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog
import torch
from sqlalchemy import Engine as Database
from transformers import AutoConfig

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
from serving.engine.memory import available_bytes, measure_pair, plan_memory, tokens_of_one_request
from serving.engine.proposers.base import Proposer
from serving.engine.proposers.collection import Proposers
from serving.engine.proposers.draft import DraftProposer
from serving.engine.recorder import Recorder
from serving.engine.runner import ModelRunner, Work
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Sequence

log = structlog.get_logger(__name__)


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
    _check_lengths(settings, AutoConfig.from_pretrained(pair.target_path).max_position_embeddings)
    sizes = measure_pair(pair, settings.engine, draft_dtype=_draft_dtype(pair), packs=packing_works())
    plan = plan_memory(settings.engine, sizes, available_bytes())
    log.info("memory_planned", kv_tokens=plan.kv_tokens, **{f"{name}_gib": gib for name, gib in plan.terms().items()})
    target = load_target(pair)
    if pair.dtype == "bfloat16" and packing_works():
        pack_linears(target)
    _check_attention("target", target.config)
    num_blocks = plan.kv_tokens // settings.engine.block_tokens + 1
    runner = ModelRunner(target, _pool(target, num_blocks, settings))
    members: list[Proposer] = []
    hotswap = None
    scheduler = _scheduler(settings, num_blocks)
    if pair.draft_kind != "none":
        draft = _load_draft(pair, target)
        _check_attention("draft", draft.config)
        draft_runner = ModelRunner(draft, _pool(draft, num_blocks, settings))
        keep_laws = settings.engine.coupling == "maximal"
        hotswap = _hotswap(settings, pair, registry, draft_runner, draft)
        members.append(
            proposer := DraftProposer(
                draft_runner, keep_laws=keep_laws, vocab=target.config.vocab_size,
                catch_up_tokens=settings.engine.prefill_tokens, resident=hotswap.resident,
            )
        )  # fmt: skip
        scheduler = _scheduler(settings, num_blocks, proposer.version_of)
    publisher = StreamPublisher(
        settings.redis, queue_entries=settings.log.queue_entries, max_entries=settings.log.stream_max_entries,
        timeout_s=settings.log.timeout_s, retry_s=settings.log.retry_s,
    )  # fmt: skip
    engine = Engine(
        runner, Proposers(members), scheduler, FixedGamma(settings.engine.gamma),
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
    """Load the base draft; without a native bfloat16 nothing is packed."""
    dtype = _draft_dtype(pair)
    draft = load_draft(pair, dtype, shared=target if DTYPES[pair.dtype] == dtype else None)
    if packing_works() and not torch.cuda.is_available():
        pack_linears(draft)
    return draft


def _draft_dtype(pair: Pair) -> torch.dtype:
    """Return the dtype that drafts fastest here: no output depends on it."""
    return torch.bfloat16 if torch.cuda.is_available() or packing_works() else DTYPES[pair.dtype]


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


def _scheduler(
    settings: Settings, num_blocks: int, draft_version: Callable[[Sequence], int] = lambda request: 0
) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks, block_tokens=settings.engine.block_tokens, max_batch=settings.engine.max_batch,
        prefill_tokens=settings.engine.prefill_tokens, prefix_cache=settings.engine.prefix_cache,
        draft_version=draft_version,
    )  # fmt: skip


def _check_attention(role: str, config: Any) -> None:
    """Refuse what keeps less than every position: such a cache cannot be rolled back by its length alone."""
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None or "sliding_attention" in kinds:
        raise SettingsError(
            f"{role} of type {config.model_type!r} attends over a sliding window of {window} tokens; only models that "
            "attend to every position are served"
        )
    if kinds:
        raise SettingsError(
            f"{role} of type {config.model_type!r} has layers of kind {', '.join(sorted(kinds))}; only models that "
            "attend to every position are served"
        )


def _check_lengths(settings: Settings, positions: int) -> None:
    engine = settings.engine
    needed = tokens_of_one_request(engine)
    if engine.max_model_len > positions:
        raise SettingsError(
            f"engine.max_model_len = {engine.max_model_len}: the target was trained for {positions} positions"
        )
    if engine.gamma > engine.gamma_max:
        raise SettingsError(f"engine.gamma = {engine.gamma} is more than engine.gamma_max = {engine.gamma_max}")
    if 0 < engine.kv_tokens < needed:
        raise SettingsError(
            f"engine.kv_tokens = {engine.kv_tokens}: one request of engine.max_model_len needs {needed} cached tokens; "
            "raise kv_tokens or lower max_model_len"
        )
