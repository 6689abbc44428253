"""Choose where the models run, and put rounds on a device together."""

from __future__ import annotations

import importlib.util
from typing import Protocol

import torch

from adapter.contracts import SettingsError
from adapter.logs import get_logger
from serving.engine.control.measuring import Timers
from serving.engine.device.models import DeviceModels
from serving.engine.device.programs import Sizes
from serving.engine.device.rounds import DeviceRounds
from serving.engine.device.timing import DeviceTimer
from serving.engine.host_rounds import HostRounds
from serving.engine.proposers.collection import Proposers
from serving.engine.rounds import Rounds
from serving.engine.runner import ModelRunner

log = get_logger(__name__)

MOST_RECORDED = 128  # tokens a position that the sampler's kernel can record
_IN_FLIGHT = 2  # rounds a token's position may lie ahead of what the host knows: the one under way, and its own


def choose_device(wanted: str) -> torch.device:
    """Return where the models run: `auto`, `cpu` or `cuda`.

    Raises:
        SettingsError: a GPU is asked for and cannot be used.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    reason = _no_gpu()
    if reason is None:
        log.info("runs_on_gpu", device=torch.cuda.get_device_name())
        return torch.device("cuda", torch.cuda.current_device())
    if wanted == "cuda":
        raise SettingsError(f"engine.device = cuda: {reason}; use `auto` or `cpu` to run without a GPU")
    return torch.device("cpu")


def _no_gpu() -> str | None:
    """Say why no GPU can be used; None when one can."""
    if not torch.cuda.is_available():
        return "this PyTorch finds no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


class EngineShape(Protocol):
    """The settings of section `engine` that fix shapes here."""

    @property
    def max_batch(self) -> int:
        """Requests at once."""

    @property
    def max_model_len(self) -> int:
        """Tokens of one request."""

    @property
    def gamma_max(self) -> int:
        """The longest draft."""

    @property
    def block_tokens(self) -> int:
        """Tokens of one block."""

    @property
    def draft_vocab_size(self) -> int:
        """Tokens a trimmed draft vocabulary has."""

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens a step."""


def positions_of(engine: EngineShape) -> int:
    """Return how many positions a token can be at, those of rounds under way included."""
    return engine.max_model_len + _IN_FLIGHT * (engine.gamma_max + 1)


def device_rounds(
    engine: EngineShape, host: HostRounds, target: ModelRunner, proposers: Proposers, *, synthetic: float | None = None
) -> DeviceRounds:
    """Put together the rounds of an engine whose models lie on a device.

    `synthetic` is for benchmarks: drafted tokens are accepted with that chance.
    """
    models = DeviceModels(target, proposers.draft, positions_of(engine), head_rows=engine.draft_vocab_size)
    sizes = Sizes(
        engine.max_batch, positions_of(engine), engine.block_tokens, engine.gamma_max,
        int(target.model.config.vocab_size),
    )  # fmt: skip
    return DeviceRounds(
        host, target, proposers.draft, models, sizes, coupling=host.coupling, catch_up_tokens=engine.prefill_tokens,
        synthetic=synthetic,
    )  # fmt: skip


def timers_of(rounds: Rounds, draft: ModelRunner | None) -> Timers | None:
    """Return what times rounds where they are computed; None where the host computes them."""
    if not isinstance(rounds, DeviceRounds):
        return None
    sizes, models = rounds.sizes, rounds.models
    models.follow()
    device = DeviceTimer(
        models, most_requests=sizes.max_batch, width=sizes.table_width, block_tokens=sizes.block_tokens,
        num_blocks=models.num_blocks, vocab=sizes.vocab,
    )  # fmt: skip
    return device.timers(draft)
