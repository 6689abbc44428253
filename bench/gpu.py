"""Measure the engine on a GPU, end to end: no speculation, fixed and adaptive drafting, and transformers itself.

Targets: SmolLM2-135M-Instruct widened 1, 4 and 8 times with the shipped draft (what it says is unchanged, what it
costs grows with the square), where its folder is given; and random weights of an 8B model's shape with a draft of
half a billion, drafted tokens accepted by lot.  Also what hundred swaps and logging cost a running batch, and the
host's share of a step.  CONTRIBUTING.md has the libraries it needs.  On the CPU shapes are tiny, and figures mean
nothing: that tries the program.

    python -m bench.gpu [--json FILE] [--target FOLDER] [--minutes 6] [--device cuda]
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapter.contracts import DraftsmithError, SettingsError
from bench import result_file
from bench.budget import Budget, Cell
from bench.driver import Load, Window, steady
from bench.environment import command, environment
from bench.gpu_effects import logging_cost, swaps_under_load
from bench.gpu_engine import Contender, EngineShape
from bench.gpu_library import LIBRARY_ARMS, compare_greedy, run_library
from bench.gpu_models import LARGE, SMALL, TINY_LARGE, TINY_SMALL, PairOnDevice, check_target, random_pair, widened
from bench.gpu_ratios import ARMS, failures, ratios, table
from bench.rows import Key
from bench.workloads import prompts

SEED = 20261122
PROMPT_TOKENS = 256

Keep = Callable[[dict[str, Any]], None]


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


def options_for(target: Path | None, device: str, minutes: float) -> Options:
    """Return what is measured on a device: everything on a GPU, on the CPU as little as touches every part."""
    if device != "cpu":
        return Options(target=target, device=device, minutes=minutes)
    return Options(
        target=target, device=device, minutes=minutes, widen=(1,), batches=(1, 4), acceptances=(0.6,), tokens=12,
        repeats=2, swaps=4, large=TINY_LARGE, small=TINY_SMALL,
    )  # fmt: skip


def measure(options: Options, say: Callable[[str], None], keep: Keep = lambda _result: None) -> dict[str, Any]:
    """Run every target in turn and return the result; `keep` gets it after each.

    Once the minutes are over nothing more is begun; what was not is in `left_out`.

    Raises:
        SettingsError: there is no such device, or no such target.
    """
    end_s = time.monotonic() + 60 * options.minutes
    device = _device(options.device)
    if options.target is None:
        say("without --target random weights are all that is measured")
    else:
        check_target(options.target)
    targets = _targets(options, device)
    budget = Budget(options.minutes * 60, {name: weight for name, weight, _ in targets}, say)
    rows: list[dict[str, Any]] = []
    effects: dict[str, dict[str, Any]] = {}
    result = {
        "what": "tokens a second of full batches that decode, all requests together; median of the repeats",
        "tokens": options.tokens, "prompt_tokens": PROMPT_TOKENS, "rows": rows, "ratios": [],
        "effects": effects, "phases": budget.phases, "no_target": options.target is None,
    } | environment()  # fmt: skip
    for name, _, build in targets:
        until_s, effects[name] = budget.share(name), {"left_out": {}}
        try:
            if not rows or time.monotonic() < end_s:
                _one(options, name, build, budget, min(until_s, end_s), end_s, rows, effects[name])
            else:
                effects[name]["left_out"]["the target"] = "time"
        except Exception as error:  # one target that fails must not take the others' figures with it
            effects[name]["failed"] = f"{type(error).__name__}: {error!s:.500}"
            say(f"{name}: {effects[name]['failed']}")
        budget.phases.setdefault(name, {"repeats": 0, "seconds": 0.0})
        result["ratios"] = ratios(rows)
        keep(result)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SettingsError("bench.gpu needs a CUDA device; PyTorch finds none here")
        if (device.index or 0) >= torch.cuda.device_count():
            raise SettingsError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, from cuda:0 on")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def _one(
    options: Options, name: str, build: Build, budget: Budget, until_s: float, end_s: float,
    rows: list[dict[str, Any]], effects: dict[str, Any],
) -> None:  # fmt: skip
    """Measure one target: add its rows, and what else happens to a running batch; what is there stays if it fails."""
    pair, acceptance = build()
    bench = _Bench(options, pair, acceptance, end_s, effects["left_out"])
    found = budget.run(name, bench.groups(), options.repeats, until_s)
    rows += [row.report() | {"synthetic_acceptance": acceptance} for row in found]
    bench.effects(effects)


Build = Callable[[], tuple[PairOnDevice, float | None]]


def _targets(options: Options, device: torch.device) -> list[tuple[str, float, Build]]:
    """Name, share of the time, and how it is built, of every target."""
    made: list[tuple[str, float, Build]] = []
    if options.target is not None:
        folder = options.target
        for times in options.widen:
            made.append((f"widened-{times}", 1.0, lambda times=times: (widened(folder, times, device), None)))  # type: ignore[misc]
    large, small = options.large or LARGE, options.small or SMALL
    kind = "8b" if large == LARGE else "tiny"
    for chance in options.acceptances:
        made.append((f"{kind}-{chance:g}", 1.0, lambda chance=chance: (random_pair(device, large, small), chance)))  # type: ignore[misc]
    return made


class _Bench:
    """One target with everything that is measured on it."""

    def __init__(
        self, options: Options, pair: PairOnDevice, acceptance: float | None, end_s: float, left_out: dict[str, str]
    ) -> None:  # fmt: skip
        self._options, self._pair, self._acceptance = options, pair, acceptance
        self._end_s, self._left_out = end_s, left_out
        longest = PROMPT_TOKENS + (9 * (options.tokens + 8))
        shape = EngineShape(max_batch=max(options.batches), max_model_len=longest)
        self.contender = Contender(pair, shape, synthetic=acceptance)
        self._prompts = list(self._ids(max(options.batches)))
        self._runs = 0
        self._runs_here: list[str] | None = None

    def groups(self) -> list[list[Cell]]:
        """A group for every batch size: the engine's arms, and transformers where its time can be afforded."""
        groups: list[list[Cell]] = []
        for batch in self._options.batches:
            if groups and self._late(f"batch {batch}"):
                continue
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
                    self._left_out[arm] = f"{type(error).__name__}: {str(error)[:200]}"
        return self._runs_here

    def effects(self, found: dict[str, Any]) -> None:
        """Add what swaps, logging and the host cost; exactness where the models say something."""
        options, contender = self._options, self.contender
        batch = min(8, max(options.batches))
        parts: dict[str, Callable[[], Any]] = {
            "swaps": lambda: swaps_under_load(contender, self._load(batch), options.swaps),
            "logging": lambda: logging_cost(contender, self._load, batch, options.tokens),
            "host": lambda: self._host(min(64, max(options.batches))),
        }
        if self._acceptance is None:
            parts["greedy_against_transformers"] = lambda: compare_greedy(
                contender.engine, self._pair.target, self._prompts[:4], options.tokens
            )
        for name, part in parts.items():
            if not self._late(name):
                found[name] = part()

    def _late(self, what: str) -> bool:
        """Say whether the minutes are over; then it is noted that this was left out."""
        late = time.monotonic() > self._end_s
        if late:
            self._left_out[what] = "time"
        return late

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


def main() -> int:
    """Measure from the command line; the status is 0, 1 where something failed, 2 where nothing could begin."""
    parser = result_file.parser("bench.gpu", __doc__, Options().minutes)
    parser.add_argument("--target", type=Path, help="folder of SmolLM2-135M-Instruct; without it, random weights only")
    parser.add_argument("--device", type=result_file.device_of, default=Options().device,
                        help="cuda, cuda:N, or cpu to try the program itself on tiny shapes")  # fmt: skip
    given = parser.parse_args()
    words = ["FOLDER" if before == "--target" else word for before, word in zip(sys.argv, sys.argv[1:], strict=False)]
    line = command("bench.gpu", words)
    try:
        options = options_for(given.target, given.device, given.minutes)
        with redirect_stdout(sys.stderr):  # logs; the result may go to standard output
            result = measure(options, _say, result_file.keeper(given.json, line))
    except DraftsmithError as error:
        print(error, file=sys.stderr)
        return 2
    return result_file.finish(given.json, {"command": line} | result, table(result), failures(result))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
