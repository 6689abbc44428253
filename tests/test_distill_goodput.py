"""Goodput on paper: rounds are counted right, costs are read right, and what does not pay is seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from distill_tiny import make_blocks, make_pair

from distill.goodput import Costs, compare_goodput, costs_of, expected_rounds

COSTS = Costs(
    target_rows=(1, 8), target_s=(0.010, 0.017), draft_rows=(1, 8), draft_s=(0.002, 0.002), overhead_s=0.0,
    batches=(1,), gamma_max=4,
)  # fmt: skip
DOCUMENT = {
    "median_batch": 3.6,
    "controller": {
        "costs": {
            "table": {"target": {"rows": [1, 8], "ms": [10, 17]}, "draft": {"rows": [1, 8], "ms": [2, 3]}},
            "corrections": {"target": {"factor": 1.5}, "draft": {"factor": 2.0}},
            "overhead_ms": 0.5,
        }
    },
}


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    return make_blocks(make_pair(tmp_path_factory.mktemp("pair")), 12, seed=5)


def compared(blocks, live, candidate, costs=COSTS):
    scores = ([np.full(block.num_records, value) for block in blocks] for value in (live, candidate))
    return compare_goodput(blocks, *scores, costs, confidence=0.95, seed=0)


def test_rounds_are_those_of_decoding_many_times():
    """Against 4000 decodings of 30 positions with γ = 3, seed 0: the mean within 4 standard errors (about 0.13)."""
    draw = np.random.default_rng(0)
    chances = draw.uniform(0, 1, 30)
    counts = []
    for _ in range(4000):
        at = rounds = 0
        while at < 30:
            rounds += 1
            accepted = 0
            while accepted < 3 and at + accepted < 30 and draw.random() < chances[at + accepted]:
                accepted += 1
            at += accepted + 1
        counts.append(rounds)
    error = np.std(counts) / np.sqrt(len(counts))
    assert expected_rounds(chances, 4)[3] == pytest.approx(np.mean(counts), abs=4 * error)


def test_rounds_at_the_ends():
    """Nothing drafted takes a round a token; all accepted takes γ + 1 tokens a round; all refused one."""
    assert expected_rounds(np.full(12, 0.7), 3)[0] == 12
    assert expected_rounds(np.ones(12), 3).tolist() == [12, 6, 4, 3]
    assert expected_rounds(np.zeros(12), 3).tolist() == [12] * 4
    assert expected_rounds(np.empty(0), 2).tolist() == [0, 0, 0]


def test_costs_are_read_from_what_the_engine_publishes():
    """Corrections apply, milliseconds become seconds, and the batch is the median one."""
    costs = costs_of(DOCUMENT, gamma_max=5)
    assert costs is not None
    assert costs.batches == (4,)
    assert costs.gamma_max == 5
    expected = 1e-3 * (1.5 * 17 + 0.5 + (2 * 2 * (2 + 3 / 7)) + 1.5 * 4)  # 12 rows: 8 and four more at 1 ms each
    assert costs.round_s(4)[2] == pytest.approx(expected)


@pytest.mark.parametrize(
    "document", [None, {}, {"controller": {"controller": "fixed"}}, {"controller": {"costs": {"table": {}}}}]
)
def test_without_costs_nothing_is_predicted(document):
    """A fixed controller measures nothing, and an engine that was never started says nothing."""
    assert costs_of(document, gamma_max=5) is None


def test_the_document_of_a_real_controller_can_be_read():
    """What the adaptive controller explains has the fields that are read here."""
    from serving.engine.control.cost_model import CostModel
    from serving.engine.control.cost_table import CostTable, Curve

    table = CostTable("x", Curve([1, 8], [0.010, 0.017], 0.0), Curve([1, 8], [0.002, 0.003], 0.0), 0.0, 0.0, 1.0)
    document = {"median_batch": None, "controller": {"costs": CostModel(table).explain()}}
    costs = costs_of(document, gamma_max=3)
    assert costs is not None
    assert costs.round_s(1) == pytest.approx([0.010, 0.013, 0.016, 0.019])
    without = CostTable("x", table.target, None, 0.0, 0.0, 1.0)
    assert costs_of({"median_batch": 1, "controller": {"costs": CostModel(without).explain()}}, gamma_max=3) is None


def test_nonsense_is_no_cost_table():
    """Times that are not positive and a length of zero are refused in words."""
    with pytest.raises(ValueError, match="positive seconds"):
        replace(COSTS, target_s=(0.0, 1.0))
    with pytest.raises(ValueError, match="gamma_max 0"):
        replace(COSTS, gamma_max=0)


def test_more_acceptance_is_more_goodput_by_the_right_amount(blocks):
    """With all accepted a round of γ = 4 brings five tokens: 24 positions, 5 rounds of 22 ms against 24 of 10 ms."""
    result = compared(blocks, 0.0, 1.0)
    assert result["live"] == pytest.approx(1.0)
    assert result["candidate"] == pytest.approx(24 * 10 / (5 * 22))
    assert result["gammas"] == {"1": {"live": 0, "candidate": 4}}
    assert result["change"] == pytest.approx(result["candidate"] / result["live"] - 1)
    assert result["method"] == "walked"
    assert result["requests"] == 12


def test_where_drafting_does_not_pay_nothing_is_lost_by_a_worse_draft(blocks):
    """A draft that costs as much as the target is not used, whatever it is worth."""
    result = compared(blocks, 0.4, 0.1, replace(COSTS, draft_s=(0.05, 0.05)))
    assert result["change"] == 0.0
    assert result["interval"] == [0.0, 0.0]


def test_the_same_mean_can_be_worth_less(blocks):
    """Misses in one stretch waste what is drafted there; a miss behind every hit is the round's own token."""
    together = [np.repeat([0.95, 0.05], 12)] * 12
    apart = [np.tile([0.95, 0.05], 12)] * 12
    result = compare_goodput(blocks, apart, together, COSTS, confidence=0.95, seed=0)
    assert result["change"] < -0.05


def test_broken_runs_fall_back_to_the_formula_and_say_so(blocks):
    """With half of the accepted positions logged the mean of what they stand for decides, and `method` tells."""
    thin = [replace(block, keep_probability=0.5) for block in blocks]
    result = compared(thin, 0.5, 0.8)
    assert result["method"] == "geometric"
    tokens = lambda a: (1 - a ** np.arange(2, 6)) / (1 - a)  # noqa: E731
    seconds = np.array([0.013, 0.016, 0.019, 0.022])
    best = [max(1.0, float((tokens(a) * 0.010 / seconds).max())) for a in (0.5, 0.8)]
    assert [result["live"], result["candidate"]] == pytest.approx(best)
    assert compared([*thin[:6], *blocks[6:]], 0.5, 0.8)["method"] == "partly geometric"


def test_gaps_end_runs(blocks):
    """Positions that do not follow each other are never drafted in one round."""
    block = blocks[0]
    gapped = replace(block, positions=(np.arange(24) * 2 + 6).astype("<u4").tobytes())
    result = compare_goodput([gapped], [np.ones(24)], [np.ones(24)], COSTS, confidence=0.95, seed=0)
    assert result["live"] == pytest.approx(1.0)
    assert result["interval"] is None
