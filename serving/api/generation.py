"""From a checked request to pieces of text: the part chat and plain completions share."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from adapter.contracts import Sampling
from adapter.settings import EngineSettings
from serving import ipc
from serving.api.engine_client import EngineClient
from serving.api.errors import ApiError
from serving.api.metrics import ServingMetrics
from serving.api.schema import Generation
from serving.api.text import AnswerText, TargetText

_GREEDY_BELOW = 1e-5
_SEED_MASK = (1 << 64) - 1


@dataclass(slots=True)
class Piece:
    """A stretch of answer text; the last one carries the finish reason."""

    text: str
    finish_reason: str | None = None


@dataclass(slots=True)
class Answer:
    """Token counts of one answer, complete when the last piece has been read."""

    prompt_tokens: int
    completion_tokens: int = 0
    started_s: float = field(default_factory=time.monotonic)

    def usage(self) -> dict[str, int]:
        """Return the OpenAI usage block."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Generator:
    """Run requests on the engine and turn their tokens into text."""

    def __init__(
        self, client: EngineClient, text: TargetText, settings: EngineSettings, metrics: ServingMetrics
    ) -> None:
        self._client = client
        self.text = text
        self._settings = settings
        self._metrics = metrics

    def submit_for(
        self, request: Generation, token_ids: list[int], limit: int | None, request_id: str, segment: str
    ) -> ipc.Submit:
        """Build the engine's message.

        Raises:
            ApiError: 400, naming the field, when the request cannot be served as it stands.
        """
        room = self._settings.max_model_len - len(token_ids)
        if not token_ids:
            raise ApiError(400, "the prompt is empty; give at least one token", param="prompt")
        if room < 1 or (limit or 1) > room:
            raise ApiError(
                400,
                f"the prompt has {len(token_ids)} tokens and max_tokens is {limit}; together they must not exceed "
                f"{self._settings.max_model_len}",
                param="max_tokens" if room >= 1 else "messages",
                code="context_length_exceeded",
            )
        # Below this, dividing by the temperature overflows; the law is greedy long before.
        temperature = request.temperature if request.temperature >= _GREEDY_BELOW else 0.0
        seed = request.seed if request.seed is not None else secrets.randbits(63)
        return ipc.Submit(
            request_id=request_id, token_ids=token_ids, max_tokens=limit or room,
            sampling=Sampling(
                temperature=temperature, top_p=request.top_p, top_k=request.top_k, seed=seed & _SEED_MASK
            ),
            end_tokens=self.text.end_tokens, segment=segment, gamma=self._gamma(request),
        )  # fmt: skip

    async def pieces(self, submit: ipc.Submit, stops: list[str], answer: Answer) -> AsyncGenerator[Piece, None]:
        """Yield the answer's text as it becomes certain; counts are kept in `answer`."""
        text = AnswerText(self.text, stops)
        reason = "cancelled"
        try:
            async with aclosing(self._client.generate(submit)) as rounds:
                async for tokens in rounds:
                    out = "".join(text.push(token) for token in tokens.token_ids)
                    self._metrics.tokens(answer.started_s, text.num_tokens - answer.completion_tokens)
                    answer.completion_tokens = text.num_tokens
                    reason = "stop" if text.stopped else tokens.finish_reason or ""
                    if reason == "length" or (reason == "stop" and not text.stopped):
                        out += text.finish()
                        reason = "stop" if text.stopped else reason
                    if text.stopped and tokens.finish_reason is None:
                        await self._client.end(submit.request_id, text.num_tokens, stopped=True)
                    if out or reason:
                        yield Piece(out, reason or None)
                    if reason:
                        return
        finally:
            self._metrics.finished(answer.started_s)

    def _gamma(self, request: Generation) -> int | None:
        if not request.speculative.enabled:
            return 0
        gamma = request.speculative.gamma
        if gamma is not None and gamma > self._settings.gamma_max:
            raise ApiError(
                400,
                f"'speculative.gamma' is {gamma}; this server drafts at most {self._settings.gamma_max} tokens a round",
                param="speculative.gamma",
                code="invalid_value",
            )
        return gamma
