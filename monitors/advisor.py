"""Should this traffic be speculated on?  An answer with its numbers, and what would pay instead.

A measured speed-up decides wherever its interval leaves out 1; the rules below speak when it does
not, and explain it when it does.  Their limits are bands that production teams report
(docs/advice.md); they are rules of thumb, and the text says so.  Pure functions over counts; the
watcher calls them, the CLI and the dashboard show the result.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from monitors.traffic import Traffic

MIN_REQUESTS = 30
_SMALL_SEGMENT = 20  # requests below which a segment's acceptance is not quoted

Leaning = Literal["for", "against", "neutral"]
Verdict = Literal["speculate", "do not speculate", "undecided", "too little traffic"]


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine says about itself; None where it said nothing yet.

    `median_batch` is over decoding steps, `kv_usage` a share; the speed-up is tokens per second
    with speculation over without, with a 95 % interval over `speedup_windows` pairs of windows.
    """

    median_batch: float | None = None
    kv_usage: float | None = None
    preempted: int = 0
    prefix_cache: bool = True
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    speedup_windows: int = 0
    controller: str | None = None


def load_of(said: dict[str, Any], *, prefix_cache: bool) -> EngineLoad:
    """Read the engine's own document; what it does not say stays unknown."""
    switchback = (said.get("controller") or {}).get("switchback") or {}
    measured = switchback.get("speedup") or {}
    return EngineLoad(
        median_batch=said.get("median_batch"), kv_usage=said.get("kv_usage"), preempted=said.get("preempted", 0),
        prefix_cache=prefix_cache, speedup=measured.get("ratio"), speedup_low=measured.get("low"),
        speedup_high=measured.get("high"), speedup_windows=switchback.get("pairs", 0),
        controller=(said.get("controller") or {}).get("controller"),
    )  # fmt: skip


class Signal(msgspec.Struct, frozen=True, kw_only=True):
    """One number and which way it points."""

    name: str
    value: float | None
    leaning: Leaning
    sentence: str


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, the sentence that gives its reason, every signal, and what else would pay."""

    verdict: Verdict
    sentence: str
    requests: int
    signals: tuple[Signal, ...]
    instead: tuple[str, ...]


def advise(traffic: Traffic | None, load: EngineLoad) -> Advice:
    """Weigh live traffic."""
    if traffic is None or traffic.requests < MIN_REQUESTS:
        seen = traffic.requests if traffic else 0
        sentence = f"{seen} finished requests seen; advice needs {MIN_REQUESTS}."
        return Advice(verdict="too little traffic", sentence=sentence, requests=seen, signals=(), instead=())
    measured = _measured(load)
    rules = (_batch(load), _prefill(traffic), _acceptance(traffic), _length(traffic), _heat(traffic), _memory(load))
    signals = (measured, *rules)
    verdict, sentence = _decide(measured, rules)
    return Advice(
        verdict=verdict, sentence=sentence, requests=traffic.requests, signals=signals, instead=_instead(traffic, load)
    )


def _decide(measured: Signal, rules: tuple[Signal, ...]) -> tuple[Verdict, str]:
    if measured.leaning == "for":
        return "speculate", f"Speculation pays here. {measured.sentence}"
    if measured.leaning == "against":
        return "do not speculate", f"Speculation costs speed here. {measured.sentence}"
    against = [rule for rule in rules if rule.leaning == "against"]
    favour = [rule for rule in rules if rule.leaning == "for"]
    why = f"{measured.sentence} By rules of thumb, {len(favour)} of {len(rules)} signs speak for it"
    if against:
        names = " and ".join(rule.name for rule in against)
        return ("do not speculate" if len(against) > len(favour) else "undecided"), f"{why}; against it: {names}."
    return ("speculate" if len(favour) >= 3 else "undecided"), f"{why} and none against."


def _measured(load: EngineLoad) -> Signal:
    low, high, value = load.speedup_low, load.speedup_high, load.speedup
    if value is None or low is None or high is None:
        return Signal(name="measured speed-up", value=None, leaning="neutral", sentence=_why_unmeasured(load))
    interval = f"[{low:.2f}, {high:.2f}] over {load.speedup_windows} pairs of windows"
    text = f"Measured {value:.2f}x against no speculation {interval}."
    leaning: Leaning = "for" if low > 1 else "against" if high < 1 else "neutral"
    return Signal(name="measured speed-up", value=value, leaning=leaning, sentence=text)


def _why_unmeasured(load: EngineLoad) -> str:
    if load.controller == "fixed":
        return "The speed-up is not measured: only `engine.controller` = adaptive measures it."
    return (
        "The speed-up is not measured yet: that takes `engine.switchback_share` above 0, and traffic of "
        "which most steps draft; where the controller seldom drafts there is nothing to compare."
    )


def _band(
    name: str, value: float | None, text: str, *, good: bool, bad: bool, unknown: str = "not known yet"
) -> Signal:
    if value is None:
        return Signal(name=name, value=None, leaning="neutral", sentence=f"{name}: {unknown}.")
    leaning: Leaning = "for" if good else "against" if bad else "neutral"
    return Signal(name=name, value=value, leaning=leaning, sentence=text)


def _batch(load: EngineLoad) -> Signal:
    value = load.median_batch
    shown = 0.0 if value is None else value
    text = f"Half of all decoding steps run {shown:.0f} requests or fewer; under 4 usually wins, from 32 it loses."
    return _band("decode batch", value, text, good=shown < 4, bad=shown >= 32)


def _prefill(traffic: Traffic) -> Signal:
    value = traffic.prefill_ratio
    shown = value or 0.0
    text = f"{shown:.1f} prompt tokens are computed for each token delivered; where reading dominates, drafting adds."
    return _band("prefill per delivered token", value, text, good=shown < 2, bad=shown > 15)


def _acceptance(traffic: Traffic) -> Signal:
    value = traffic.counts.acceptance
    shown = value or 0.0
    text = f"The draft is right {shown:.0%} of the time; above 65 % it gains, below 55 % the arithmetic rarely works."
    return _band(
        "acceptance", value, text, good=shown > 0.65, bad=shown < 0.55, unknown="nothing was drafted by a model"
    )


def _length(traffic: Traffic) -> Signal:
    value = traffic.median_delivered
    text = f"Half of all answers have {value:.0f} tokens or fewer; under 20 there is little to gain, over 50 enough."
    return _band("answer length", value, text, good=value > 50, bad=value < 20)


def _heat(traffic: Traffic) -> Signal:
    value = traffic.median_temperature
    text = f"The median temperature is {value:.1f}; above 1 drafts are seldom right."
    return _band("temperature", value, text, good=value <= 0.3, bad=value > 1.0)


def _memory(load: EngineLoad) -> Signal:
    value = load.kv_usage
    shown = value or 0.0
    text = f"{shown:.0%} of the KV cache is held and {load.preempted} requests had to start over for want of it."
    return _band("memory", value, text, good=shown < 0.7 and not load.preempted, bad=shown > 0.9 or load.preempted > 0)


def _instead(traffic: Traffic, load: EngineLoad) -> tuple[str, ...]:
    """Say what else would pay, each with the number that suggests it."""
    found = []
    ratio, cached = traffic.prefill_ratio, traffic.cached_share or 0.0
    if not load.prefix_cache and ratio is not None and ratio > 4:
        found.append(
            f"Prefix cache: switch `engine.prefix_cache` on; {ratio:.1f} prompt tokens are computed for each delivered."
        )
    elif ratio is not None and ratio > 15 and cached < 0.2:
        found.append(
            f"Prompt order: only {cached:.0%} of prompt tokens are found in the prefix cache; put what requests share "
            "(instructions, documents) before what differs."
        )
    deep = traffic.accepted_share if load.controller == "fixed" else ()  # an adaptive one drafts as far as it pays
    if len(deep) > 1 and deep[-1] < 0.1:
        useful = next(i for i, share in enumerate(deep) if share < 0.1)
        found.append(
            f"Smaller gamma: the draft's token {useful + 1} is kept in {deep[useful]:.0%} of rounds; "
            f"`engine.gamma` of {max(1, useful)} loses little."
        )
    found += _about_the_draft(traffic)
    matched = traffic.matched.acceptance
    if matched is not None and matched > (traffic.counts.acceptance or 0.0) + 0.1:
        found.append(
            f"Matching: text copied from prompt and past outputs is right {matched:.0%} of the time, more than the "
            "draft; such traffic may need no draft model at all."
        )
    return tuple(found)


def _about_the_draft(traffic: Traffic) -> list[str]:
    overall = traffic.counts.acceptance
    if overall is None:
        return []
    weak = {
        name: item.counts.acceptance
        for name, item in traffic.segments.items()
        if item.requests >= _SMALL_SEGMENT and item.counts.acceptance is not None
        and item.counts.acceptance < overall - 0.08
    }  # fmt: skip
    if weak:
        worst = min(weak, key=lambda name: weak[name] or 0.0)
        return [f"Adaptation: segment {worst} is accepted {weak[worst]:.0%} of the time against {overall:.0%} overall."]
    if overall < 0.55:
        return [
            f"Another draft, or adaptation: {overall:.0%} is low in every segment, so no single kind of traffic "
            "is to blame."
        ]
    return []
