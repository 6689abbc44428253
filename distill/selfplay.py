"""Let an instruct model write both sides of a chat, and keep what it thought at each token.

A distilled draft needs text its target would write.  An instruct model started right after the
user header of its own chat template writes a plausible user turn; the turn markers are then forced
and it answers, and so on.  Every row of a batch starts from the same prefix and is extended by one
token a step, so no row is padded and no step is wasted.  Beside each token we keep the target's
top-k log-probs and tail mass, so that training never runs the target again.

Knows nothing about drafts or losses.  Called by `distill.bootstrap`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from adapter.contracts import SettingsError
from kernels.dispatch import sparse_log_probs

ANSWER_TEMPERATURES = (0.0, 0.0, 0.7, 1.0)  # half of the rows answer greedily, as most traffic does
USER_TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True)
class Turns:
    """Token ids of the chat markers around which self-play is forced."""

    prefix: list[int]  # everything before the first user turn's text
    to_assistant: list[int]  # after a user turn's end-of-turn token
    to_user: list[int]  # after an answer's end-of-turn token
    end_of_turn: int


@dataclass(frozen=True, slots=True)
class SelfPlay:
    """A batch of self-written chats with the target's view of every next token.

    Shapes:
        token_ids: [rows, length] int32; topk_ids: [rows, length - 1, k] int32;
        topk_logprobs: [rows, length - 1, k] float16, natural log, temperature 1.
        Index t of the teacher tensors describes the law of token_ids[:, t + 1].
        answer_mask: [rows, length - 1] bool, true where token t + 1 belongs to an answer.
        free_mask: the same, true where the target chose the token (markers are forced).
    """

    token_ids: torch.Tensor
    topk_ids: torch.Tensor
    topk_logprobs: torch.Tensor
    answer_mask: torch.Tensor
    free_mask: torch.Tensor


class _PreallocatedLayer(DynamicLayer):
    """A KV layer that writes in place: growing by concatenation copies the cache every step."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.used = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.used == 0:
            batch, heads, _q, dim = key_states.shape
            self.keys = key_states.new_empty(batch, heads, self.length, dim)
            self.values = torch.empty_like(self.keys)
        end = self.used + key_states.shape[2]
        self.keys[:, :, self.used : end] = key_states
        self.values[:, :, self.used : end] = value_states
        self.used = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return self.used


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with grouped heads folded into the query length, so that keys are never expanded.

    Exact for a single new token per row; several new tokens attend causally.
    Shapes: query [batch, heads, q, dim]; key and value [batch, kv_heads, length, dim].
    """
    batch, heads, q_len, dim = query.shape
    kv_heads = key.shape[1]
    if q_len == 1:
        folded = query.reshape(batch, kv_heads, heads // kv_heads, dim)
        out = torch.nn.functional.scaled_dot_product_attention(folded, key, value, scale=scaling)
        return out.reshape(batch, 1, heads, dim), None
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def chat_turns(tokenizer: Any) -> Turns:
    """Read the turn markers off the tokenizer's own chat template.

    Raises:
        SettingsError: there is no template, or it does not place user and assistant text between fixed markers.
    """
    user, answer = "\x00USER\x00", "\x00ANSWER\x00"
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": user}]
    if not tokenizer.chat_template:
        raise SettingsError("the target has no chat template; self-play needs its turn markers")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    try:
        prefix, rest = text.split(user, 1)
        between, rest = rest.split(answer, 1)
        to_user, _ = rest.split(user, 1)
    except ValueError:
        raise SettingsError(
            "the target's chat template does not keep user and assistant text verbatim; "
            "self-play needs a template with plain turn markers"
        ) from None
    end_of_turn = tokenizer.eos_token_id

    def marker(piece: str) -> list[int]:
        ids = tokenizer.encode(piece, add_special_tokens=False)
        return ids[1:] if ids and ids[0] == end_of_turn else ids

    prefix_ids = tokenizer.encode(prefix, add_special_tokens=False)
    return Turns(prefix_ids, marker(between), marker(to_user), end_of_turn)


def _pick(
    logits: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    temperature: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Sample each row from its top-k at its own temperature (0 is greedy)."""
    safe = temperature.clamp_min(1e-3)[:, None]
    law = torch.softmax(logprobs / safe, dim=-1)
    slot = torch.multinomial(law, 1, generator=generator).squeeze(1)
    slot = torch.where(temperature > 0, slot, logprobs.argmax(-1))
    return ids.gather(1, slot[:, None]).squeeze(1)


@torch.inference_mode()
def write_chats(
    model: Any,
    turns: Turns,
    *,
    rows: int,
    length: int,
    seed: int,
    top_k: int = 32,
    openings: Sequence[list[int]] = (),
    opened: float = 0.0,
    on_step: Callable[[int], None] = lambda tokens: None,
) -> SelfPlay:
    """Let `model` write `rows` chats of exactly `length` tokens each.

    Shapes: see `SelfPlay`.  A share `opened` of the chats begins with one of `openings`, token ids of a user turn's
    first words.  `on_step` hears the number of tokens written by each step.
    """
    generator = torch.Generator().manual_seed(seed)
    model.set_attn_implementation("draftsmith_grouped")
    cache = Cache(layers=[_PreallocatedLayer(length) for _ in range(model.config.num_hidden_layers)])
    tokens = torch.full((rows, length), turns.end_of_turn, dtype=torch.long)
    start = len(turns.prefix)
    tokens[:, :start] = torch.tensor(turns.prefix)
    kept_ids = torch.zeros(rows, length - 1, top_k, dtype=torch.int32)
    kept_logprobs = torch.zeros(rows, length - 1, top_k, dtype=torch.float16)
    answering = torch.zeros(rows, length, dtype=torch.bool)
    free = torch.zeros(rows, length, dtype=torch.bool)
    choice = torch.randint(len(ANSWER_TEMPERATURES), (rows,), generator=generator)
    answer_temperature = torch.tensor(ANSWER_TEMPERATURES)[choice]
    forced: list[list[int]] = [[] for _ in range(rows)]
    if openings:
        begins = torch.rand(rows, generator=generator) < opened
        which = torch.randint(len(openings), (rows,), generator=generator)
        forced = [list(openings[int(which[row])]) if begins[row] else [] for row in range(rows)]
    in_answer = torch.zeros(rows, dtype=torch.bool)
    new = tokens[:, :start]
    for position in range(start, length):
        out = model(input_ids=new, past_key_values=cache, logits_to_keep=1, use_cache=True)
        logits = out.logits[:, -1].float()
        ids, logprobs = sparse_log_probs(logits, top_k)
        kept_ids[:, position - 1] = ids.int()
        kept_logprobs[:, position - 1] = logprobs.half()
        temperature = torch.where(in_answer, answer_temperature, torch.tensor(USER_TEMPERATURE))
        chosen = _pick(logits, ids, logprobs, temperature, generator)
        answering[:, position] = in_answer
        for row in range(rows):
            if forced[row]:
                chosen[row] = forced[row].pop(0)
                continue
            free[row, position] = True
            if int(chosen[row]) == turns.end_of_turn:
                forced[row] = list(turns.to_user if in_answer[row] else turns.to_assistant)
                in_answer[row] = not in_answer[row]
        tokens[:, position] = chosen
        new = chosen[:, None]
        on_step(rows)
    return SelfPlay(tokens.int(), kept_ids, kept_logprobs, answering[:, 1:], free[:, 1:])
