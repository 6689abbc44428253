"""An engine in this process on which every arm can be run, and the prompts as its target reads them.

Arms differ by the controller alone: no speculation, a fixed draft length, or the engine's own adaptive
one, which keeps what it learned as it does in a service.  Called by `bench.engine` and `bench.record`.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import AutoTokenizer

from adapter.contracts import SettingsError
from adapter.database import migrate, open_database
from adapter.models import prepare_pair
from adapter.pairs import read_config
from adapter.settings import load_settings
from bench.driver import Load, Window, burst, steady
from bench.rows import ENGINE_ARMS
from bench.workloads import Prompt
from serving.engine.build import build_engine
from serving.engine.control.base import Controller
from serving.engine.control.fixed import FixedGamma

ADAPTIVE = "adaptive"
GAMMA_MAX = 8


class Tokens:
    """Chat prompts as token ids, cut at the front where they are too long."""

    def __init__(self, target: Path, limit: int) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(target)
        self._limit = limit

    def __call__(self, prompts: list[Prompt]) -> list[list[int]]:
        return [self._one(prompt) for prompt in prompts]

    def _one(self, prompt: Prompt) -> list[int]:
        chat = [{"role": "user", "content": prompt.text}]
        ids = list(self._tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
        ids += self._tokenizer.encode(prompt.lead, add_special_tokens=False) if prompt.lead else []
        return ids[-self._limit :]


class Served:
    """One engine on a data folder of its own; leaving it frees what it holds.

    Args:
        engine: settings of the section `engine`.
        more: other settings, such as target, draft and dtype.
    """

    def __init__(self, data_dir: Path, engine: dict[str, Any], **more: Any) -> None:
        settings = load_settings(data_dir=data_dir, engine=engine | {"gamma_max": GAMMA_MAX}, **more)
        self._database = open_database(settings.database)
        migrate(self._database)
        self.settings = settings
        self.pair = prepare_pair(settings)
        self.built = build_engine(settings, self.pair, self._database)
        self.engine = self.built.engine
        self._adaptive = self.engine.controller

    def __enter__(self) -> Served:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.built.hotswap is not None:
            self.built.hotswap.stop()
        self.built.publisher.close(0.1)
        self._database.dispose()

    def use(self, arm: str) -> None:
        """Switch the engine to an arm.

        Raises:
            SettingsError: there is no such arm.
        """
        self.engine.controller = self._controller(arm)

    def steady(self, arm: str, loads: list[Load], num_tokens: int, limit: int) -> Window:
        """Run one full batch after another and add them up."""
        self.use(arm)
        return merge([steady(self.engine, load, num_tokens, limit) for load in loads])

    def burst(self, arm: str, load: Load, num_tokens: list[int], batch: int) -> Window:
        """Run requests to their ends, `batch` at a time."""
        self.use(arm)
        return burst(self.engine, load, num_tokens, batch)

    def _controller(self, arm: str) -> Controller:
        if arm == ADAPTIVE:
            return self._adaptive
        if arm not in ENGINE_ARMS:
            raise SettingsError(f"arm {arm!r} does not exist; there are {', '.join(ENGINE_ARMS)}")
        return FixedGamma(0 if arm == "none" else int(arm.removeprefix("fixed-")))


def merge(windows: list[Window]) -> Window:
    """Add up windows that ran one after another."""
    first = windows[0]
    if len(windows) == 1:
        return first
    return Window(
        tokens=sum(item.tokens for item in windows), seconds=sum(item.seconds for item in windows),
        tpot_s=[value for item in windows for value in item.tpot_s],
        ttft_s=[value for item in windows for value in item.ttft_s],
        counts=sum((item.counts for item in windows[1:]), first.counts),
        rounds=sum(item.rounds for item in windows), steps_s=[value for item in windows for value in item.steps_s],
    )  # fmt: skip


def positions(target: Path) -> int:
    """Return how many tokens a target was trained for."""
    return int(read_config(target)["max_position_embeddings"])
