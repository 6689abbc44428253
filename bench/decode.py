"""Decoding speed of the engine in one process: no speculation, fixed gammas, and transformers' generate.

    python -m bench.decode --json FILE [--dtype float32] [--repeats 3]

Arms are interleaved within each repeat, so that a slow minute of the machine hits all of them; the
median over repeats is given with its minimum and maximum.  Prompts are the demo's first family.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from adapter.contracts import Counts, Sampling
from adapter.database import migrate, open_database
from adapter.models import load_target, prepare_pair
from adapter.settings import load_settings
from bench.environment import environment
from serving.demo.prompts import conversation
from serving.engine.build import build_engine
from serving.engine.engine import Engine
from serving.engine.sequence import Sequence

GAMMAS = (0, 1, 2, 3, 5)
BATCHES = (1, 4, 8)
SEED = 20261122


def decode(engine: Engine, prompts: list[list[int]], gamma: int, num_tokens: int) -> tuple[float, Counts]:
    """Decode all prompts together; return delivered tokens per second and the draft's counters."""
    requests = [
        Sequence(
            request_id=str(i), tokens=list(ids), prompt_tokens=len(ids), max_tokens=num_tokens,
            sampling=Sampling(temperature=0.0), end_tokens=frozenset(), segment="bench", gamma=gamma, arrived_s=0.0,
        )
        for i, ids in enumerate(prompts)
    ]  # fmt: skip
    for request in requests:
        engine.submit(request)
    begin = time.perf_counter()
    while engine.busy:
        engine.step()
    seconds = time.perf_counter() - begin
    counts = sum((count for request in requests for count in request.by_version.values()), Counts())
    return sum(request.num_generated for request in requests) / seconds, counts


def generate(model: Any, ids: list[int], num_tokens: int) -> float:
    """Run transformers' own greedy generate; return tokens per second."""
    begin = time.perf_counter()
    with torch.inference_mode():
        model.generate(torch.tensor([ids]), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)
    return num_tokens / (time.perf_counter() - begin)


def run(dtype: str, repeats: int, num_tokens: int) -> dict[str, Any]:
    """Measure every arm `repeats` times."""
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(data_dir=Path(folder), dtype=dtype, log={"enabled": False})
        database = open_database(settings.database)
        migrate(database)
        pair = prepare_pair(settings)
        engine = build_engine(settings, pair, database).engine
        tokenizer = AutoTokenizer.from_pretrained(pair.target_path)
        chats = [[{"role": "user", "content": text}] for text in conversation(SEED).prompts[: max(BATCHES)]]
        prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"] for c in chats]
        library = load_target(pair)
        counted: dict[str, Counts] = {}

        def arm(batch: int, gamma: int) -> Callable[[], float]:
            def once() -> float:
                speed, counts = decode(engine, prompts[:batch], gamma, num_tokens)
                counted[f"batch {batch}, gamma {gamma}"] = counts
                return speed

            return once

        arms = {f"batch {b}, gamma {g}": arm(b, g) for b in BATCHES for g in GAMMAS}
        arms["transformers generate, batch 1"] = lambda: generate(library, prompts[0], num_tokens)
        speeds: dict[str, list[float]] = {name: [] for name in arms}
        for repeat in range(repeats + 1):  # the first round warms up
            for name, once in arms.items():
                speed = once()
                if repeat:
                    speeds[name].append(speed)
    rows = {name: _row(values, counted.get(name)) for name, values in speeds.items()}
    return {"what": "tokens per second, greedy", "dtype": dtype, "new_tokens": num_tokens, "rows": rows} | environment()


def _row(values: list[float], counts: Counts | None) -> dict[str, Any]:
    row: dict[str, Any] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    if counts is not None and counts.num_examined:
        row |= {"acceptance": counts.acceptance, "tokens_per_round": counts.tokens_per_round}
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    result = json.dumps(run(arguments.dtype, arguments.repeats, arguments.tokens), indent=1)
    print(result)
    if arguments.json:
        arguments.json.write_text(result + "\n")


if __name__ == "__main__":
    main()
