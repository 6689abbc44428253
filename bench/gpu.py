"""Measure the engine on a GPU, end to end: no speculation, fixed and adaptive drafting, and transformers itself.

Targets: SmolLM2-135M-Instruct widened 1, 4 and 8 times with the shipped draft (what it says is unchanged, what it
costs grows with the square), where its folder is given; and random weights of an 8B model's shape with a draft of
half a billion, drafted tokens accepted by lot.  Also what hundred swaps and logging cost a running batch, and the
host's share of a step.  Needs torch, triton, transformers, peft, safetensors and numpy alone.

    python -m bench.gpu --json FILE [--target FOLDER] [--minutes 6] [--device cuda]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapter.contracts import DraftsmithError, SettingsError
from bench.budget import Budget, Cell
from bench.driver import Load, Window, steady
from bench.environment import command, environment
from bench.gpu_effects import logging_cost, swaps_under_load
from bench.gpu_engine import Contender, EngineShape
from bench.gpu_library import LIBRARY_ARMS, compare_greedy, run_library
from bench.gpu_models import LARGE, SMALL, PairOnDevice, random_pair, widened
from bench.rows import Key
from bench.workloads import prompts

ARMS = ("none", "fixed-1", "fixed-3", "fixed-5", "adaptive")
SEED = 20261122
PROMPT_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is measured, how often, and for how long."""

    target: Path | None = None
    device: str = "cuda"
    minutes: float = 6.0
    widen: tuple[int, ...] = (1, 4, 8)
    batches: tuple[int, ...] = (1, 4, 16, 64, 128)
    acceptances: tuple[float, ...] = (0.6, 0.8)
    tokens: int = 48
    repeats: int = 3
    swaps: int = 100
    large: dict[str, int] | None = None  # shapes of the random pair; None is an 8B model's
    small: dict[str, int] | None = None


def measure(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Run every target in turn and return the result.

    Raises:
        SettingsError: there is no such device.
    """
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError("bench.gpu needs a CUDA device; PyTorch finds none here")
    where = environment()
    budget = Budget(options.minutes * 60, {name: weight for name, weight, _ in _targets(options, device)}, say)
    rows: list[dict[str, Any]] = []
    effects: dict[str, Any] = {}
    for name, _, build in _targets(options, device):
        until_s = budget.share(name)
        try:
            found, effects[name] = _one(options, name, build, budget, until_s)
            rows += found
        except Exception as error:  # one target that fails must not take the others' figures with it
            effects[name] = {"failed": f"{type(error).__name__}: {error!s:.500}"}
            budget.phases.setdefault(name, {"repeats": 0, "seconds": 0.0})
            say(f"{name}: {effects[name]['failed']}")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "what": "tokens a second of full batches that decode, all requests together; median of the repeats",
        "tokens": options.tokens, "prompt_tokens": PROMPT_TOKENS, "rows": rows, "ratios": ratios(rows),
        "effects": effects, "phases": budget.phases, "no_target": options.target is None,
    } | where  # fmt: skip


def _one(
    options: Options, name: str, build: Build, budget: Budget, until_s: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """Measure one target: its rows, and what else happens to a running batch."""
    pair, acceptance = build()
    bench = _Bench(options, pair, acceptance)
    found = budget.run(name, bench.groups(), options.repeats, until_s)
    return [row.report() | {"synthetic_acceptance": acceptance} for row in found], bench.effects(until_s)


Build = Callable[[], tuple[PairOnDevice, float | None]]


def _targets(options: Options, device: torch.device) -> list[tuple[str, float, Build]]:
    """Name, share of the time, and how it is built, of every target."""
    made: list[tuple[str, float, Build]] = []
    if options.target is not None:
        folder = options.target
        for times in options.widen:
            made.append((f"widened-{times}", 1.0, lambda times=times: (widened(folder, times, device), None)))  # type: ignore[misc]
    large, small = options.large or LARGE, options.small or SMALL
    for chance in options.acceptances:
        made.append((f"8b-{chance:g}", 1.0, lambda chance=chance: (random_pair(device, large, small), chance)))  # type: ignore[misc]
    return made


class _Bench:
    """One target with everything that is measured on it."""

    def __init__(self, options: Options, pair: PairOnDevice, acceptance: float | None) -> None:
        self._options, self._pair, self._acceptance = options, pair, acceptance
        longest = PROMPT_TOKENS + (9 * (options.tokens + 8))
        shape = EngineShape(max_batch=max(options.batches), max_model_len=longest)
        self.contender = Contender(pair, shape, synthetic=acceptance)
        self._prompts = list(self._ids(max(options.batches)))
        self._runs = 0
        self._runs_here: list[str] | None = None
        self.refused: dict[str, str] = {}

    def groups(self) -> list[list[Cell]]:
        """A group for every batch size: the engine's arms, and transformers where its time can be afforded."""
        groups = []
        for batch in self._options.batches:
            group = [self._cell(batch, arm) for arm in ARMS]
            if batch in (1, 16) and self._acceptance is None:
                group += [self._library_cell(batch, arm) for arm in self._library_arms()]
            groups.append(group)
            self.contender.rounds.warm(self.contender.engine.recorder.top_k, [batch])  # nobody captures while timed
            for arm in ARMS:
                self._steady(batch, arm, 8)
        return groups

    def _library_arms(self) -> list[str]:
        """Try what transformers offers once; what does not run here is named in the result."""
        if self._runs_here is None:
            self._runs_here = []
            for arm in LIBRARY_ARMS:
                try:
                    run_library(arm, self._pair.target, self._prompts[:1], 2)
                    self._runs_here.append(arm)
                except Exception as error:  # whatever a rival fails with, it is told and not hidden
                    self.refused[arm] = f"{type(error).__name__}: {str(error)[:200]}"
        return self._runs_here

    def effects(self, until_s: float) -> dict[str, Any]:
        """What swaps, logging and the host cost; exactness where the models say something."""
        batch = min(8, max(self._options.batches))
        load = self._load(batch)
        found: dict[str, Any] = {
            "logging": logging_cost(self.contender, self._load, batch, self._options.tokens),
            "swaps": swaps_under_load(self.contender, load, self._options.swaps),
            "host": self._host(min(64, max(self._options.batches))),
            "left_out": self.refused,
        }
        if self._acceptance is None and time.monotonic() < until_s + 60:
            found["greedy_against_transformers"] = compare_greedy(
                self.contender.engine, self._pair.target, self._prompts[:4], self._options.tokens
            )
        return found

    def _host(self, batch: int) -> dict[str, Any]:
        """Milliseconds of a step in which the loop computes rather than waits for the device; medians of steps."""
        engine, rounds = self.contender.engine, self.contender.rounds
        engine.controller = self.contender.controller("fixed-3")
        load = self._load(batch)
        room = self.contender.shape.max_model_len - PROMPT_TOKENS
        requests = [load.request(index, room, 0.0) for index in range(batch)]
        for request in requests:
            engine.submit(request)
        steps: list[tuple[float, float]] = []
        while not any(request.finish_reason for request in requests) and len(steps) < 60:
            before_s, waited_s = time.perf_counter(), rounds.waited_s
            engine.step()
            steps.append((time.perf_counter() - before_s, rounds.waited_s - waited_s))
        for request in requests:
            engine.end(request.request_id, "cancelled")
        kept = steps[10:] or steps  # the first read prompts
        step, host = (statistics.median(item) for item in zip(*((s, s - w) for s, w in kept), strict=True))
        return {"batch": batch, "step_ms": round(step * 1e3, 4), "host_ms": round(host * 1e3, 4)}

    def _cell(self, batch: int, arm: str) -> Cell:
        return Cell(self._key(batch, arm), lambda repeat: self._steady(batch, arm, self._options.tokens))

    def _library_cell(self, batch: int, arm: str) -> Cell:
        target, ids, tokens = self._pair.target, self._prompts[:batch], self._options.tokens
        return Cell(self._key(batch, arm), lambda repeat: run_library(arm, target, ids, tokens))

    def _key(self, batch: int, arm: str) -> Key:
        return Key(target=self._pair.name, widen=1, batch=batch, workload="mixed", arm=arm)

    def _steady(self, batch: int, arm: str, tokens: int) -> Window:
        engine = self.contender.engine
        engine.controller = self.contender.controller(arm)
        room = self.contender.shape.max_model_len - PROMPT_TOKENS
        return steady(engine, self._load(batch), tokens, room)

    def _load(self, batch: int) -> Load:
        self._runs += 1
        return Load(self._prompts[:batch], "bench", f"run-{self._runs}")

    def _ids(self, count: int) -> Iterator[list[int]]:
        if self._acceptance is not None or self._options.target is None:
            generator = torch.Generator().manual_seed(SEED)
            vocab = int(self._pair.target.config.vocab_size)
            yield from torch.randint(0, vocab, (count, PROMPT_TOKENS), generator=generator).tolist()
            return
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._options.target)
        for prompt in prompts("mixed", count, SEED):
            chat = [{"role": "user", "content": prompt.text}]
            ids = list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
            yield (ids + tokenizer.encode(prompt.lead, add_special_tokens=False))[-PROMPT_TOKENS:]


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the arms of every target and batch size: medians of the repeats they all took part in."""
    made = []
    groups: dict[tuple[str, float | None, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["synthetic_acceptance"], row["batch"]), {})[row["arm"]] = row
    for (target, acceptance, batch), arms in groups.items():
        engine = [arms[name] for name in ARMS if name in arms and name != "adaptive"]
        adaptive, none = arms["adaptive"], arms["none"]
        best = max(engine, key=lambda row: row["tokens_per_s"])
        entry = {
            "target": target, "synthetic_acceptance": acceptance, "batch": batch, "best": best["arm"],
            "adaptive_vs_best": _ratio(adaptive, best), "adaptive_vs_none": _ratio(adaptive, none),
            **{f"none_vs_{name}": _ratio(none, arms[name]) for name in LIBRARY_ARMS if name in arms},
        }  # fmt: skip
        made.append(entry)
    return made


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Median, smallest and largest over the repeats that both took part in."""
    pairs = zip(one["tokens_per_s_repeats"], other["tokens_per_s_repeats"], strict=False)
    each = sorted(a / b for a, b in pairs)
    return {"median": round(statistics.median(each), 4), "low": round(each[0], 4), "high": round(each[-1], 4)}


def table(result: dict[str, Any]) -> str:
    """Return the ratios as a short table for a terminal."""
    lines = [f"{'target':<44} {'accept':>6} {'batch':>5} {'best':>8} {'adaptive/best':>13} {'adaptive/none':>13}"]
    for item in result["ratios"]:
        accept = "" if item["synthetic_acceptance"] is None else f"{item['synthetic_acceptance']:g}"
        lines.append(
            f"{item['target']:<44} {accept:>6} {item['batch']:>5} {item['best']:>8} "
            f"{item['adaptive_vs_best']['median']:>13.2f} {item['adaptive_vs_none']['median']:>13.2f}"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure from the command line; 2 where that cannot be done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file of the result")
    parser.add_argument("--target", type=Path, help="folder of SmolLM2-135M-Instruct; without it, random weights only")
    parser.add_argument("--minutes", type=float, default=Options().minutes, help="time for everything, about")
    parser.add_argument("--device", default=Options().device, help="cuda, or cpu to try the program itself")
    arguments = parser.parse_args()
    options = Options(target=arguments.target, minutes=arguments.minutes, device=arguments.device)
    try:
        result = measure(options, lambda line: print(line, file=sys.stderr, flush=True))
    except DraftsmithError as error:
        print(error, file=sys.stderr)
        return 2
    result = {"command": command("bench.gpu", sys.argv[1:])} | result
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
