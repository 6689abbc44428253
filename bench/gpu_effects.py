"""What else happens to a running batch on a GPU: versions are swapped in, and everything is logged."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.driver import Load, Window, steady
from bench.gpu_engine import Contender
from serving.engine.control.fixed import FixedGamma

PAIRS = 5  # of windows with and without the log


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
    """Change the draft every few steps while a batch decodes; compare steps with a swap with those without.

    Both drafts lie on the device; a swap copies one over the addresses that the programs read.
    """
    engine = contender.engine
    engine.controller = FixedGamma(3)
    proposer = engine.proposers.draft
    if proposer is None:
        raise ValueError("the engine has no draft model to swap")
    base = proposer.runner.model
    other = copy.deepcopy(base, {id(item): item for item in _shared(base)})
    for number, layer in enumerate(other.model.layers):
        generator = torch.Generator(device=layer.mlp.down_proj.weight.device).manual_seed(number)
        layer.mlp.down_proj.weight.add_(
            torch.randn(layer.mlp.down_proj.weight.shape, generator=generator, device=generator.device)
            .mul_(1e-3).to(layer.mlp.down_proj.weight.dtype)
        )  # fmt: skip
    requests = [load.request(index, 10**6, 0.0) for index in range(len(load.prompts))]
    room = contender.shape.max_model_len - max(len(ids) for ids in load.prompts)
    for request in requests:
        request.max_tokens = room
        engine.submit(request)
    for _ in range(10):
        engine.step()
    with_swap, without, done = [], [], 0
    while done < count and not any(request.finish_reason for request in requests):
        swap = len(with_swap) + len(without) and (len(with_swap) + len(without)) % 3 == 0
        if swap:
            engine.proposers.use(other if done % 2 == 0 else base, done + 1)
            done += 1
        seconds = _step_s(engine)
        (with_swap if swap else without).append(seconds)
        requests = _renewed(engine, contender, load, requests, room)
    for request in requests:
        engine.end(request.request_id, "cancelled")
    engine.proposers.use(base, 0)
    usual = statistics.median(without)
    worst = sorted(with_swap)[int(0.99 * (len(with_swap) - 1))]
    return {
        "swaps": len(with_swap), "step_ms": round(usual * 1e3, 4),
        "stall_ms_p50": round((statistics.median(with_swap) - usual) * 1e3, 4),
        "stall_ms_p99": round((worst - usual) * 1e3, 4),
    }  # fmt: skip


def _renewed(engine: Any, contender: Contender, load: Load, requests: list[Any], room: int) -> list[Any]:
    """Start over who is about to end, so that the batch stays full."""
    kept = []
    for index, request in enumerate(requests):
        if request.num_generated > room - 4 * (contender.shape.gamma_max + 1):
            engine.end(request.request_id, "cancelled")
            request = load.request(index, room, 0.0)
            request.request_id += f"-{id(request)}"
            engine.submit(request)
        kept.append(request)
    return kept


def _step_s(engine: Any) -> float:
    begin = time.perf_counter()
    engine.step()
    return time.perf_counter() - begin


def _shared(model: Any) -> list[torch.Tensor]:
    own = {id(item) for layer in model.model.layers for item in layer.parameters()}
    return [item for item in model.parameters() if id(item) not in own]
