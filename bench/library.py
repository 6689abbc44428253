"""What transformers itself does with the same pair: `generate`, plain and with the draft as assistant.

One request after another, since its assisted generation takes no batch.  Times are those at which the
library hands out tokens.  Called by `bench.engine`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from adapter.contracts import Counts
from adapter.models import DTYPES, load_draft, load_target
from adapter.pairs import Pair
from bench.driver import Load, Window

ASSISTANT_TOKENS = 3
ARMS = ("hf_generate", "hf_assisted")


@dataclass(slots=True)
class _Heard(BaseStreamer):  # type: ignore[misc]
    """When tokens came; the first call carries the prompt."""

    times: list[tuple[float, int]] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        self.times.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        return None


class Library:
    """Target and draft as stock transformers models, in the pair's dtype."""

    def __init__(self, pair: Pair) -> None:
        self._target = load_target(pair)
        self._draft: Any = None
        if pair.draft_kind == "model":
            self._draft = AutoModelForCausalLM.from_pretrained(pair.draft_path, dtype=DTYPES[pair.dtype]).eval()
        elif pair.draft_kind == "pruned":
            self._draft = load_draft(pair, DTYPES[pair.dtype], shared=self._target)
        for model in (self._target, self._draft):
            if model is not None:  # the pair's own habits about ending and sampling are not measured here
                model.generation_config = GenerationConfig(pad_token_id=0)
        if self._draft is not None:
            self._draft.generation_config.num_assistant_tokens = ASSISTANT_TOKENS
            self._draft.generation_config.num_assistant_tokens_schedule = "constant"

    @property
    def arms(self) -> tuple[str, ...]:
        """What can be measured with this pair."""
        return ARMS if self._draft is not None else ARMS[:1]

    def run(self, arm: str, load: Load, num_tokens: int) -> Window:
        """Answer every prompt, one after another; time between first and last token counts, as in `steady`."""
        tokens, seconds, tpot_s, ttft_s, calls = 0, 0.0, [], [], 0
        first = 1 + (ASSISTANT_TOKENS if arm == "hf_assisted" else 0)  # the first round's tokens are not measured
        for ids in load.prompts:
            heard = _Heard()
            assistant = {"assistant_model": self._draft} if arm == "hf_assisted" else {}
            begin_s = time.perf_counter()
            with torch.inference_mode():
                self._target.generate(
                    torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                    max_new_tokens=num_tokens + first, do_sample=False, streamer=heard, **assistant,
                )  # fmt: skip
            (first_s, came), (last_s, _) = heard.times[1], heard.times[-1]
            gained = sum(count for _, count in heard.times[1:]) - came
            tokens, seconds, calls = tokens + gained, seconds + last_s - first_s, calls + len(heard.times) - 2
            ttft_s.append(first_s - begin_s)
            tpot_s.append((last_s - first_s) / max(1, gained))
        counts = Counts(num_rounds=calls, num_accepted=tokens - calls) if arm == "hf_assisted" else Counts()
        return Window(tokens=tokens, seconds=seconds, tpot_s=tpot_s, ttft_s=ttft_s, counts=counts, rounds=calls)
