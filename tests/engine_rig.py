"""An engine on the tiny pair, in this process, with its log collected in a list and its swaps made by hand."""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pair import pair_settings

from adapter.contracts import Counts, RequestOutcome, Sampling, VerifiedBlock, Wire
from adapter.database import migrate, open_database
from adapter.models import load_draft, load_target, prepare_pair
from adapter.pairs import Pair
from adapter.sections import LogSettings
from adapter.wire import block_from_wire, to_wire
from kernels.sampling import draw, shape_logits
from serving.engine import build
from serving.engine.build import Built
from serving.engine.control.base import Choice, StepReport, StepShape
from serving.engine.control.fixed import FixedGamma
from serving.engine.engine import Delivery, Engine
from serving.engine.parameters import row_params
from serving.engine.proposers.base import Offer
from serving.engine.recorder import Recorder
from serving.engine.sequence import Sequence

STEPS = 5000
MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.0, "seed": 2**64 - 5},
    {"temperature": 1.3, "top_p": 0.8, "seed": 3},
    {"temperature": 1.0, "top_k": 7, "seed": 4},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 5},
    {"temperature": 0.3, "seed": 6},
    {"temperature": 1.0, "seed": 7},
]


class Collected:
    """A publisher that keeps what it is offered."""

    def __init__(self) -> None:
        self.blocks: list[VerifiedBlock] = []
        self.outcomes: list[RequestOutcome] = []

    def offer(self, _stream: str, record: Wire) -> None:
        if isinstance(record, VerifiedBlock):
            self.blocks.append(block_from_wire(to_wire(record)))
        else:
            self.outcomes.append(record)


class Changing:
    """Another draft length for every request in every round, zero included."""

    def __init__(self, seed: int, choices: SequenceOf[int] = (0, 1, 2, 3, 5, 8)) -> None:
        self._random = random.Random(seed)
        self._choices = choices

    def choose(self, requests: list[Sequence], offers: list[dict[str, Offer]], shape: StepShape) -> list[Choice]:
        return [self._pick(request, offer) for request, offer in zip(requests, offers, strict=True)]

    def observe(self, report: StepReport) -> None:
        self.report = report

    def forget(self, request: Sequence) -> None:
        return None

    def explain(self) -> dict[str, object]:
        return {}

    def _pick(self, request: Sequence, offers: dict[str, Offer]) -> Choice:
        gamma = request.gamma_limit(self._random.choice(self._choices))
        name = self._random.choice(sorted(offers)) if offers else None
        return Choice(name, min(gamma, offers[name].num_tokens)) if name else Choice()


@dataclass
class Rig:
    """A built engine with a log that can be read."""

    built: Built
    pair: Pair
    log: Collected = field(default_factory=Collected)

    @property
    def engine(self) -> Engine:
        return self.built.engine

    def collect(self, settings: LogSettings) -> None:
        """Start a fresh log."""
        self.log = Collected()
        self.engine.recorder = Recorder(
            self.log, settings, target_fingerprint=self.pair.target_fingerprint, coupling="gumbel"
        )

    def model(self, fill: Callable[[torch.Tensor], object]) -> Any:
        """Return a draft whose changeable weights were overwritten by `fill`."""
        slots = self.built.hotswap._slots
        model = slots._new_slot()
        with torch.no_grad():
            for name in self.pair.lora_shapes:
                fill(model.get_submodule(name).weight)
        slots._finish(model)
        return model

    def swap(self, version: int, model: Any) -> None:
        """Make a model ready; the engine takes it before its next round."""
        swapper = self.built.hotswap
        with swapper._lock:
            swapper._ready = (swapper.generation + 1, version, model)

    def run(self, requests: list[Sequence], on_step: Callable[[int], None] = lambda step: None) -> list[list[int]]:
        """Run requests, and those running already, to their ends; return what each of `requests` generated."""
        engine, free = self.engine, self.engine.scheduler.free_blocks
        heard: dict[str, list[int]] = defaultdict(list)
        for request in requests:
            engine.submit(request)
        for step in range(STEPS):
            if not engine.busy:
                break
            on_step(step)
            for delivery in engine.step():
                heard[delivery.request_id] += delivery.token_ids
        assert not engine.busy, f"not done after {STEPS} steps"
        if requests:
            assert engine.scheduler.free_blocks == free, "a finished run left blocks behind"
        for request in requests:
            assert heard[request.request_id] == request.tokens[request.prompt_tokens :], "delivered is not generated"
        return [heard[request.request_id] for request in requests]


def build_rig(
    folder: Path, data: Path, *, draft: str | None = None, exact: bool = False, programs: bool | None = None,
    **engine: Any,
) -> Rig:  # fmt: skip
    """Build an engine on the pair in `folder`; its swapper's thread is stopped.

    `exact` drafts in float32 even where the CPU would draft faster in bfloat16; `programs` computes rounds as a
    device does.
    """
    settings = pair_settings(folder, data, draft=draft, engine=engine)
    database = open_database(settings.database)
    migrate(database)
    pair = prepare_pair(settings)
    with pytest.MonkeyPatch.context() as patch:
        if exact:
            patch.setattr(build, "packing_works", lambda: False)
        built = build.build_engine(settings, pair, database, programs=programs)
    if built.hotswap is not None:
        built.hotswap.stop()
        if exact:
            built.hotswap._slots._finish = lambda model: None
    rig = Rig(built, pair)
    rig.collect(settings.log)
    return rig


@contextlib.contextmanager
def shared_rigs(folder: Path, data: pytest.TempPathFactory) -> Iterator[Callable[..., Rig]]:
    """Yield `rig_for(**build_rig's settings)`: one engine a combination, each time with three tokens a draft."""
    built: dict[str, Rig] = {}

    def rig_for(**settings: Any) -> Rig:
        key = repr(sorted(settings.items()))
        if key not in built:
            built[key] = build_rig(folder, data.mktemp("data"), **settings)
        built[key].engine.controller = FixedGamma(3)
        return built[key]

    yield rig_for
    for rig in built.values():
        rig.built.publisher.close()


def prompts(vocab: int, lengths: SequenceOf[int] = (5, 17, 40, 3, 60, 9, 21, 33), seed: int = 0) -> list[list[int]]:
    """Random prompts of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


def request(
    name: str, prompt: list[int], max_tokens: int = 40, *, gamma: int | None = None, ends: SequenceOf[int] = (),
    arrived_s: float = 0.0, **sampling: Any,
) -> Sequence:  # fmt: skip
    """A request; greedy unless `sampling` says otherwise."""
    return Sequence(
        request_id=name, tokens=list(prompt), prompt_tokens=len(prompt), max_tokens=max_tokens,
        sampling=Sampling(**({"temperature": 0.0} | sampling)), end_tokens=frozenset(ends), segment="test", gamma=gamma,
        arrived_s=arrived_s,
    )  # fmt: skip


def requests_for(
    ids: list[list[int]], samplings: list[dict[str, Any]], max_tokens: int, *, prefix: str = "", **more: Any
) -> list[Sequence]:
    """One request a prompt, named by its place, each with its own sampling; `more` is the same for all."""
    return [
        request(f"{prefix}{i}", prompt, max_tokens, arrived_s=float(i), **sampling, **more)
        for i, (prompt, sampling) in enumerate(zip(ids, samplings, strict=True))
    ]


def counts_of(requests: list[Sequence]) -> Counts:
    """What all requests counted together, over all versions."""
    return sum((one for request in requests for one in request.by_version.values()), Counts())


@torch.inference_mode()
def plain(model: Any, prompt: list[int], max_tokens: int, sampling: Sampling) -> list[int]:
    """Sample by the definition: a fresh forward of everything for each token, one row at a time."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[:, -1].float()
        params = row_params([sampling], [len(tokens)])
        tokens.append(int(draw(shape_logits(logits, params), params)[0]))
    return tokens[len(prompt) :]


def plain_each(model: Any, ids: list[list[int]], samplings: list[dict[str, Any]], max_tokens: int) -> list[list[int]]:
    """What `plain` says to each prompt with its own sampling."""
    return [
        plain(model, prompt, max_tokens, Sampling(**sampling)) for prompt, sampling in zip(ids, samplings, strict=True)
    ]


def reference_models(pair: Pair) -> tuple[Any, Any]:
    """Target and draft once more, with transformers' own attention, in float32."""
    return load_target(pair), load_draft(pair, torch.float32)


__all__ = [
    "MIXED", "Changing", "Collected", "Delivery", "Rig", "build_rig", "counts_of", "plain", "plain_each", "prompts",
    "reference_models", "request", "requests_for", "shared_rigs",
]  # fmt: skip
