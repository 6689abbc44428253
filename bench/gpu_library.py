"""What transformers does with the same target on the same GPU, and whether the engine says the same."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import GenerationConfig

from bench.driver import Load, Window, burst
from serving.engine.attention import IMPLEMENTATION
from serving.engine.control.fixed import FixedGamma
from serving.engine.engine import Engine

LIBRARY_ARMS = ("hf_generate", "hf_continuous")
EPSILON = 0.25  # of a logit: two bfloat16 forwards of one model differ by so much where they disagree


def run_library(arm: str, model: Any, prompts: list[list[int]], tokens: int) -> Window:
    """Answer all prompts together; the time of a run to a first token is taken off, as the engine's is not counted."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        run = _generate if arm == "hf_generate" else _continuous
        first_s = run(model, prompts, 1)
        seconds = run(model, prompts, tokens + 1) - first_s
    finally:
        model.set_attn_implementation(before)
    gained = tokens * len(prompts)
    each = [seconds / tokens] * len(prompts)
    return Window(tokens=gained, seconds=seconds, tpot_s=each, ttft_s=[first_s] * len(prompts), rounds=tokens)


def _generate(model: Any, prompts: list[list[int]], tokens: int) -> float:
    device = model.lm_head.weight.device
    longest = max(len(ids) for ids in prompts)
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    config = GenerationConfig(pad_token_id=0, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    begin = time.perf_counter()
    with torch.inference_mode():
        model.generate(padded, attention_mask=mask, generation_config=config)[:, -1].tolist()
    return time.perf_counter() - begin


def _continuous(model: Any, prompts: list[list[int]], tokens: int) -> float:
    config = GenerationConfig(pad_token_id=0, max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
    begin = time.perf_counter()
    answers = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    seconds = time.perf_counter() - begin
    came = sorted(len(answer.generated_tokens) for answer in answers.values())
    if came != [tokens] * len(prompts):
        raise RuntimeError(f"generate_batch gave {came} tokens to {len(prompts)} prompts, {tokens} each were asked for")
    return seconds


def compare_greedy(engine: Engine, model: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Compare greedy answers with those of transformers' own forward, up to each first difference.

    Where they differ, the margin between the two tokens is taken from a forward of transformers over the common
    text: a difference within `EPSILON` is rounding, and anything beyond it is an error.
    """
    engine.controller = FixedGamma(3)
    load = Load(prompts, "compare", f"compare-{time.monotonic_ns()}")
    said: dict[str, list[int]] = {}
    submit = engine.submit

    def keep(request: Any) -> None:
        said[request.request_id] = request.tokens
        submit(request)

    engine.submit = keep  # type: ignore[method-assign]
    try:
        burst(engine, load, [tokens] * len(prompts), len(prompts))
    finally:
        engine.submit = submit  # type: ignore[method-assign]
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if before == IMPLEMENTATION else before)
    margins = []
    try:
        for answer, prompt in zip(said.values(), prompts, strict=True):
            margin = _first_difference(model, answer, len(prompt))
            if margin is not None:
                margins.append(round(margin, 5))
    finally:
        model.set_attn_implementation(before)
    return {
        "answers": len(prompts), "tokens_each": tokens, "differing": len(margins), "margins": margins,
        "epsilon": EPSILON, "beyond_epsilon": sum(margin > EPSILON for margin in margins),
    }  # fmt: skip


@torch.inference_mode()
def _first_difference(model: Any, answer: list[int], begin: int) -> float | None:
    """Return by how much transformers prefers its own token at the first difference; None where there is none.

    One forward over the whole answer gives its choice at every position, given the text before it.
    """
    ids = torch.tensor([answer], device=model.lm_head.weight.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, begin - 1 : -1].float()
    own, said = logits.max(-1), logits.gather(1, ids[0, begin:, None]).squeeze(1)
    different = (own.indices != ids[0, begin:]).nonzero()
    if not len(different):
        return None
    at = int(different[0])
    return float(own.values[at] - said[at])
