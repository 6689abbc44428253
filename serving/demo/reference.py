"""What transformers itself answers: `python -m serving.demo.reference`, a process of its own.

Reads one JSON object from stdin and writes one to stdout, then leaves, so that its memory and cores
are free again.  Greedy answers come from `generate`; sampled ones from a plain loop with the
engine's keyed noise, and only to say how close the two best tokens were.  Started by
`serving.demo.exactness`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from kernels.noise import LANES, Purpose, gumbel
from kernels.sampling import RowParams, shape_logits

_SIGN_BIT = 1 << 63


def greedy(model: Any, tokenizer: Any, prompt: str, max_tokens: int) -> dict[str, Any]:
    """Answer with `generate`; return token ids, text and each token's lead over the runner-up in logits."""
    ids = _chat(tokenizer, prompt)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    tokens = output.sequences[0].tolist()
    return _answer(tokenizer, tokens, ids.shape[1], [_lead(step[0].double()) for step in output.logits])


def sampled(model: Any, tokenizer: Any, prompt: str, max_tokens: int, how: dict[str, Any]) -> dict[str, Any]:
    """Answer with the keyed noise; leads are those of log-probability plus noise."""
    tokens = _chat(tokenizer, prompt)[0].tolist()
    prompt_tokens, cache, leads = len(tokens), None, []
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    fresh = tokens
    while len(tokens) < prompt_tokens + max_tokens:
        output = model(torch.tensor([fresh]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        scores = _perturbed(output.logits[:, -1].float(), len(tokens), how)
        leads.append(_lead(scores))
        fresh = [int(scores.argmax())]
        tokens += fresh
        if fresh[0] in ends:
            break
    return _answer(tokenizer, tokens, prompt_tokens, leads)


def _perturbed(logits: torch.Tensor, position: int, how: dict[str, Any]) -> torch.Tensor:
    params = RowParams(
        temperature=torch.tensor([how["temperature"]], dtype=torch.float32),
        top_p=torch.tensor([how["top_p"]], dtype=torch.float32),
        top_k=torch.tensor([how.get("top_k", 0)], dtype=torch.long),
        seeds=torch.tensor([(how["seed"] ^ _SIGN_BIT) - _SIGN_BIT], dtype=torch.long),
        positions=torch.tensor([position], dtype=torch.long),
    )
    scaled = shape_logits(logits, params)[0].double()
    blocks = torch.arange((len(scaled) + LANES - 1) // LANES)
    noise = gumbel(params.seeds.expand(len(blocks)), blocks, params.positions.expand(len(blocks)), Purpose.SAMPLE)
    return scaled + noise.flatten()[: len(scaled)]


def _chat(tokenizer: Any, prompt: str) -> torch.Tensor:
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded["input_ids"]


def _lead(scores: torch.Tensor) -> float:
    best = scores.topk(2).values
    return float(best[0] - best[1])


def _answer(tokenizer: Any, tokens: list[int], prompt_tokens: int, leads: list[float]) -> dict[str, Any]:
    """Put an answer together; its text is what it adds to the prompt's, with the space it may begin with."""
    prompt = tokenizer.decode(tokens[:prompt_tokens], skip_special_tokens=True)
    text = tokenizer.decode(tokens, skip_special_tokens=True)[len(prompt) :]
    return {"token_ids": tokens[prompt_tokens:], "leads": leads, "text": text}


def main() -> int:
    """Answer what stdin asks for."""
    torch.set_grad_enabled(False)
    transformers_logging.disable_progress_bar()
    job = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(job["target_path"])
    model = AutoModelForCausalLM.from_pretrained(job["target_path"], dtype=torch.float32).eval()
    size = job["max_tokens"]
    json.dump(
        {
            "greedy": [greedy(model, tokenizer, prompt, size) for prompt in job["greedy"]],
            "sampled": [sampled(model, tokenizer, item["prompt"], size, item) for item in job["sampled"]],
        },
        sys.stdout,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
