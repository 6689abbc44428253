"""The gate's rules on made-up acceptances: what passes, what does not, and the sentence that says why."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from distill_tiny import make_blocks, make_pair

from distill.goodput import Costs
from distill.verdict import Anchor, GateRules, compare

RULES = GateRules(
    coupling="gumbel", min_gain=0.0, confidence=0.95, min_requests=10, segment_margin=0.02, max_norm_ratio=5.0, seed=0
)
COSTS = Costs(
    target_rows=(1, 8), target_s=(0.010, 0.017), draft_rows=(1, 8), draft_s=(0.002, 0.002), overhead_s=0.0,
    batches=(1,), gamma_max=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    pair = make_pair(tmp_path_factory.mktemp("pair"))
    return make_blocks(pair, 12, seed=5) + make_blocks(pair, 12, seed=6, temperature=0.0, segment="code", name="g")


def flat(value: float, count: int = 24) -> list[np.ndarray]:
    return [np.full(24, value)] * count


def test_a_clear_gain_passes_and_the_sentence_carries_the_numbers(blocks):
    """Every part that was judged is named with its figures, and the result is JSON."""
    live, better = flat(0.5), [np.full(24, 0.6 + 0.002 * i) for i in range(24)]
    anchor = Anchor(blocks, flat(0.71), flat(0.70))
    result = compare(blocks, better, {"live": live}, RULES, anchor=anchor, trainer=better, costs=COSTS)
    low, high = result["interval"]
    assert 0 < low < result["difference"] < high
    assert result["verdict"] == (
        f"Passed: acceptance 0.500 → 0.623 (+0.123 [{low:+.3f}, {high:+.3f}]) on 24 held-out requests, 576 positions; "
        f"predicted goodput +{100 * result['goodput']['change']:.1f} %; anchor set +0.010."
    )
    assert (result["passed"], result["outcome"], result["reasons"]) == (True, "passed", [])
    assert result["parity"]["difference"] == 0.0
    assert result["goodput"]["change"] > 0.05
    assert json.loads(json.dumps(result)) == result


def test_what_was_not_judged_is_said(blocks):
    """Without costs, anchor set and trainer's scores a gain may pass, but not in silence."""
    result = compare(blocks, flat(0.6), {"live": flat(0.5)}, RULES)
    assert result["passed"]
    assert result["verdict"].endswith("; not judged: goodput (no cost table), the anchor set (0 requests), parity.")
    few = Anchor(blocks[:4], flat(0.1, 4), flat(0.9, 4))
    result = compare(blocks, flat(0.6), {"live": flat(0.5)}, RULES, anchor=few)
    assert result["passed"]
    assert not result["anchor"]["judged"]
    assert "the anchor set (4 requests)" in result["verdict"]


def test_too_few_requests_are_undecided(blocks):
    """A clear gain on fewer requests than the rule asks for does not pass."""
    result = compare(blocks[:5], flat(1.0, 5), {"live": flat(0.0, 5)}, RULES)
    assert (result["passed"], result["outcome"]) == (False, "undecided")
    assert result["verdict"].startswith("Undecided, 10 held-out requests are needed: acceptance 0.000 → 1.000")
    result = compare([], [], {"live": []}, RULES, costs=COSTS, trainer=[], anchor=Anchor([], [], []))
    assert result["verdict"] == "Undecided, 10 held-out requests are needed: no held-out positions."


def test_a_gain_that_may_be_none_does_not_pass(blocks):
    """No change at all, and less than the least gain that is asked for."""
    result = compare(blocks, flat(0.5), {"live": flat(0.5)}, RULES)
    assert result["verdict"].startswith("Rejected, the gain is not certain to exceed +0.000: acceptance 0.500 → 0.500")
    result = compare(blocks, flat(0.55), {"live": flat(0.5)}, replace(RULES, min_gain=0.06))
    assert result["outcome"] == "rejected"
    assert result["reasons"] == ["the gain is not certain to exceed +0.060"]


def test_of_200_candidates_without_an_improvement_no_more_pass_than_the_level_allows(blocks):
    """n = 200 candidates on 24 requests, seed 4, level 2.5 %: at most 10, the 2.5 % point being 5 and one standard
    error 2.2.  Lengths are log-normal, a candidate gains or loses by request (sd 0.05) and by token (sd 0.15).
    For the twentieth look the level is 0.125 %: at most 2."""
    draw = np.random.default_rng(4)
    promoted = strict = 0
    for _ in range(200):
        sizes = np.clip(draw.lognormal(3, 1, 24), 2, 400).astype(int)
        shaped = [_resized(block, size) for block, size in zip(blocks, sizes, strict=True)]
        live = [draw.uniform(0.4, 0.9) + draw.normal(0, 0.1, size) for size in sizes]
        new = [part + draw.normal(0, 0.05) + draw.normal(0, 0.15, len(part)) for part in live]
        if compare(shaped, new, {"live": live}, RULES)["passed"]:
            promoted += 1
            strict += compare(shaped, new, {"live": live}, replace(RULES, looks=20))["passed"]
    assert promoted <= 10
    assert strict <= 2


def _resized(block, size):
    """The same request with another number of records; only how many there are is looked at."""
    positions = np.arange(6, 6 + size, dtype="<u4").tobytes()
    return replace(block, positions=positions, verdicts=np.ones(size, "u1").tobytes())


def test_a_certain_loss_is_called_one(blocks):
    """More than a gain that is not certain."""
    result = compare(blocks, flat(0.5), {"live": flat(0.6)}, replace(RULES, segment_margin=0.2))
    assert result["verdict"].startswith("Rejected, it is accepted less often than live: acceptance 0.600 → 0.500")


def test_a_gain_that_repeats_in_the_looks_is_still_found(blocks):
    """Looking for the twentieth time widens the interval of the gain, and nothing else."""
    draw = np.random.default_rng(0)
    new = [np.full(24, 0.6 + gain) for gain in draw.normal(0, 0.05, 24)]
    once = compare(blocks, new, {"live": flat(0.5)}, RULES)
    often = compare(blocks, new, {"live": flat(0.5)}, replace(RULES, looks=20))
    assert often["interval"][0] < once["interval"][0]
    assert often["confidence"] == pytest.approx(1 - 0.05 / 20)
    assert often["by_segment"] == once["by_segment"]
    assert often["passed"]


def test_a_segment_that_certainly_loses_stops_an_overall_gain(blocks):
    """Forgetting one kind of traffic is not bought with a gain in another; the verdict names it."""
    new = flat(0.9, 12) + flat(0.4, 12)
    result = compare(blocks, new, {"live": flat(0.5)}, RULES)
    assert result["interval"][0] > 0
    assert result["outcome"] == "rejected"
    assert "it loses 0.100 against live in segment code (-0.100 [-0.100, -0.100])" in result["verdict"]
    fine = compare(blocks, flat(0.9, 12) + flat(0.485, 12), {"live": flat(0.5)}, RULES)
    assert fine["passed"]  # within the margin


def test_the_floor_must_not_be_certainly_better(blocks):
    """A candidate that beats a bad live version but not the base draft is refused."""
    result = compare(blocks, flat(0.5), {"live": flat(0.4), "floor": flat(0.6)}, RULES)
    assert "Rejected, it loses 0.100 against the floor" in result["verdict"]
    assert result["floor"]["floor"] == pytest.approx(0.6)
    assert compare(blocks, flat(0.5), {"live": flat(0.4), "floor": flat(0.515)}, RULES)["passed"]


def test_a_segments_champion_must_not_be_certainly_better(blocks):
    """Its scores are those of its segment's blocks alone; a segment without blocks says nothing."""
    references = {"live": flat(0.4), "champion:code": flat(0.7, 12), "champion:poetry": []}
    result = compare(blocks, flat(0.5), references, RULES)
    assert "it loses 0.200 against the champion of code" in result["verdict"]
    assert result["champions"]["poetry"]["judged"] is False
    assert compare(blocks, flat(0.7), references, RULES)["passed"]


def test_the_anchor_set_must_not_certainly_lose(blocks):
    """Beyond its own margin, with numbers; within it a loss is tolerated."""
    gained = {"live": flat(0.5)}
    result = compare(blocks, flat(0.6), gained, RULES, anchor=Anchor(blocks, flat(0.60), flat(0.65)))
    assert "it loses 0.050 against live on the anchor set" in result["verdict"]
    assert compare(blocks, flat(0.6), gained, RULES, anchor=Anchor(blocks, flat(0.635), flat(0.65)))["passed"]
    loose = replace(RULES, anchor_margin=0.1)
    assert compare(blocks, flat(0.6), gained, loose, anchor=Anchor(blocks, flat(0.60), flat(0.65)))["passed"]


def test_more_acceptance_that_costs_goodput_is_refused(blocks):
    """Hits in front of every miss are worth more than a higher mean whose misses lie in one stretch."""
    live = [np.tile([0.95, 0.05], 12)] * 24
    new = [np.repeat([0.97, 0.07], 12)] * 24
    result = compare(blocks, new, {"live": live}, RULES, costs=COSTS)
    assert result["difference"] == pytest.approx(0.02)
    fall = -100 * result["goodput"]["change"]
    assert fall > 5
    assert result["verdict"].startswith(f"Rejected, predicted goodput falls by {fall:.1f} %: acceptance 0.500 → 0.520")
    assert compare(blocks, new, {"live": live}, replace(RULES, goodput_margin=0.9), costs=COSTS)["passed"]


def test_parity_names_both_numbers_and_comes_first(blocks):
    """A file that serves 0.05 where the trainer measured 0.6 is refused, even with too few requests to judge."""
    for count in (24, 3, 1):
        result = compare(
            blocks[:count], flat(0.05, count), {"live": flat(0.5, count)}, RULES, trainer=flat(0.6, count)
        )  # fmt: skip
        assert result["outcome"] == "rejected"
        text = "Rejected, the stored file scores 0.050 where the trainer measured 0.600 (-0.550 ["
        assert result["verdict"].startswith(text)


@pytest.mark.parametrize(("served", "passed"), [(0.58, True), (0.62, True), (0.56, False), (0.64, False)])
def test_parity_tolerates_what_rounding_does(blocks, served, passed):
    """Within 0.03 to either side weights were rounded; beyond, another draft was exported."""
    result = compare(blocks, flat(served), {"live": flat(0.5)}, RULES, trainer=flat(0.6))
    assert result["passed"] is passed


def test_parity_does_not_accuse_on_noise(blocks):
    """A difference that is uncertain and not far out is no defect; beyond five margins it is one whatever the noise."""
    noise = np.random.default_rng(2).normal(0, 0.4, 24)
    near, far = ([np.full(24, 0.7 + item - noise.mean() + shift) for item in noise] for shift in (-0.1, -0.2))
    assert compare(blocks, near, {"live": flat(0.2)}, RULES, trainer=flat(0.7))["passed"]
    assert "the stored file" in compare(blocks, far, {"live": flat(0.2)}, RULES, trainer=flat(0.7))["verdict"]


def test_logits_that_are_no_numbers_are_refused(blocks):
    """In one position of one request, on held-out blocks or on the anchor set; a live version that has them gains
    nothing from it."""
    broken = flat(0.9)
    broken[3] = np.where(np.arange(24) == 7, np.nan, 0.9)
    result = compare(blocks, broken, {"live": flat(0.5)}, RULES)
    assert result["verdict"].startswith("Rejected, its logits are no numbers at 1 positions")
    anchor = Anchor(blocks, broken, flat(0.5))
    assert "no numbers" in compare(blocks, flat(0.9), {"live": flat(0.5)}, RULES, anchor=anchor)["verdict"]
    result = compare(blocks, flat(0.5), {"live": broken}, RULES)
    assert result["live"] == pytest.approx(0.9 * 575 / 576)
    assert json.loads(json.dumps(result)) == result


def test_records_count_what_they_stand_for(blocks):
    """Thinned logs keep all rejections: where the candidate gains on those alone it gains less than it looks."""
    thin = [replace(block, keep_probability=0.25) for block in blocks]
    rejected = np.arange(24) % 3 == 0
    new = [np.where(rejected, 0.8, 0.5)] * 24
    assert compare(blocks, new, {"live": flat(0.5)}, RULES)["difference"] == pytest.approx(0.3 * 8 / 24)
    result = compare(thin, new, {"live": flat(0.5)}, RULES, costs=COSTS)
    assert result["difference"] == pytest.approx(0.3 * 8 / 72)
    assert result["interval"][0] == pytest.approx(0.3 * 8 / 72)
    assert "predicted goodput" in result["verdict"]
    assert "% (geometric)" in result["verdict"]


def test_blocks_of_one_request_are_one_request(blocks):
    """Twelve requests in two blocks each are twelve, not twenty-four."""
    halves = [replace(block, request_id=f"r{i // 2}") for i, block in enumerate(blocks)]
    assert compare(halves, flat(0.6), {"live": flat(0.5)}, RULES)["requests"] == 12
    draw = np.random.default_rng(7).normal(0.05, 0.1, 12)
    new = [np.full(24, 0.5 + draw[i // 2]) for i in range(24)]
    widths = [
        np.diff(compare(items, new, {"live": flat(0.5)}, RULES)["interval"])[0] for items in (halves, blocks)
    ]  # fmt: skip
    assert widths[0] > 1.3 * widths[1]


def test_a_gain_in_one_segment_alone_is_told_apart_from_none(blocks):
    """It loses as much elsewhere, so it does not pass; where it wins it may draft beside what is live."""
    split = flat(0.6, 12) + flat(0.4, 12)
    result = compare(blocks, split, {"live": flat(0.5)}, RULES)
    assert (result["passed"], result["outcome"]) == (False, "rejected")
    assert result["wins"] == [blocks[0].segment]
    assert f"it gains in segment {blocks[0].segment} (+0.100" in result["verdict"]
    assert compare(blocks, flat(0.5), {"live": flat(0.5)}, RULES)["wins"] == []
    assert compare(blocks, flat(0.6), {"live": flat(0.5)}, RULES)["wins"] == []  # it passed


def test_who_is_unsound_or_below_the_floor_fits_nobody(blocks):
    """A broken file, numbers that are none, a loss to the floor or to the segment's champion: nothing is won."""
    split, live = flat(0.6, 12) + flat(0.4, 12), {"live": flat(0.5)}
    assert compare(blocks, split, live, RULES, trainer=flat(0.9))["wins"] == []
    assert compare(blocks, [np.full(24, np.nan), *split[1:]], live, RULES)["wins"] == []
    assert compare(blocks, split, live | {"floor": flat(0.7)}, RULES)["wins"] == []
    champion = {f"champion:{blocks[0].segment}": flat(0.7, 12)}
    assert compare(blocks, split, live | champion, RULES)["wins"] == []


def test_noise_wins_no_segment_more_often_than_the_level_allows(blocks):
    """200 candidates without a gain in either of two segments (seeds 0-199): at most 10 win one (level 2.5 %)."""
    won = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        candidate = [np.full(24, 0.5 + rng.normal(0, 0.05)) for _ in blocks]
        won += bool(compare(blocks, candidate, {"live": flat(0.5)}, RULES)["wins"])
    assert won <= 10
