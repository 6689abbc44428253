"""Prometheus metrics of serving: vLLM's names for what dashboards already read, ours for the rest.

Rates are divided where they are shown.  No label holds a version's number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.api.controller_metrics import controller_families
from serving.snapshot import Snapshot

_LATENCY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_Kind = type[CounterMetricFamily] | type[GaugeMetricFamily]


class EngineCollector(Collector):
    """Turn the engine's latest snapshot into metrics; exports nothing before the first one."""

    def __init__(self, snapshot: Callable[[], Snapshot | None], model_name: str) -> None:
        self._snapshot = snapshot
        self._model = model_name

    def describe(self) -> list[Metric]:
        """Name nothing in advance: the registry would otherwise collect at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        snap = self._snapshot()
        if snap is None:
            return
        for kind, name, text, value in _singles(snap):
            single = kind(name, text, labels=["model_name"])
            single.add_metric([self._model], value)
            yield single
        yield from controller_families(snap.controller, self._model)
        positions = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens kept, by position in the round.",
            labels=["model_name", "position"],
        )
        for position, count in enumerate(snap.accepted_by_position):
            positions.add_metric([self._model, str(position)], count)
        yield positions
        finished = CounterMetricFamily(
            "vllm:request_success", "Finished requests, by reason.", labels=["model_name", "finished_reason"]
        )
        for reason, count in snap.finished_by_reason.items():
            finished.add_metric([self._model, reason], count)
        yield finished


def _singles(snap: Snapshot) -> tuple[tuple[_Kind, str, str, float], ...]:
    """Every metric without labels of its own: kind, name, meaning, value."""
    counter, gauge = CounterMetricFamily, GaugeMetricFamily
    return (
        (counter, "vllm:spec_decode_num_drafts", "Rounds with at least one drafted token.", snap.rounds),
        (counter, "vllm:spec_decode_num_draft_tokens", "Drafted tokens.", snap.drafted),
        (counter, "vllm:spec_decode_num_accepted_tokens", "Drafted tokens the target kept.", snap.accepted),
        (counter, "draftsmith_examined_tokens", "Drafted tokens verification looked at.", snap.examined),
        (counter, "vllm:prompt_tokens", "Prompt tokens of finished requests.", snap.prompt_tokens),
        (counter, "draftsmith_committed_tokens", "Committed tokens, delivered or not.", snap.generated_tokens),
        (counter, "vllm:num_preemptions", "Requests that gave their cache blocks back.", snap.preempted),
        (counter, "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", snap.prefix_queries),
        (counter, "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", snap.prefix_hits),
        (counter, "draftsmith_engine_steps", "Steps of the decoding loop.", snap.steps),
        (counter, "draftsmith_engine_step_seconds", "Time inside steps.", snap.step_s),
        (counter, "draftsmith_engine_draft_seconds", "Time inside drafting.", snap.draft_s),
        (counter, "draftsmith_log_entries", "Log entries offered.", snap.log_offered),
        (counter, "draftsmith_log_dropped", "Log entries dropped because Redis was slow or gone.", snap.log_dropped),
        (counter, "draftsmith_target_not_finite", "Requests ended by NaN or infinite target logits.", snap.not_finite),
        (counter, "draftsmith_draft_not_finite", "Draft forwards with NaN or infinite logits.", snap.draft_not_finite),
        (
            counter,
            "draftsmith_undelivered",
            "Requests ended because their API process took no messages.",
            snap.undelivered,
        ),
        (counter, "draftsmith_draft_swaps", "Draft versions swapped in.", snap.swaps),
        (counter, "draftsmith_routed_requests", "Requests that an alternate was chosen for.", snap.routed),
        (gauge, "draftsmith_alternates", "Versions that may draft beside the live one.", len(snap.alternates)),
        (gauge, "vllm:num_requests_running", "Requests in the batch.", snap.running),
        (gauge, "vllm:num_requests_waiting", "Requests waiting for a place.", snap.waiting),
        (gauge, "vllm:kv_cache_usage_perc", "Share of cache blocks in use, 0 to 1.", snap.kv_usage),
        (gauge, "draftsmith_draft_generation", "Generation of the draft being served.", snap.generation),
        (gauge, "draftsmith_log_connected", "1 while the log reaches Redis.", float(snap.log_connected)),
        *_vocabulary(snap),
    )


def _vocabulary(snap: Snapshot) -> Iterator[tuple[_Kind, str, str, float]]:
    """What is said of the draft vocabulary, in the same form."""
    counter, gauge = CounterMetricFamily, GaugeMetricFamily
    rows: tuple[tuple[_Kind, str, str, float], ...] = (
        (counter, "counted", "Committed tokens held against the draft vocabulary.", snap.draft_vocab_counted),
        (counter, "inside", "Of those, tokens the draft scores; the ratio is its coverage.", snap.draft_vocab_inside),
        (gauge, "number", "Number of the draft vocabulary in force; 0 is the full one.", snap.draft_vocab_number),
        (gauge, "size", "Tokens the draft scores; 0 where it is never trimmed.", snap.draft_vocab_size),
    )
    return ((kind, f"draftsmith_draft_vocab_{name}", text, value) for kind, name, text, value in rows)


class ServingMetrics:
    """What is measured where the client sees it, in the API process: latencies, and the tokens it was sent."""

    def __init__(
        self, registry: CollectorRegistry, model_name: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock

        def histogram(name: str, text: str) -> Histogram:
            family = Histogram(name, text, ["model_name"], registry=registry, buckets=_LATENCY)
            return family.labels(model_name)

        self._first = histogram(
            "vllm:time_to_first_token_seconds", "From submission, when the prompt is tokenized, to the first token."
        )
        self._between = histogram("vllm:inter_token_latency_seconds", "Between two tokens of one answer.")
        self._total = histogram(
            "vllm:e2e_request_latency_seconds", "From submission, when the prompt is tokenized, to the last token."
        )
        self._delivered = Counter(
            "vllm:generation_tokens", "Tokens delivered, as usage counts them.", ["model_name"], registry=registry
        ).labels(model_name)

    def begin(self) -> Latency:
        """Start the clock of one answer."""
        return Latency(self._first, self._between, self._total, self._delivered, self._clock)


class Latency:
    """The clock of one answer; tokens of one round arrive together and share their gap evenly."""

    def __init__(
        self, first: Histogram, between: Histogram, total: Histogram, delivered: Counter, clock: Callable[[], float]
    ) -> None:
        self._first, self._between, self._total, self._delivered = first, between, total, delivered
        self._clock = clock
        self._started_s = clock()
        self._last_s: float | None = None

    def tokens(self, count: int) -> None:
        """Observe the arrival of `count` tokens."""
        if not count:
            return
        now = self._clock()
        self._delivered.inc(count)
        if self._last_s is None:
            self._first.observe(now - self._started_s)
        else:
            for _ in range(count):
                self._between.observe((now - self._last_s) / count)
        self._last_s = now

    def end(self) -> None:
        """Observe the end of an answer that has a finish reason; one that failed has no latency."""
        self._total.observe(self._clock() - self._started_s)
