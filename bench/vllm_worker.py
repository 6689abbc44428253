"""Serve one model with vLLM to a benchmark, over lines of JSON on standard input and output.

Runs in an environment of its own that has vLLM and not this project: it imports nothing of ours.  The
first line in names the model; each further line asks for one window, which is measured as
`bench.driver.steady` does: from the last request's first token on, with every request still decoding.
Started by `bench.vllm_arm`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def load(job: dict[str, Any]) -> Any:
    """Load the model and return vLLM's engine, stepped by this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; it is one of several engines in memory
    from vllm import LLM  # type: ignore[import-not-found]

    return LLM(
        model=job["model"], dtype=job["dtype"], max_model_len=job["max_model_len"], max_num_seqs=job["max_batch"],
        enable_prefix_caching=False, speculative_config=job["speculative_config"],
    ).llm_engine  # fmt: skip


def window(engine: Any, job: dict[str, Any], run: int) -> dict[str, Any]:
    """Decode all prompts together until `tokens` a request were added; return tokens, seconds and token times."""
    from vllm import SamplingParams

    prompts, tokens = job["prompts"], job["tokens"]
    most = job["most_tokens"]
    names = [f"{run}-{index}" for index in range(len(prompts))]
    counts: dict[str, int] = {}
    begun = time.perf_counter()
    first: dict[str, float] = {}
    for name, ids in zip(names, prompts, strict=True):
        sampling = SamplingParams(temperature=0.0, max_tokens=most - len(ids), ignore_eos=True)
        engine.add_request(name, {"prompt_token_ids": ids}, sampling)

    def step() -> float:
        for output in engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
        now = time.perf_counter()
        for name, count in counts.items():
            if count:
                first.setdefault(name, now)
        return now

    while len(first) < len(names):
        begin = step()
    before = sum(counts.values())
    now, steps = begin, 0
    while sum(counts.values()) - before < tokens * len(names) and engine.has_unfinished_requests():
        now, steps = step(), steps + 1
    gained = sum(counts.values()) - before
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    each = (now - begin) / (gained / len(names))
    return {
        "tokens": gained, "seconds": now - begin, "tpot_s": [each] * len(names),
        "ttft_s": [first[name] - begun for name in names], "rounds": steps * len(names),
    }  # fmt: skip


def _version() -> str:
    import vllm

    return str(vllm.__version__)


def main() -> None:
    """Answer line by line until standard input ends; only answers go to the real standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = load(json.loads(sys.stdin.readline()))
    print(json.dumps({"version": _version()}), file=answers, flush=True)
    for run, line in enumerate(sys.stdin):
        print(json.dumps(window(engine, json.loads(line), run)), file=answers, flush=True)


if __name__ == "__main__":
    main()
