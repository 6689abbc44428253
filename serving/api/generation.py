"""From a checked request to pieces of its answers: the part chat and plain completions share."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from adapter.contracts import Grammar, Sampling
from adapter.sections import ApiSettings, EngineSettings
from serving import ipc
from serving.api.answer import AnswerText
from serving.api.choices import Choice, Choices, Piece, derived_seed
from serving.api.engine_client import EngineClient
from serving.api.errors import ApiError, check_text
from serving.api.metrics import ServingMetrics
from serving.api.origin import Origin
from serving.api.schema import Generation
from serving.api.text import TargetText

_GREEDY_BELOW = 1e-5


class Generator:
    """Run requests on the engine and turn their tokens into text."""

    def __init__(
        self, client: EngineClient, text: TargetText, engine: EngineSettings, api: ApiSettings, metrics: ServingMetrics
    ) -> None:
        self._client = client
        self.text = text
        self.engine = engine
        self.api = api
        self._metrics = metrics

    def choices_for(
        self,
        request: Generation,
        prompts: list[list[int]],
        request_id: str,
        origin: Origin,
        *,
        show_special: bool = False,
    ) -> Choices:
        """Build the engine's messages, one for each answer.

        Raises:
            ApiError: 400, naming the field, when the request cannot be served as it stands.
        """
        total = len(prompts) * request.n
        limits = [self._limit(request, ids) for ids in prompts]
        samplings = self._samplings(request, len(prompts))
        end_tokens = self._end_tokens(request)
        grammar = _grammar(request)
        choices = Choices(prompts, request.n)
        for index in range(total):
            prompt = index // request.n
            submit = ipc.Submit(
                request_id=request_id if total == 1 else f"{request_id}-{index}", token_ids=prompts[prompt],
                max_tokens=limits[prompt], sampling=samplings[index], end_tokens=end_tokens,
                segment=origin.segment, tenant=origin.tenant, learn=origin.learn, gamma=self._gamma(request),
                version=request.speculative.version, grammar=grammar,
                logprobs=request.num_logprobs, priority=request.priority, cache_salt=request.cache_salt or "",
            )  # fmt: skip
            answer = AnswerText(
                self.text, request.stop, prompt=prompts[prompt], min_tokens=request.min_tokens,
                keep_stop=request.include_stop_str_in_output,
                skip_special=request.skip_special_tokens and not show_special,
            )  # fmt: skip
            choices.items.append(
                Choice(index, submit, answer, frozenset(request.stop_token_ids), request.include_stop_str_in_output)
            )
        return choices

    def pieces(self, choices: Choices) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of all answers as they come; closing the iterator frees their slots."""
        streams = [self._one(choice) for choice in choices.items]
        return streams[0] if len(streams) == 1 else _merge(streams)

    async def _one(self, choice: Choice) -> AsyncGenerator[Piece, None]:
        latency = self._metrics.begin()
        try:
            async with aclosing(self._client.generate(choice.submit)) as rounds:
                async for tokens in rounds:
                    if choice.finished:  # its stop string was found; only the engine's summary is missing
                        choice.summary = tokens.summary or choice.summary
                        continue
                    piece = choice.take(tokens)
                    latency.tokens(len(piece.token_ids))
                    if choice.finished:
                        latency.end()
                        if tokens.finish_reason is None:
                            self._client.finish(choice.submit.request_id, choice.num_tokens)
                    yield piece
        except ApiError:
            if not choice.finished:  # a complete answer is worth more than its summary
                raise

    # -- checks, the first two before the rest is built -----------------------------------------

    def check_count(self, request: Generation, num_prompts: int) -> None:
        """Refuse a request for more answers than one may ask for.

        Raises:
            ApiError: 400.
        """
        if num_prompts * request.n > self.api.max_choices:
            raise ApiError(
                400, f"{num_prompts} prompts times n = {request.n} are {num_prompts * request.n} answers; this server "
                f"gives at most {self.api.max_choices} a request", param="n", code="invalid_value",
            )  # fmt: skip

    def read_prompts(self, prompts: list[str | list[int]]) -> list[list[int]]:
        """Return the token ids of plain prompts; takes its time, so not on the event loop.

        Raises:
            ApiError: 400 when one is too long for the model's context, or is no text or token ids of this model.
        """
        return [self._read(prompt) for prompt in prompts]

    def _read(self, prompt: str | list[int]) -> list[int]:
        most = self.engine.max_model_len
        if isinstance(prompt, str):
            self.text.check_length(prompt, most)
            return self.text.encode(prompt)
        if len(prompt) < most:  # a longer one is refused by its length
            for token in prompt:
                self.check_token(token, "prompt")
        return prompt

    def _limit(self, request: Generation, token_ids: list[int]) -> int:
        """Return the most tokens the answer to this prompt may have."""
        limit, most = request.token_limit, self.engine.max_model_len
        room = most - len(token_ids)
        param = "messages" if hasattr(request, "messages") else "prompt"
        if not token_ids:
            raise ApiError(400, "the prompt is empty; give at least one token", param=param)
        if room < 1:
            raise ApiError(
                400, f"the prompt has {len(token_ids)} tokens; this model's context holds {most}, the answer included",
                param=param, code="context_length_exceeded",
            )  # fmt: skip
        for name, wanted in ((request.limit_name, limit or 1), ("min_tokens", request.min_tokens)):
            if wanted > room:
                raise ApiError(
                    400, f"the prompt has {len(token_ids)} tokens and '{name}' is {wanted}; together they must not "
                    f"exceed {most}, which leaves {room}", param=name, code="context_length_exceeded",
                )  # fmt: skip
        return limit or min(request.default_limit or room, room)

    def _samplings(self, request: Generation, num_prompts: int) -> list[Sampling]:
        """Return the parameters of each answer, prompt by prompt; they differ in their seeds only."""
        for token in request.logit_bias:
            self.check_token(token, "logit_bias")
        bias = tuple(sorted(request.logit_bias.items()))
        # Below this, dividing by the temperature overflows; the law is greedy long before.
        temperature = request.temperature if request.temperature >= _GREEDY_BELOW else 0.0
        return [
            Sampling(
                temperature=temperature, top_p=request.top_p, top_k=request.top_k, min_p=request.min_p, seed=seed,
                presence_penalty=request.presence_penalty, frequency_penalty=request.frequency_penalty,
                repetition_penalty=request.repetition_penalty, min_tokens=request.min_tokens, logit_bias=bias,
            )
            for _ in range(num_prompts)
            for seed in _seeds(request)
        ]  # fmt: skip

    def _end_tokens(self, request: Generation) -> list[int]:
        for token in request.stop_token_ids:
            self.check_token(token, "stop_token_ids")
        own = [] if request.ignore_eos else self.text.end_tokens
        return [*own, *(token for token in dict.fromkeys(request.stop_token_ids) if token not in own)]

    def check_token(self, token: int, param: str) -> None:
        """Refuse a token id that the target does not have.

        Raises:
            ApiError: 400, naming the field.
        """
        if not 0 <= token < self.text.vocab_size:
            text = f"'{param}': token id {token} is outside 0..{self.text.vocab_size - 1}"
            raise ApiError(400, text, param=param, code="invalid_value")

    def most_drafted(self, request: Generation) -> int:
        """Return the most tokens a round of this request may draft, 0 where speculation is off.

        Raises:
            ApiError: 400 when the request names more than the server drafts.
        """
        gamma = self._gamma(request)
        if gamma is not None:
            return gamma
        return self.engine.gamma if self.engine.controller == "fixed" else self.engine.gamma_max

    def _gamma(self, request: Generation) -> int | None:
        if not request.speculative.enabled:
            return 0
        gamma = request.speculative.gamma
        if gamma is not None and gamma > self.engine.gamma_max:
            raise ApiError(
                400,
                f"'speculative.gamma' is {gamma}; this server drafts at most {self.engine.gamma_max} tokens a round",
                param="speculative.gamma",
                code="invalid_value",
            )
        return gamma


def _seeds(request: Generation) -> list[int]:
    """Return the seeds of the answers to one prompt: the same for every prompt if one was given, else fresh ones."""
    if request.seed is None:
        return [secrets.randbits(63) for _ in range(request.n)]
    return [derived_seed(request.seed, i) for i in range(request.n)]


def _grammar(request: Generation) -> Grammar | None:
    form = request.response_format
    if form is None or form.type == "text":
        return None
    if form.json_schema is None:
        return Grammar(kind="json_object")
    schema = json.dumps(form.json_schema.content, ensure_ascii=False)
    check_text(schema, "response_format.json_schema.schema")
    return Grammar(kind="json_schema", schema=schema)


async def _merge(streams: list[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Yield from several streams as their items come; the first error ends them all."""
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    async def drain(stream: AsyncIterator[Piece]) -> None:
        try:
            async with aclosing(stream):  # type: ignore[type-var]
                async for item in stream:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
