"""Run requests on an engine in this process and measure them by the times of its steps.

Two ways: `steady` keeps a batch full from the first to the last measured token, `burst` runs a list of
requests to their ends, so many at a time, prefill included.  Knows engines, not models or HTTP.  Called
by `bench.engine` and `bench.record`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from adapter.contracts import Counts, Sampling
from serving.engine.engine import Engine
from serving.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What one run of one arm gave.

    `rounds` are of all requests and include plain ones; the counters are those of the measured time.
    """

    tokens: int
    seconds: float
    tpot_s: list[float]
    ttft_s: list[float]
    counts: Counts = field(default_factory=Counts)
    rounds: int = 0
    steps_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all requests together, a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked: prompts as token ids, and how each is sampled.

    `salt` keeps a run apart from all others: neither cached prefixes nor remembered outputs cross it.
    """

    prompts: list[list[int]]
    segment: str
    salt: str
    temperature: float = 0.0
    gamma: int | None = None

    def request(self, index: int, max_tokens: int, now_s: float) -> Sequence:
        """Build the request of one prompt; it never ends by an end token."""
        ids = self.prompts[index]
        return Sequence(
            request_id=f"{self.salt}/{index}", tokens=list(ids), prompt_tokens=len(ids), max_tokens=max_tokens,
            sampling=Sampling(temperature=self.temperature, seed=index + 1), end_tokens=frozenset(),
            segment=self.segment, gamma=self.gamma, arrived_s=now_s, cache_salt=self.salt,
        )  # fmt: skip


@dataclass(slots=True)
class _Watch:
    """When the tokens of each request came."""

    begun: dict[str, float] = field(default_factory=dict)
    first: dict[str, tuple[float, int]] = field(default_factory=dict)  # time, tokens it came with
    last: dict[str, tuple[float, int]] = field(default_factory=dict)  # time, tokens until then

    def hear(self, request_id: str, count: int, now_s: float) -> None:
        if not count:
            return
        before = self.last.get(request_id, (0.0, 0))[1]
        self.first.setdefault(request_id, (now_s, count))
        self.last[request_id] = (now_s, before + count)

    def tpot_s(self) -> list[float]:
        found = []
        for name, (first_s, came) in self.first.items():
            last_s, total = self.last[name]
            if total > came:
                found.append((last_s - first_s) / (total - came))
        return found

    def ttft_s(self) -> list[float]:
        return [time_s - self.begun[name] for name, (time_s, _) in self.first.items()]


def longest_answer(prompts: list[list[int]], num_tokens: int, gamma_max: int, prefill_tokens: int) -> int:
    """Most tokens one request can gain in `steady`: a lucky one runs ahead while others read and decode."""
    prefill_steps = sum(len(prompt) for prompt in prompts) // prefill_tokens + len(prompts)
    return (gamma_max + 1) * (num_tokens + prefill_steps)


def steady(
    engine: Engine, load: Load, num_tokens: int, limit: int, clock: Callable[[], float] = time.perf_counter
) -> Window:
    """Decode all prompts together and measure while every one of them decodes.

    The measured time begins when the last request has its first token and ends when `num_tokens` a
    request were added, all requests together; nobody has ended by then, and all are cancelled.  So each
    arm delivers the same number of tokens from a full batch, up to the last round's.

    Args:
        num_tokens: measured tokens a request, on average.
        limit: max_tokens of each request; `longest_answer` says how many are enough.
    """
    requests = [load.request(index, limit, clock()) for index in range(len(load.prompts))]
    watch = _Watch()
    for request in requests:
        watch.begun[request.request_id] = clock()
        engine.submit(request)
    while len(watch.first) < len(requests):
        _step(engine, watch, clock)
    before, rounds_before = _counted(requests)
    begin_s, begin_tokens = clock(), _generated(requests)
    decoding = _Watch(begun=watch.begun)
    for request in requests:
        decoding.first[request.request_id] = (begin_s, request.num_generated)
        decoding.last[request.request_id] = (begin_s, request.num_generated)
    steps_s = []
    while _generated(requests) - begin_tokens < num_tokens * len(requests):
        steps_s.append(_step(engine, decoding, clock))
    seconds, tokens = clock() - begin_s, _generated(requests) - begin_tokens
    after, rounds_after = _counted(requests)
    for request in requests:
        engine.end(request.request_id, "cancelled")
    return Window(
        tokens=tokens, seconds=seconds, tpot_s=decoding.tpot_s(), ttft_s=watch.ttft_s(), counts=_less(after, before),
        rounds=rounds_after - rounds_before, steps_s=steps_s,
    )  # fmt: skip


def burst(
    engine: Engine, load: Load, num_tokens: list[int], batch: int, clock: Callable[[], float] = time.perf_counter
) -> Window:
    """Run every prompt to its end, `batch` at a time, each with its own number of tokens; prefill counts."""
    requests: list[Sequence] = []
    watch = _Watch()
    begin_s = clock()
    steps_s = []
    running = 0
    while running or len(requests) < len(load.prompts):
        while running < batch and len(requests) < len(load.prompts):
            request = load.request(len(requests), num_tokens[len(requests)], clock())
            requests.append(request)
            watch.begun[request.request_id] = clock()
            engine.submit(request)
            running += 1
        steps_s.append(_step(engine, watch, clock))
        running = sum(request.finish_reason is None for request in requests)
    seconds = clock() - begin_s
    counts, rounds = _counted(requests)
    return Window(
        tokens=_generated(requests), seconds=seconds, tpot_s=watch.tpot_s(), ttft_s=watch.ttft_s(), counts=counts,
        rounds=rounds, steps_s=steps_s,
    )  # fmt: skip


def _step(engine: Engine, watch: _Watch, clock: Callable[[], float]) -> float:
    begin_s = clock()
    deliveries = engine.step()
    now_s = clock()
    for delivery in deliveries:
        watch.hear(delivery.request_id, len(delivery.token_ids), now_s)
    return now_s - begin_s


def _generated(requests: list[Sequence]) -> int:
    return sum(request.num_generated for request in requests)


def _counted(requests: list[Sequence]) -> tuple[Counts, int]:
    """Return the counters of all drafted rounds so far, and how many rounds of any kind there were."""
    counts = sum((one for request in requests for one in request.by_version.values()), Counts())
    counts = sum((request.unversioned for request in requests), counts)
    return counts, counts.num_rounds + sum(request.plain_rounds for request in requests)


def _less(after: Counts, before: Counts) -> Counts:
    names = ("num_rounds", "num_drafted", "num_examined", "num_accepted")
    return Counts(**{name: getattr(after, name) - getattr(before, name) for name in names})
