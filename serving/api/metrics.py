"""Prometheus metrics of serving: vLLM's names for what dashboards already read, ours for the rest.

Counters only; rates are divided where they are shown.  Version labels are live and floor, never
version numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.snapshot import Snapshot

_LATENCY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


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
        for name, text, value in (
            ("vllm:spec_decode_num_drafts", "Rounds with at least one drafted token.", snap.rounds),
            ("vllm:spec_decode_num_draft_tokens", "Drafted tokens.", snap.drafted),
            ("vllm:spec_decode_num_accepted_tokens", "Drafted tokens the target kept.", snap.accepted),
            ("draftsmith_examined_tokens", "Drafted tokens verification looked at.", snap.examined),
            ("vllm:prompt_tokens", "Prompt tokens of finished requests.", snap.prompt_tokens),
            ("vllm:generation_tokens", "Committed tokens.", snap.generated_tokens),
            ("vllm:num_preemptions", "Requests that gave their cache blocks back.", snap.preempted),
            ("draftsmith_engine_steps", "Steps of the decoding loop.", snap.steps),
            ("draftsmith_engine_step_seconds", "Time inside steps.", snap.step_s),
            ("draftsmith_engine_draft_seconds", "Time inside drafting.", snap.draft_s),
            ("draftsmith_log_entries", "Log entries offered.", snap.log_offered),
            ("draftsmith_log_dropped", "Log entries dropped because Redis was slow or gone.", snap.log_dropped),
            ("draftsmith_draft_swaps", "Draft versions swapped in.", snap.swaps),
        ):
            yield self._family(CounterMetricFamily, name, text, value)
        for name, text, level in (
            ("vllm:num_requests_running", "Requests in the batch.", snap.running),
            ("vllm:num_requests_waiting", "Requests waiting for a place.", snap.waiting),
            ("vllm:kv_cache_usage_perc", "Share of cache blocks in use, 0 to 1.", snap.kv_usage),
            ("draftsmith_draft_generation", "Generation of the draft being served.", snap.generation),
            ("draftsmith_log_connected", "1 while the log reaches Redis.", float(snap.log_connected)),
        ):
            yield self._family(GaugeMetricFamily, name, text, level)
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

    def _family(
        self, kind: type[CounterMetricFamily] | type[GaugeMetricFamily], name: str, text: str, value: float
    ) -> Metric:
        family = kind(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family


class ServingMetrics:
    """Latency histograms measured where the client sees them, in the API process."""

    def __init__(
        self, registry: CollectorRegistry, model_name: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock

        def histogram(name: str, text: str) -> Histogram:
            family = Histogram(name, text, ["model_name"], registry=registry, buckets=_LATENCY)
            return family.labels(model_name)

        self._first = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.")
        self._between = histogram("vllm:inter_token_latency_seconds", "Between two tokens of one answer.")
        self._total = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.")
        self._last: dict[float, float] = {}

    def tokens(self, started_s: float, count: int) -> None:
        """Observe the arrival of `count` tokens of the answer that started at `started_s`.

        Tokens of one round arrive together; their gap is shared evenly.
        """
        now = self._clock()
        before = self._last.get(started_s)
        self._last[started_s] = now
        if before is None:
            self._first.observe(now - started_s)
            return
        for _ in range(count):
            self._between.observe((now - before) / count)

    def finished(self, started_s: float) -> None:
        """Observe the end of the answer that started at `started_s`."""
        self._last.pop(started_s, None)
        self._total.observe(self._clock() - started_s)
