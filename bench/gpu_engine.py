"""An engine on models that are loaded already, without a registry, a data folder or a network.

Needs torch and transformers alone; the engine is the one that serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from adapter.contracts import Wire
from bench.gpu_models import PairOnDevice
from serving.engine.attention import KVPool, register
from serving.engine.control.adaptive import adaptive
from serving.engine.control.base import Controller
from serving.engine.control.cost_model import CostModel
from serving.engine.control.cost_table import CostTable
from serving.engine.control.fixed import FixedGamma
from serving.engine.control.measuring import measure_costs
from serving.engine.device.build import device_rounds, positions_of, timers_of
from serving.engine.engine import Engine
from serving.engine.host_rounds import HostRounds
from serving.engine.proposers.collection import Proposers
from serving.engine.proposers.draft import DraftProposer
from serving.engine.recorder import Recorder
from serving.engine.runner import Forwards, ModelRunner
from serving.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class EngineShape:
    """The settings of section `engine` that matter here, under their names there."""

    max_batch: int
    max_model_len: int = 1024
    block_tokens: int = 32
    gamma_max: int = 8
    draft_vocab_size: int = 0
    prefill_tokens: int = 8192


@dataclass(frozen=True, slots=True)
class LogShape:
    """The settings of section `log` that matter here."""

    enabled: bool = True
    top_k: int = 32
    flush_tokens: int = 256
    max_context_tokens: int = 768
    accepted_share: float = 1.0


class Counted:
    """A publisher that counts what it is offered."""

    def __init__(self) -> None:
        self.records = 0
        self.bytes = 0

    def offer(self, _stream: str, record: Wire) -> None:
        """Count a record."""
        self.records += 1
        self.bytes += len(getattr(record, "topk_ids", b"")) + len(getattr(record, "topk_logprobs", b""))


class Contender:
    """One pair on one device, with the controllers of every arm.

    Args:
        synthetic: accept each drafted token with this chance instead of asking the models.
    """

    def __init__(self, pair: PairOnDevice, shape: EngineShape, *, synthetic: float | None = None) -> None:
        register()
        self.pair, self.shape = pair, shape
        forwards = Forwards(pack=False, compiled=False)
        positions = positions_of(shape)
        blocks = shape.max_batch * -(-positions // shape.block_tokens) + 1
        runners = [
            ModelRunner(model, _pool(model, blocks, shape), forwards, positions=positions)
            for model in (pair.target, pair.draft)
        ]
        vocab = int(pair.target.config.vocab_size)
        proposer = DraftProposer(runners[1], keep_laws=False, vocab=vocab, catch_up_tokens=shape.prefill_tokens)
        proposers = Proposers([proposer])
        host = HostRounds(runners[0], proposers, coupling="gumbel")
        self.rounds: Any = device_rounds(shape, host, runners[0], proposers, synthetic=synthetic)
        self._adaptive: Controller | None = None
        self.log = Counted()
        scheduler = Scheduler(
            num_blocks=blocks, block_tokens=shape.block_tokens, max_batch=shape.max_batch,
            prefill_tokens=shape.prefill_tokens, prefix_cache=False,
        )  # fmt: skip
        self.engine = Engine(
            runners[0], proposers, scheduler, FixedGamma(0), self.recorder(enabled=True), self.rounds,
            lookahead=shape.gamma_max + 1,
        )  # fmt: skip

    def recorder(self, *, enabled: bool) -> Recorder:
        """Return what logs as a service does, or nothing."""
        settings: Any = LogShape(enabled=enabled)
        return Recorder(self.log, settings, target_fingerprint="bench", coupling="gumbel")

    def controller(self, arm: str) -> Controller:
        """Return the controller of an arm: none, fixed-N or adaptive."""
        if arm == "none":
            return FixedGamma(0, ())
        if arm.startswith("fixed-"):
            return FixedGamma(int(arm.removeprefix("fixed-")))
        if self._adaptive is None:
            timers = timers_of(self.rounds, self.engine.proposers.draft.runner)  # type: ignore[union-attr]
            table: CostTable = measure_costs(
                timers, "bench", most_rows=self.shape.max_batch * (self.shape.gamma_max + 1),
                most_requests=self.shape.max_batch, context=512,
            )  # type: ignore[arg-type]  # fmt: skip
            self._adaptive = adaptive(
                CostModel(table), gamma_max=self.shape.gamma_max, hysteresis=0.03, switchback_share=0.01,
                explore_share=0.01, seed=1,
            )  # fmt: skip
        return self._adaptive  # one for all windows: a service has a past


def _pool(model: Any, blocks: int, shape: EngineShape) -> KVPool:
    weight: torch.Tensor = model.lm_head.weight
    return KVPool(model.config, blocks, shape.block_tokens, weight.dtype, weight.device)
