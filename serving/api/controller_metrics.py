"""What the controller says of itself, as metrics.  Called by `EngineCollector`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


def controller_families(explained: dict[str, Any] | None, model_name: str) -> Iterator[Metric]:
    """Yield the families; what was not measured yet has no value, which is not 0.

    Args:
        explained: what `Controller.explain` returned, empty before the engine said anything.
    """
    told = explained or {}
    switchback = told.get("switchback") or {}
    speedup = switchback.get("speedup") or {}
    for name, text, value in (
        ("draftsmith_gamma_mean", "Tokens drafted a request and step, over recent steps.", told.get("gamma_mean")),
        ("draftsmith_bypass_active", "1 while speculation is off because it measured slower.", _flag(switchback)),
    ):
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        if value is not None:
            family.add_metric([model_name], float(value))
        yield family
    measured = GaugeMetricFamily(
        "draftsmith_speedup_measured",
        "Tokens per second over those without speculation, by plain windows at random times; low and high are 95 %.",
        labels=["model_name", "bound"],
    )
    for bound, key in (("estimate", "ratio"), ("low", "low"), ("high", "high")):
        if key in speedup:
            measured.add_metric([model_name, bound], float(speedup[key]))
    yield measured
    choices = CounterMetricFamily(
        "draftsmith_controller_choices", "Steps by why they drafted as they did.", labels=["model_name", "reason"]
    )
    for reason, count in (told.get("reasons") or {}).items():
        choices.add_metric([model_name, reason], count)
    yield choices


def _flag(switchback: dict[str, Any]) -> float | None:
    return float(switchback["bypass"]) if "bypass" in switchback else None
