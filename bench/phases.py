"""The phases of the benchmark: what is built for each, and the groups of cells that are measured in it.

`main` is every workload and batch at one width; `sampled` is the mixed workload at temperature 0.8 under
both couplings; `rag` is long shared prompts with the prefix cache on and off.  Called by `bench.engine`.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from adapter.pairs import Pair
from bench.budget import Cell
from bench.driver import Load, Window, longest_answer
from bench.library import ARMS as LIBRARY_ARMS
from bench.library import Library
from bench.options import SAMPLED, Options
from bench.rows import ENGINE_ARMS, Key
from bench.served import ADAPTIVE, GAMMA_MAX, Served, Tokens, positions
from bench.vllm_arm import ARMS as VLLM_ARMS
from bench.vllm_arm import Vllm
from bench.workloads import RAG, WORKLOADS, Prompt, prompts, rag

TEMPERATURE = 0.8
SAMPLED_BATCHES = (1, 8)
RAG_BATCH, RAG_PASSAGES, RAG_QUESTIONS, RAG_TOKENS = 4, 4, 5, 12
_LONE_WAVES = 2  # prompts one after another where the batch is 1, so that a window is not one prompt's luck
_PREFILL_TOKENS = 512


class Phases:
    """Build what one phase needs and hand out its cells; `stack` closes what was built.

    Args:
        name: of the target, for the rows.
        times: how often it was widened.
        pair: settings of target and draft.
        folder: for the data folders of the engines.
    """

    def __init__(
        self, options: Options, name: str, times: int, pair: dict[str, str], folder: Path, texts: list[str] | None,
        stack: ExitStack,
    ) -> None:  # fmt: skip
        self._options = options
        self._name, self._times = name, times
        self._pair = pair
        self._folder = folder
        self._texts = texts
        self._stack = stack
        self._runs = count()
        self.vllm_version: str | None = None
        self._arms = [arm for arm in ENGINE_ARMS if arm in options.arms]
        self._tokens = Tokens(Path(pair["target"]), options.max_prompt_tokens)

    def groups(self, phase: str) -> list[list[Cell]]:
        """Return the groups of a phase; everything they need is built and warm."""
        return {"main": self._main, SAMPLED: self._sampled, RAG: self._rag}[phase]()

    # -- phases --------------------------------------------------------------------------------

    def _main(self) -> list[list[Cell]]:
        options = self._options
        served = self._serve("gumbel", max(options.batches))
        names = [name for name in options.workloads if name in WORKLOADS]
        asked = 1 in options.batches and any(arm in LIBRARY_ARMS for arm in options.arms)
        library = Library(self._for_rivals(served.pair)) if asked else None
        vllms = self._vllms(served) if options.vllm_python else {}
        self._warm_up(served, names)
        if library is not None:
            load = self._load(prompts(names[0], 1, options.seed - 1, self._texts), names[0], 0.0)
            for arm in library.arms:
                library.run(arm, load, 4)
        groups = []
        for name in names:
            for batch in options.batches:
                group = [self._cell(served, name, batch, arm) for arm in self._arms]
                if batch == 1 and library is not None:
                    group += [self._library_cell(library, name, arm) for arm in library.arms if arm in options.arms]
                group += [self._vllm_cell(vllm, name, batch, arm) for arm, vllm in vllms.items()]
                groups.append(group)
        return groups

    def _sampled(self) -> list[list[Cell]]:
        """The mixed workload with a temperature; the couplings stand side by side in every group."""
        batches = [batch for batch in SAMPLED_BATCHES if batch in self._options.batches] or [self._options.batches[0]]
        engines = {coupling: self._serve(coupling, max(batches)) for coupling in ("gumbel", "maximal")}
        for served in engines.values():
            self._warm_up(served, ["mixed"], TEMPERATURE)
        return [
            [self._cell(served, "mixed", batch, arm, TEMPERATURE) for arm in self._arms for served in engines.values()]
            for batch in batches
        ]

    def _rag(self) -> list[list[Cell]]:
        batch = min(RAG_BATCH, max(self._options.batches))
        engines = {cached: self._serve("gumbel", batch, prefix_cache=cached) for cached in (True, False)}
        arms = [arm for arm in ("none", ADAPTIVE) if arm in self._arms] or self._arms[:1]
        for served in engines.values():
            for arm in arms:
                load = self._load(rag(1, 1, self._options.seed - 1, texts=self._texts), RAG, 0.0)
                served.burst(arm, load, [RAG_TOKENS], 1)
        return [[self._rag_cell(served, cached, batch, arm) for cached, served in engines.items()] for arm in arms]

    def _for_rivals(self, pair: Pair) -> Pair:
        """The same files in the dtype that the other engines are measured with."""
        return msgspec.structs.replace(pair, dtype=self._options.rivals_dtype)

    # -- engines -------------------------------------------------------------------------------

    def _serve(self, coupling: str, batch: int, *, prefix_cache: bool = True) -> Served:
        options = self._options
        longest = longest_answer([[0] * options.max_prompt_tokens] * batch, options.tokens, GAMMA_MAX, _PREFILL_TOKENS)
        room = min(options.max_prompt_tokens + longest, positions(Path(self._pair["target"])))
        section: dict[str, Any] = {
            "max_batch": batch, "max_model_len": room, "prefill_tokens": _PREFILL_TOKENS, "coupling": coupling,
            "prefix_cache": prefix_cache, "controller": "adaptive",
        }  # fmt: skip
        data_dir = self._folder / f"{coupling}-{prefix_cache}"
        data_dir.mkdir(parents=True)
        return self._stack.enter_context(
            Served(
                data_dir, section | options.engine, dtype=options.dtype, cache_dir=options.cache_dir,
                log={"enabled": False}, **self._pair,
            )
        )  # fmt: skip

    def _warm_up(self, served: Served, names: list[str], temperature: float = 0.0) -> None:
        """Run every arm at the smallest batch, and the adaptive one everywhere else too: a service has a past."""
        most = served.settings.engine.max_batch
        for name in names:
            for arm in self._arms if name == names[0] else [item for item in self._arms if item == ADAPTIVE]:
                for batch in sorted({1, most} if arm in (ADAPTIVE, "none") else {most}):
                    made = prompts(name, batch, self._options.seed - 1, self._texts)
                    self._steady(served, arm, [self._load(made, name, temperature)])

    # -- cells ---------------------------------------------------------------------------------

    def _key(self, workload: str, batch: int, arm: str, **more: Any) -> Key:
        return Key(target=self._name, widen=self._times, batch=batch, workload=workload, arm=arm, **more)

    def _cell(self, served: Served, name: str, batch: int, arm: str, temperature: float = 0.0) -> Cell:
        key = self._key(name, batch, arm, temperature=temperature, coupling=served.settings.engine.coupling)
        return Cell(key, lambda repeat: self._steady(served, arm, self._loads(name, batch, repeat, temperature)))

    def _library_cell(self, library: Library, name: str, arm: str) -> Cell:
        def run(repeat: int) -> Window:
            loads = self._loads(name, 1, repeat, 0.0)
            together = Load([ids for load in loads for ids in load.prompts], name, "")
            return library.run(arm, together, self._options.tokens_of(1))

        return Cell(self._key(name, 1, arm), run)

    def _vllms(self, served: Served) -> dict[str, Vllm]:
        section, python = served.settings.engine, str(self._options.vllm_python)
        rival = self._for_rivals(served.pair)
        room = {"max_batch": section.max_batch, "max_model_len": section.max_model_len}
        started = {arm: self._stack.enter_context(Vllm(python, rival, arm, **room)) for arm in VLLM_ARMS}
        self.vllm_version = started[next(iter(started))].version
        return started

    def _vllm_cell(self, vllm: Vllm, name: str, batch: int, arm: str) -> Cell:
        return Cell(
            self._key(name, batch, arm),
            lambda repeat: vllm.run(self._loads(name, batch, repeat, 0.0), self._options.tokens_of(batch)),
        )

    def _rag_cell(self, served: Served, cached: bool, batch: int, arm: str) -> Cell:
        def run(repeat: int) -> Window:
            made = rag(RAG_PASSAGES, RAG_QUESTIONS, self._options.seed + repeat, texts=self._texts)
            return served.burst(arm, self._load(made, RAG, 0.0), [RAG_TOKENS] * len(made), batch)

        return Cell(self._key(RAG, batch, arm, prefix_cache=cached), run)

    # -- loads ---------------------------------------------------------------------------------

    def _steady(self, served: Served, arm: str, loads: list[Load]) -> Window:
        longest = max(len(ids) for load in loads for ids in load.prompts)
        tokens = self._options.tokens_of(len(loads[0].prompts))
        needed = max(longest_answer(load.prompts, tokens, GAMMA_MAX, _PREFILL_TOKENS) for load in loads)
        limit = min(needed, served.settings.engine.max_model_len - longest)
        return served.steady(arm, loads, tokens, limit)

    def _loads(self, name: str, batch: int, repeat: int, temperature: float) -> list[Load]:
        """Return the loads of one window: new prompts in each repeat, the same ones for every arm."""
        waves = _LONE_WAVES if batch == 1 else 1
        made = prompts(name, batch * waves * (repeat + 1), self._options.seed, self._texts)[batch * waves * repeat :]
        return [self._load(made[wave * batch : (wave + 1) * batch], name, temperature) for wave in range(waves)]

    def _load(self, made: list[Prompt], name: str, temperature: float) -> Load:
        return Load(self._tokens(made), f"bench-{name}", f"run-{next(self._runs)}", temperature)
