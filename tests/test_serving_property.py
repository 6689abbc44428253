"""Random schedules against plain decoding of each request alone: identical, always.

Arrivals, lengths, parameters, preemptions, cancels, swaps to broken drafts, pins, draft lengths and who
chooses them are all drawn at random; the reference engine has no draft, no prefix cache and one request
at a time.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from control_simulator import controller, cpu_table, gpu_table
from engine_rig import Changing, Rig, build_rig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapter.contracts import Grammar, Sampling, TokenLogprob
from serving import ipc
from serving.engine.admission import Admission
from serving.engine.control.adaptive import AdaptiveController
from serving.engine.engine import Delivery
from serving.engine.sequence import Sequence

MAX_LEN = 192
CLOSE = 1e-4  # between log-probs of one position in batches of two shapes
STEPS = 4000
SCHEMA = (
    '{"type":"object","properties":{"a":{"enum":["x","yes"]},"n":{"type":"integer","maximum":99}},"required":["a"]}'
)


@pytest.fixture(scope="module")
def crowded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The engine under test: too few blocks for its batch, all proposers, prefix cache on."""
    rig = build_rig(folder, tmp_path_factory.mktemp("crowded"), kv_tokens=320, max_batch=5, prefill_tokens=32)
    yield rig
    rig.built.publisher.close()


@pytest.fixture(scope="module")
def maximal(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The same under the maximal coupling, which promises greedy texts and a law, and no sampled text."""
    data = tmp_path_factory.mktemp("maximal")
    rig = build_rig(folder, data, kv_tokens=320, max_batch=5, prefill_tokens=32, coupling="maximal")
    yield rig
    rig.built.publisher.close()


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The reference: no speculation, nothing shared."""
    rig = build_rig(folder, tmp_path_factory.mktemp("alone"), draft="none", prefix_cache=False, proposers=())
    yield rig
    rig.built.publisher.close()


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.0, 0.4, 0.8, 1.0, 1.5]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.5]),
    top_k=st.sampled_from([0, 0, 1, 7, 40]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.3]),
    seed=st.integers(0, 2**64 - 1),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    logit_bias=st.sampled_from([(), (), ((5, 4.0),), ((7, -100.0), (9, 2.5))]),
    min_tokens=st.sampled_from([0, 0, 5, 20]),
)
messages = st.fixed_dictionaries(
    {
        "sampling": samplings,
        "prompt": st.tuples(st.integers(0, 3), st.integers(1, 60)),  # which shared text, how much of it
        "own": st.lists(st.integers(3, 110), max_size=6),
        "max_tokens": st.integers(1, 40),
        "ends": st.sampled_from([[], [2], [2, 40, 41]]),
        "grammar": st.sampled_from([None, None, None, "json_object", "json_schema"]),
        "gamma": st.sampled_from([None, None, 0, 1, 8]),
        "priority": st.integers(-1, 1),
        "pin": st.sampled_from([None, None, "floor", "live"]),
        "logprobs": st.sampled_from([None, None, 0, 3]),
        "salt": st.sampled_from(["", "", "other"]),
        "arrives": st.integers(0, 30),
        "leaves": st.sampled_from([None, None, None, 1, 6, 15]),
    }
)


def _submit(number: int, item: dict[str, Any], vocab: int) -> ipc.Submit:
    which, length = item["prompt"]
    shared = torch.randint(3, vocab, (60,), generator=torch.Generator().manual_seed(which)).tolist()
    kind = item["grammar"]
    grammar = None if kind is None else Grammar(kind=kind, schema=SCHEMA if kind == "json_schema" else "")
    return ipc.Submit(
        request_id=str(number), token_ids=shared[:length] + item["own"], max_tokens=item["max_tokens"],
        sampling=dataclasses.replace(
            item["sampling"], min_tokens=min(item["sampling"].min_tokens, item["max_tokens"])
        ), end_tokens=item["ends"] or ([2] if grammar else []), segment="s",
        gamma=item["gamma"], grammar=grammar, priority=item["priority"], cache_salt=item["salt"],
        logprobs=item["logprobs"],
    )  # fmt: skip


@dataclass
class Heard:
    """What was delivered of one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, delivery: Delivery) -> None:
        self.tokens += delivery.token_ids
        self.logprobs += delivery.logprobs or []


def _expected(alone: Rig, item: ipc.Submit) -> tuple[Heard, str | None]:
    request = Admission(alone.built, MAX_LEN).to_sequence(item, 0.0)
    heard = Heard()
    alone.engine.submit(request)
    while alone.engine.busy:
        for delivery in alone.engine.step():
            heard.add(delivery)
    return heard, request.finish_reason


def _same_logprobs(got: list[TokenLogprob], expected: list[TokenLogprob]) -> None:
    for one, other in zip(got, expected, strict=False):
        assert one.logprob == pytest.approx(other.logprob, abs=CLOSE)
        assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=CLOSE)
        if all(a - b > 2 * CLOSE for a, b in pairwise(other.top_logprobs[:-1])):  # beyond the last one may be a tie
            assert one.top_ids[:-1] == other.top_ids[:-1]


class _Versions:
    """Drafts swapped in by hand; the two newest can be pinned, like a live version and its predecessor."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._swapper = rig.built.hotswap
        self._numbers = [rig.engine.version]

    def swap(self, fill: Callable[[torch.Tensor], object]) -> None:
        rig, slots = self._rig, self._swapper._slots
        self._numbers.append(max(self._numbers) + 1)
        slots._resident[self._numbers[-1]] = rig.model(fill)
        rig.swap(self._numbers[-1], slots._resident[self._numbers[-1]])
        self._swapper.previous = self._numbers[-2]
        for number in self._numbers[1:-2]:
            slots._resident.pop(number, None)


def _fillings(seed: int) -> list[Callable[[torch.Tensor], object]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        lambda w: w.fill_(float("nan")),
        lambda w: w.zero_(),
        lambda w: w.copy_(torch.randn(w.shape, generator=generator)),
        lambda w: w.fill_(1e4),
    ]


class _AlwaysWrong:
    """Makes the draft say something else than it thinks, every time."""

    def __init__(self, rig: Rig) -> None:
        self._draft = rig.engine.proposers.draft
        self._real = self._draft.propose
        self.on = False
        self._draft.propose = self._propose

    def undo(self) -> None:
        self._draft.propose = self._real

    def _propose(self, requests: list[Sequence], gammas: list[int]) -> list[Any]:
        proposals = self._real(requests, gammas)
        for proposal in proposals if self.on else []:
            proposal.tokens = [(token * 7 + 11) % 110 for token in proposal.tokens]
        return proposals


def _drive(rig: Rig, requests: list[Sequence], plan: list[dict[str, Any]], chaos: random.Random) -> dict[str, Heard]:
    """Run a schedule to its end, breaking and mending the draft on the way; return what each request heard."""
    engine, wrong, versions = rig.engine, _AlwaysWrong(rig), _Versions(rig)
    heard = {request.request_id: Heard() for request in requests}
    free = engine.scheduler.free_blocks
    try:
        for step in range(STEPS):
            for request, item in zip(requests, plan, strict=True):
                if item["arrives"] == step:
                    request.version = {"floor": 0, "live": engine.version}.get(item["pin"])
                    engine.submit(request)
                if item["leaves"] is not None and item["arrives"] + item["leaves"] == step:
                    engine.end(request.request_id, "cancelled", 0)
            if chaos.random() < 0.15:
                versions.swap(chaos.choice(_fillings(step)))
            if chaos.random() < 0.2:
                wrong.on = not wrong.on
            for delivery in engine.step():
                heard[delivery.request_id].add(delivery)
            if step > 30 and not engine.busy:
                break
    finally:
        wrong.undo()
    assert not engine.busy, "the schedule did not end"
    assert engine.scheduler.free_blocks == free, "blocks were left behind"
    for request in requests:
        said = heard[request.request_id]
        assert said.tokens == request.tokens[request.prompt_tokens :]
        assert len(said.logprobs) == (0 if request.logprobs is None else len(said.tokens))
    return heard


def _chooser(chooser: str, seed: int) -> Changing | AdaptiveController:
    """Lengths at random, or the adaptive controller with the prices of a machine that is not this one."""
    if chooser == "random":
        return Changing(seed)
    table = gpu_table() if chooser == "gpu" else cpu_table()
    return controller(table, seed=seed, explore_share=0.2, switchback_share=0.2)


def _check(rig: Rig, alone: Rig, plan: list[dict[str, Any]], seed: int, chooser: str) -> None:
    vocab = rig.engine.target.model.config.vocab_size
    submits = [_submit(i, item, vocab) for i, item in enumerate(plan)]
    rig.engine.controller = _chooser(chooser, seed)
    admission = Admission(rig.built, MAX_LEN)
    requests = [admission.to_sequence(item, float(i)) for i, item in enumerate(submits)]
    heard = _drive(rig, requests, plan, random.Random(seed))
    for request, item, submit in zip(requests, plan, submits, strict=True):
        if rig.built.engine.rounds.coupling == "maximal" and submit.sampling.temperature > 0:
            continue  # another text of the same law
        expected, reason = _expected(alone, submit)
        got = heard[request.request_id]
        if request.finish_reason == "cancelled":
            assert item["leaves"] is not None
            assert got.tokens == expected.tokens[: len(got.tokens)]
        else:
            assert (got.tokens, request.finish_reason) == (expected.tokens, reason)
        _same_logprobs(got.logprobs, expected.logprobs)


_HERE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


choosers = st.sampled_from(["random", "random", "cpu", "gpu"])
schedules = st.lists(messages, min_size=4, max_size=9)


@settings(max_examples=16, deadline=None, suppress_health_check=_HERE, derandomize=True)
@given(plan=schedules, seed=st.integers(0, 2**31), chooser=choosers)
def test_random_schedules_equal_plain_decoding(
    crowded: Rig, alone: Rig, plan: list[dict[str, Any]], seed: int, chooser: str
) -> None:
    """Sixteen schedules (derandomised) of four to nine requests; NaN, zero, random or always wrong drafts may draft."""
    _check(crowded, alone, plan, seed, chooser)


@settings(max_examples=6, deadline=None, suppress_health_check=_HERE, derandomize=True)
@given(plan=schedules, seed=st.integers(0, 2**31), chooser=choosers)
def test_random_schedules_under_the_maximal_coupling(
    maximal: Rig, alone: Rig, plan: list[dict[str, Any]], seed: int, chooser: str
) -> None:
    """Six more (derandomised): greedy requests, among sampled ones, say what plain decoding says."""
    for item in plan[:2]:
        item["sampling"] = dataclasses.replace(item["sampling"], temperature=0.0)
        item["leaves"] = None
    _check(maximal, alone, plan, seed, chooser)


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=_HERE)
@given(plan=st.lists(messages, min_size=4, max_size=14), seed=st.integers(0, 2**31), chooser=choosers)
def test_many_random_schedules_equal_plain_decoding(
    crowded: Rig, alone: Rig, plan: list[dict[str, Any]], seed: int, chooser: str
) -> None:
    """Eighty more, drawn afresh each run."""
    _check(crowded, alone, plan, seed, chooser)
