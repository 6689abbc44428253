"""The advisor says what the numbers say, and a measured speed-up outranks every rule of thumb."""

from __future__ import annotations

import dataclasses
import random

import msgspec
import pytest

from adapter.contracts import SCHEMA_VERSION, Counts, RequestOutcome, Sampling, VersionCounts
from monitors.advisor import Advice, EngineLoad, advise, load_of
from monitors.traffic import TrafficWindow
from serving.engine.control.fixed import FixedGamma
from serving.engine.control.switchback import Step, Switchback


def outcome(number: int = 0, **more: object) -> RequestOutcome:
    """A finished chat request with acceptance 0.7."""
    rounds = Counts(num_rounds=40, num_drafted=80, num_examined=60, num_accepted=42)
    base = RequestOutcome(
        schema=SCHEMA_VERSION, request_id=str(number), segment="chat", finish_reason="stop",
        sampling=Sampling(temperature=0.0), prompt_tokens=60, delivered_tokens=120, plain_rounds=0,
        by_version=(VersionCounts(version=1, counts=rounds),), accepted_by_position=(30, 12), queue_s=0.0,
        first_token_s=0.1, total_s=1.0, finished_at_s=float(number),
    )  # fmt: skip
    return dataclasses.replace(base, **more)


def advice(load: EngineLoad, *rows: RequestOutcome, n: int = 40) -> Advice:
    """Advice on n requests that look like `rows`, in turn."""
    window = TrafficWindow()
    for number in range(n):
        window.add(dataclasses.replace(rows[number % len(rows)], request_id=str(number)))
    return advise(window.summarise(), load)


CHAT = EngineLoad(median_batch=2, kv_usage=0.2)


def test_too_little_traffic_gets_no_advice() -> None:
    """Below the least number of requests nothing is claimed, and the sentence says how many are missing."""
    assert advise(None, CHAT).verdict == "too little traffic"
    few = advice(CHAT, outcome(), n=29)
    assert few.verdict == "too little traffic"
    assert "29" in few.sentence
    assert "30" in few.sentence


def test_small_batch_chat_speculates() -> None:
    """Batch 2, acceptance 0.7, long greedy answers: every sign speaks for it."""
    said = advice(CHAT, outcome())
    assert said.verdict == "speculate"
    assert {signal.leaning for signal in said.signals[1:]} == {"for"}


@pytest.mark.parametrize(
    ("sign", "load", "row"),
    [
        ("decode batch", EngineLoad(median_batch=40, kv_usage=0.2), outcome()),
        ("prefill per delivered token", CHAT, outcome(prompt_tokens=8000, delivered_tokens=200)),
        ("answer length", CHAT, outcome(delivered_tokens=8, prompt_tokens=8)),
        ("temperature", CHAT, outcome(sampling=Sampling(temperature=1.4))),
        ("memory", EngineLoad(median_batch=2, kv_usage=0.97), outcome()),
        ("memory", EngineLoad(median_batch=2, kv_usage=0.2, preempted=3), outcome()),
    ],
)
def test_each_bad_sign_is_named(sign: str, load: EngineLoad, row: RequestOutcome) -> None:
    """One sign against is enough to lose the clear yes, and the sentence names it."""
    said = advice(load, row)
    assert said.verdict != "speculate"
    assert [signal.name for signal in said.signals if signal.leaning == "against"] == [sign]
    assert sign in said.sentence


def test_a_measured_loss_outranks_every_rule() -> None:
    """Rules of thumb say yes; the measured interval lies below 1, so the answer is no. And the other way round."""
    measured = {"speedup_windows": 30, "median_batch": 2, "kv_usage": 0.2}
    loses = advice(EngineLoad(speedup=0.8, speedup_low=0.75, speedup_high=0.86, **measured), outcome())
    assert loses.verdict == "do not speculate"
    assert "0.80x" in loses.sentence
    hot = outcome(sampling=Sampling(temperature=1.5), delivered_tokens=10, prompt_tokens=500)
    wins = advice(EngineLoad(speedup=1.3, speedup_low=1.2, speedup_high=1.4, **measured), hot)
    assert wins.verdict == "speculate"
    open_ = advice(EngineLoad(speedup=1.0, speedup_low=0.9, speedup_high=1.1, **measured), hot)
    assert open_.verdict != "speculate", "an interval around 1 decides nothing"


def test_what_would_pay_instead_is_said_with_its_number() -> None:
    """Prefix cache, smaller gamma, adaptation of one segment, another draft, matching: each when it fits."""
    rag = outcome(prompt_tokens=4000, delivered_tokens=200)
    assert any(
        "engine.prefix_cache" in line
        for line in advice(EngineLoad(median_batch=2, kv_usage=0.2, prefix_cache=False), rag).instead
    )
    assert any("Prompt order" in line for line in advice(CHAT, rag).instead)
    assert not any(
        "Prompt order" in line for line in advice(CHAT, dataclasses.replace(rag, cached_tokens=3600)).instead
    )
    steep = outcome(accepted_by_position=(30, 1, 0))
    fixed = msgspec.structs.replace(CHAT, controller="fixed")
    assert any("gamma" in line and "token 2" in line for line in advice(fixed, steep).instead)
    poor = Counts(num_rounds=40, num_drafted=80, num_examined=60, num_accepted=6)
    code = outcome(segment="code", by_version=(VersionCounts(version=1, counts=poor),))
    assert any("segment code" in line for line in advice(CHAT, outcome(), code, n=80).instead)
    assert any("Another draft" in line for line in advice(CHAT, code).instead)
    copied = outcome(unversioned=Counts(num_rounds=10, num_drafted=50, num_examined=50, num_accepted=45))
    assert any("Matching" in line for line in advice(CHAT, copied).instead)


def test_an_adaptive_controller_is_given_no_advice_about_gamma() -> None:
    """It drafts deep where that pays: half the rounds stop at one token, and those that go on keep every second."""
    deep = outcome(accepted_by_position=(30, 3, 1))  # of 40 rounds 3 drafted a second token, and kept it each time
    for name in ("adaptive", None):
        said = advice(msgspec.structs.replace(CHAT, controller=name), deep)
        assert not any("gamma" in line for line in said.instead)
    assert load_of({"controller": {"controller": "adaptive"}}, prefix_cache=True).controller == "adaptive"
    assert load_of({"controller": FixedGamma(2).explain()}, prefix_cache=True).controller == "fixed"


def test_what_keeps_the_speed_up_unmeasured_is_said() -> None:
    """No share helps under the fixed controller, and none while nothing is drafted."""
    fixed, adaptive = (
        advice(msgspec.structs.replace(CHAT, controller=name), outcome()).signals[0].sentence
        for name in ("fixed", "adaptive")
    )
    assert "switchback_share" not in fixed
    assert "engine.controller" in fixed
    assert "seldom drafts" in adaptive


def test_cancelled_requests_do_not_count() -> None:
    """A client that left after two tokens says nothing about how long answers are."""
    window = TrafficWindow()
    for number in range(40):
        window.add(outcome(number, finish_reason="cancelled", delivered_tokens=2))
    assert window.summarise() is None


def test_the_window_forgets() -> None:
    """Yesterday's traffic leaves the window when enough of today's has come."""
    window = TrafficWindow(size=50)
    for number in range(200):
        window.add(outcome(number, delivered_tokens=10 if number < 150 else 90))
    traffic = window.summarise()
    assert traffic is not None
    assert traffic.requests == 50
    assert traffic.median_delivered == 90


def test_the_engines_document_is_read_as_the_controller_writes_it() -> None:
    """The measured speed-up comes from a real controller's own explanation; before any window it is unknown."""
    switchback = Switchback(0.5, random.Random(1))
    explained = {"controller": {"switchback": switchback.explain()}, "median_batch": 3.0, "kv_usage": 0.1}
    assert load_of(explained, prefix_cache=True).speedup is None
    for _ in range(4000):
        mark = switchback.begin_step(blocked=False)
        window = mark.plain is not None
        switchback.observe(Step(1.0 if window else 0.8, 1.0, 0.0, 1.0, drafted=not window), mark)
    load = load_of({**explained, "controller": {"switchback": switchback.explain()}}, prefix_cache=True)
    assert load.speedup == pytest.approx(1.25, rel=0.02)
    assert load.speedup_windows > 5
    assert load_of({}, prefix_cache=True).median_batch is None
