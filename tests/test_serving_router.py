"""Which version drafts: the router on simulated traffic, and an engine with two drafts live at once."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from engine_rig import MIXED, build_rig, plain_each, prompts, reference_models, requests_for

from serving.engine.control.router import MAX_SEGMENTS, Router

TOKENS = (20, 48)  # examined in a request
CLUMPS = 0.10  # standard deviation of requests' acceptances


class Traffic:
    """Requests of one segment, each drafted for by whom the router chose; acceptance by version."""

    def __init__(self, seed: int) -> None:
        self.router = Router(random.Random(seed))
        self.rng = np.random.default_rng(seed)

    def serve(self, count: int, truth: dict[int, float], live: int = 1, segment: str = "chat") -> list[int]:
        """Serve so many requests; return who drafted for each."""
        others = [version for version in truth if version != live]
        chosen = []
        for _ in range(count):
            version = self.router.choose(segment, live, others)
            examined = int(self.rng.integers(*TOKENS))
            share = float(np.clip(self.rng.normal(truth[version], CLUMPS), 0.02, 0.98))
            self.router.observe(segment, version, int(self.rng.binomial(examined, share)), examined)
            chosen.append(version)
        return chosen


def share(chosen: list[int], version: int) -> float:
    return chosen.count(version) / len(chosen)


def test_without_alternates_the_live_version_drafts() -> None:
    """Nothing is drawn, so nothing can be chosen that is not there."""
    router = Router(random.Random(0))
    assert {router.choose("chat", 3, ()) for _ in range(50)} == {3}


def test_the_better_version_gets_nearly_all_and_the_other_a_look_now_and_then() -> None:
    """n=40 streams (seeds 0-39): 0.37 against 0.30; the mean loss is below 0.012, and the worse one is still tried."""
    last = [Traffic(seed).serve(600, {1: 0.37, 2: 0.30})[200:] for seed in range(40)]
    lost = np.mean([0.07 * share(chosen, 2) for chosen in last])
    assert 0.002 < lost < 0.012


def test_a_shift_is_answered_within_a_hundred_requests() -> None:
    """n=40 streams (seeds 0-39): the versions change places; of requests 50 to 100 two thirds have the right one."""
    found = []
    for seed in range(40):
        traffic = Traffic(seed)
        traffic.serve(400, {1: 0.37, 2: 0.30})
        found.append(share(traffic.serve(100, {1: 0.29, 2: 0.36})[50:], 2))
    assert np.mean(found) > 0.67


def test_segments_are_told_apart() -> None:
    """n=20 streams (seeds 0-19): each of two segments keeps the version that fits it."""
    found = []
    for seed in range(20):
        traffic = Traffic(seed)
        for _ in range(30):
            one = traffic.serve(10, {1: 0.45, 2: 0.30}, segment="chat")
            two = traffic.serve(10, {1: 0.30, 2: 0.45}, segment="code")
        found.append(share(one, 1) + share(two, 2))
    assert np.mean(found) > 1.8


def test_what_the_gate_forecast_is_believed_until_traffic_changes() -> None:
    """n=40 (seeds 0-39): a new version gets nine of its first ten requests; after a change nothing is forecast."""
    first, later = [], []
    for seed in range(40):
        traffic = Traffic(seed)
        traffic.serve(200, {1: 0.30})
        first.append(share([traffic.router.choose("chat", 2, (1,), {"": 0.1}) for _ in range(10)], 2))
        traffic.serve(60, {1: 0.10, 2: 0.10}, live=2)
        assert traffic.router._segments["chat"].changed
        later.append(share([traffic.router.choose("chat", 2, (1,), {"chat": 0.1}) for _ in range(10)], 2))
    assert np.mean(first) > 0.9
    assert 0.3 < np.mean(later) < 0.8


def test_one_bad_request_condemns_nobody() -> None:
    """A version whose first request was rejected altogether is still chosen more than one time in ten (200 draws)."""
    router = Router(random.Random(0))
    for _ in range(20):
        router.observe("chat", 1, 12, 40)
    router.observe("chat", 2, 0, 40)
    chosen = [router.choose("chat", 1, (2,)) for _ in range(200)]
    assert share(chosen, 2) > 0.1


def test_memory_is_bounded_and_requests_without_drafts_say_nothing() -> None:
    """Segments beyond the limit make room, versions that draft no longer fade, and explanations are short."""
    router = Router(random.Random(0))
    router.observe("empty", 1, 0, 0)
    for number in range(3 * MAX_SEGMENTS):
        router.observe(f"s{number}", 1, 10, 40)
    told = router.explain(1, (2,))
    assert next(iter(told)) == f"s{3 * MAX_SEGMENTS - 1}"
    assert len(told) <= 8
    assert len(router._segments) == MAX_SEGMENTS
    router.observe("chat", 7, 10, 40)
    for _ in range(2000):
        router.observe("chat", 1, 10, 40)
    assert list(router._segments["chat"].fits) == [1]


@pytest.fixture(scope="module")
def rig(folder, tmp_path_factory):
    """An engine with a second version beside the base draft; it echoes nothing, so its guesses are bad."""
    rig = build_rig(folder, tmp_path_factory.mktemp("data"), controller="fixed", gamma=3, draft_vocab_size=0)
    yield rig
    rig.built.publisher.close()


def admit(rig, version: int, model) -> None:
    """Have a version resident and named, as the registry's follower does."""
    swapper = rig.built.hotswap
    named = swapper._registry.live()
    swapper._slots._resident[version] = model
    swapper._named = replace_alternates(named, (version,))


def replace_alternates(named, alternates):
    return type(named)(
        generation=named.generation, live=named.live, previous=named.previous, artifacts=named.artifacts,
        alternates=alternates,
    )  # fmt: skip


def test_two_versions_draft_side_by_side_and_say_the_same_text(rig) -> None:
    """Every request keeps the version chosen for it, both are tried, and 0 tokens differ from plain decoding."""
    admit(rig, 5, rig.model(lambda weight: weight.normal_(0, 0.02)))
    rig.engine.step()
    target, _ = reference_models(rig.pair)
    ids = prompts(100)
    expected = plain_each(target, ids, MIXED, 30)
    seen: set[frozenset[int]] = set()
    for repeat in range(6):
        requests = requests_for(ids, MIXED, 30, prefix=f"{repeat}-")
        assert rig.run(requests) == expected
        seen |= {frozenset(item.by_version) for item in requests}
        assert all(set(item.by_version) == {item.routed or 0} for item in requests if item.by_version)
    assert seen >= {frozenset({0}), frozenset({5})}
    assert 0 < rig.engine.stats.routed < 48
    assert set(rig.engine.router.explain(0, (5,))["test"]) == {"0", "5"}


def test_a_request_whose_alternate_is_gone_goes_on_with_what_is_live(rig) -> None:
    """Dismissed in the middle of an answer: no token is lost or changed, and the live version drafts the rest."""
    admit(rig, 6, rig.model(lambda weight: weight.normal_(0, 0.02)))
    rig.engine.step()
    target, _ = reference_models(rig.pair)
    ids, swapper = prompts(100)[:3], rig.built.hotswap
    requests = requests_for(ids, MIXED[:3], 30, prefix="gone")
    for item in requests:
        rig.engine.submit(item)
        item.routed = 6

    def dismiss(step: int) -> None:
        if step == 4:
            swapper._named = replace_alternates(swapper._named, ())
            swapper._slots.keep_only({0})

    rig.run([], on_step=dismiss)
    assert [item.tokens[item.prompt_tokens :] for item in requests] == plain_each(target, ids, MIXED[:3], 30)
    assert all(set(item.by_version) == {6, 0} for item in requests)
    assert swapper.resident(6) is None


def test_a_pinned_request_is_not_routed(rig) -> None:
    """Whoever asked for a version gets it."""
    item = replace(requests_for(prompts(100)[:1], MIXED[:1], 10)[0], version=0)
    rig.run([item])
    assert item.routed is None
    assert set(item.by_version) <= {0}
