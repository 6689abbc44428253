"""What else happens to a running batch on a GPU: versions are swapped in, and everything is logged."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.driver import Load, Window, steady
from bench.gpu_engine import Contender
from serving.engine.control.fixed import FixedGamma

PAIRS = 5  # of windows with and without the log
_MARGIN = 40  # tokens a request must have left for a pair of steps
_NUMBERS = itertools.count()


def logging_cost(
    contender: Contender, load: Callable[[int], Load], batch: int, tokens: int
) -> dict[str, Any]:  # fmt: skip
    """Time the same steps with the recorder on and off, in turn; the ratio of their medians less one."""
    engine = contender.engine
    engine.controller = FixedGamma(3)
    room = contender.shape.max_model_len - 256
    steps: dict[bool, list[float]] = {True: [], False: []}
    ratios = []
    for number in range(PAIRS + 1):
        window: dict[bool, Window] = {}
        for enabled in (True, False) if number % 2 else (False, True):
            engine.recorder = contender.recorder(enabled=enabled)
            window[enabled] = steady(engine, load(batch), tokens, room)
        if number:  # the first pair warms up
            ratios.append(statistics.median(window[True].steps_s) / statistics.median(window[False].steps_s) - 1)
            for enabled in steps:
                steps[enabled] += window[enabled].steps_s
    engine.recorder = contender.recorder(enabled=True)
    return {
        "batch": batch, "pairs": PAIRS, "cost": round(statistics.median(ratios), 5),
        "low": round(min(ratios), 5), "high": round(max(ratios), 5),
        "step_ms": round(statistics.median(steps[False]) * 1e3, 4), "records": contender.log.records,
    }  # fmt: skip


def swaps_under_load(contender: Contender, load: Load, count: int) -> dict[str, Any]:
    """Change the draft every few steps while a batch decodes; compare pairs of steps with a swap with those without.

    Both drafts lie on the device; a swap copies one over the addresses that the programs read.  The loop runs a
    step ahead of the device, so what a copy costs shows in the step that begins it or in the next: both are timed.
    """
    engine, proposer = contender.engine, contender.engine.proposers.draft
    if proposer is None:
        raise ValueError("the engine has no draft model to swap")
    engine.controller = FixedGamma(3)
    drafts = (proposer.runner.model, _another(proposer.runner.model))
    times: dict[bool, list[float]] = {True: [], False: []}
    requests = _fill(contender, load)
    while len(times[True]) < count:
        if min(request.max_tokens - request.num_generated for request in requests) < _MARGIN:
            requests = _fill(contender, load, requests)
        swap = len(times[False]) > len(times[True])
        if swap:
            number = len(times[True])
            engine.proposers.use(drafts[(number + 1) % 2], number + 1)
        begin = time.perf_counter()
        engine.step()
        engine.step()
        times[swap].append(time.perf_counter() - begin)
    _end(contender, requests)
    engine.proposers.use(drafts[0], 0)
    usual, worst = statistics.median(times[False]), sorted(times[True])[int(0.99 * (count - 1))]
    return {
        "swaps": count, "two_steps_ms": round(usual * 1e3, 4),
        "stall_ms_p50": round((statistics.median(times[True]) - usual) * 1e3, 4),
        "stall_ms_p99": round((worst - usual) * 1e3, 4),
    }  # fmt: skip


def _fill(contender: Contender, load: Load, before: Sequence[Any] = ()) -> list[Any]:
    """Start a fresh batch and run it until everybody decodes."""
    _end(contender, before)
    engine = contender.engine
    room = contender.shape.max_model_len - max(len(ids) for ids in load.prompts)
    requests = [load.request(index, room, 0.0) for index in range(len(load.prompts))]
    for request in requests:
        request.request_id += f"/{next(_NUMBERS)}"
        engine.submit(request)
    while min(request.num_generated for request in requests) < 1:
        engine.step()
    engine.step()
    return requests


def _end(contender: Contender, requests: Sequence[Any]) -> None:
    for request in requests:
        contender.engine.end(request.request_id, "cancelled")
    contender.engine.step()


def _another(base: Any) -> Any:
    """Copy a draft and change its weights a little; it shares what no version may change."""
    other = copy.deepcopy(base, {id(item): item for item in _shared(base)})
    for number, layer in enumerate(other.model.layers):
        weight = layer.mlp.down_proj.weight
        generator = torch.Generator(device=weight.device).manual_seed(number)
        noise = torch.randn(weight.shape, generator=generator, device=weight.device)
        weight.add_(noise.mul_(1e-3).to(weight.dtype))
    return other


def _shared(model: Any) -> list[torch.Tensor]:
    own = {id(item) for layer in model.model.layers for item in layer.parameters()}
    return [item for item in model.parameters() if id(item) not in own]
