"""A tiny random pair on disk and verified blocks drawn from the target's true law."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import redis
import torch
from sqlalchemy import Engine
from transformers import LlamaConfig, LlamaForCausalLM

from adapter import keys
from adapter.contracts import SCHEMA_VERSION, Sampling, Verdict, VerifiedBlock, VersionSpan
from adapter.facts import PAIR, Facts
from adapter.pairs import LORA_MODULES, Pair, model_fingerprint
from adapter.registry import Registry
from adapter.wire import to_wire

VOCAB = 64
TOP_K = 16


def tiny_model(seed: int, *, layers: int = 2, spread: float = 0.25) -> LlamaForCausalLM:
    """Build a random Llama whose laws are neither flat nor certain."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=spread,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_pair(folder: Path) -> Pair:
    """Write a target and a draft that is the target with its layers disturbed; describe both."""
    target = tiny_model(0)
    draft = tiny_model(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in draft.named_parameters():
            if "layers" in name and weight.dim() == 2:
                weight += 0.15 * torch.randn(weight.shape, generator=generator)
    for name, model in (("target", target), ("draft", draft)):
        model.save_pretrained(folder / name)
    shapes = {
        f"model.layers.{i}.{name}": tuple(draft.model.layers[i].get_submodule(name).weight.shape)
        for i in range(draft.config.num_hidden_layers)
        for name in LORA_MODULES
    }
    return Pair(
        target_name="tiny",
        target_path=str(folder / "target"),
        target_fingerprint=model_fingerprint(folder / "target"),
        dtype="float32",
        draft_kind="model",
        draft_path=str(folder / "draft"),
        base_fingerprint=model_fingerprint(folder / "draft"),
        lora_shapes=shapes,  # type: ignore[arg-type]
    )


@torch.inference_mode()
def make_blocks(
    pair: Pair, count: int, *, seed: int = 0, prompt: int = 6, answer: int = 24, temperature: float = 1.0,
    segment: str = "chat", name: str = "r",
) -> list[VerifiedBlock]:  # fmt: skip
    """Let the target answer `count` random prompts and log its true top-k at every answered position."""
    target = LlamaForCausalLM.from_pretrained(pair.target_path).eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (count, prompt), generator=generator)
    laws = []
    for _ in range(answer):
        law = torch.log_softmax(target(tokens).logits[:, -1].float(), -1)
        laws.append(law)
        chosen = (
            torch.multinomial((law / temperature).softmax(-1), 1, generator=generator)
            if temperature
            else law.argmax(-1, keepdim=True)
        )
        tokens = torch.cat([tokens, chosen], 1)
    logprobs, ids = torch.stack(laws, 1).topk(TOP_K)
    return [
        block_of(
            pair, f"{name}{i}", tokens[i].numpy(), ids[i].numpy(), logprobs[i].numpy(), prompt,
            temperature=temperature, segment=segment, seed=seed,
        )
        for i in range(count)
    ]  # fmt: skip


def block_of(
    pair: Pair, request_id: str, tokens: np.ndarray, ids: np.ndarray, logprobs: np.ndarray, prompt: int, *,
    temperature: float = 1.0, segment: str = "chat", seed: int = 0, first_position: int = 0,
) -> VerifiedBlock:  # fmt: skip
    """Pack one request's answered positions as the engine would."""
    records = len(ids)
    positions = np.arange(prompt, prompt + records) + first_position
    return VerifiedBlock(
        schema=SCHEMA_VERSION,
        request_id=request_id,
        segment=segment,
        target_fingerprint=pair.target_fingerprint,
        coupling="gumbel",
        sampling=Sampling(temperature=temperature, seed=seed),
        prompt_tokens=prompt,
        first_position=first_position,
        versions=(VersionSpan(0, 0),),
        top_k=ids.shape[1],
        token_ids=tokens.astype("<u4").tobytes(),
        positions=positions.astype("<u4").tobytes(),
        verdicts=np.where(np.arange(records) % 3, Verdict.ACCEPTED, Verdict.REJECTED).astype("u1").tobytes(),
        draft_ids=tokens[prompt:].astype("<u4").tobytes(),
        draft_logprobs=np.full(records, -1.0, "<f4").tobytes(),
        topk_ids=ids.astype("<u4").tobytes(),
        topk_logprobs=logprobs.astype("<f2").tobytes(),
        tail_mass=(1 - np.exp(logprobs).sum(-1)).astype("<f4").tobytes(),
        logged_at_s=1000.0,
    )


def log_requests(pair: Pair, database: Engine, client: redis.Redis) -> None:
    """Have the pair served and 60 of its requests logged, as a trainer finds them."""
    Facts(database).put(PAIR, msgspec.to_builtins(pair))
    Registry(database).install_base(
        target_fingerprint=pair.target_fingerprint, base_fingerprint=pair.base_fingerprint, actor="test"
    )
    for block in make_blocks(pair, 60, seed=4, name="q"):
        client.xadd(keys.BLOCKS, {keys.PAYLOAD_FIELD: to_wire(block)})
