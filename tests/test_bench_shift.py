"""The benchmark of shifting traffic: its schedule, its figures on answers made up by hand, and a whole quick run."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from adapter.contracts import SettingsError
from adapter.settings import Settings
from bench import plot_shift, shift, shift_stats
from bench.shift_arms import ARMS, Run, arm_settings, fresh_folder, oracle_settings
from bench.shift_client import Seen, Wire, examined
from bench.shift_figures import COLUMNS, Stretch, figures, first_above, timeline
from bench.shift_marks import Marks
from bench.shift_options import make_plan, read_arguments
from bench.shift_prompts import BEFORE, BEHIND, Deck, Segment, load_segments
from bench.shift_schedule import MALLORY, MEASURE_EVERY, NOISE, OTHERS, SCENARIOS, A, Arrival, B, schedule
from bench.shift_table import table
from bench.shift_targets import targets

SECONDS = 800.0
SEGMENTS = (
    Segment(name="one", learning=tuple(f"learn one {i}" for i in range(8)), measuring=("hold one 0", "hold one 1")),
    Segment(name="two", learning=tuple(f"learn two {i}" for i in range(8)), measuring=("hold two 0", "hold two 1")),
)
BASE, TRAINED = 0.3, 0.6  # acceptance on B of the draft as it was, and of one trained on B


def plan_of(scenario: str, *, seed: int = 1, rate: float = 1.0) -> list[Arrival]:
    return schedule(SCENARIOS[scenario], SEGMENTS, rate=rate, seconds=SECONDS, seed=seed, warm_up_s=60.0)


def answer(arrival: Arrival, rate: float, *, tokens_per_s: float = 50.0, delay_s: float = 0.2) -> Seen:
    """An answer of 49 tokens in whose examined tokens acceptance is near `rate`, by the arrival's own lot."""
    pick = random.Random(arrival.index)
    accepted = sum(pick.random() < rate for _ in range(40))
    first = arrival.at_s + delay_s
    return Seen(
        arrival=arrival, started_s=arrival.at_s, first_s=first, finished_s=first + 48 / tokens_per_s, tokens=49, text=7,
        rounds=30, drafted=60, accepted=accepted, examined=40.0, _ended=True,
    )  # fmt: skip


def run_of(arm: str, scenario: str = "abrupt", *, swap_s: float | None = None, faster: float = 1.0) -> Run:
    """An arm whose draft is as it was until a swap, and trained on B from then on."""
    seen = []
    for arrival in plan_of(scenario):
        trained = swap_s is not None and arrival.at_s >= swap_s
        rate = 0.7 if arrival.part == A else 0.05 if arrival.part == NOISE else TRAINED if trained else BASE
        seen.append(answer(arrival, rate, tokens_per_s=50.0 * (faster if trained else 1.0)))
    swaps = [] if swap_s is None else [{"at_s": swap_s, "version": 1, "pause_ms": 0.1}]
    trainings = (
        [{"from_s": swap_s - 50, "until_s": swap_s, "state": "done", "reason": "", "error": None}] if swaps else []
    )
    versions = [{"version": 1, "parent": 0, "state": "ready", "at_s": swap_s, "created_by": "trainer"}] if swaps else []
    drift = [{"at_s": 210.0, "segment": "default", "words": "fell"}] if swaps else []
    marks = Marks(swaps=swaps, trainings=trainings, versions=versions, drift=drift)
    return Run(arm=arm, seen=seen, marks=marks, seconds=SECONDS)


def abrupt_runs() -> dict[str, Run]:
    """Static, an oracle that was trained before, and an adaptive arm that swaps at 400 s; the shift is at 200 s."""
    return {
        "static": run_of("static"), "oracle": run_of("oracle", swap_s=0.0, faster=1.5),
        "adaptive": run_of("adaptive", swap_s=400.0, faster=1.5),
    }  # fmt: skip


# -- prompts ---------------------------------------------------------------------------------


def write_prompts(path: Path, **counts: int) -> Path:
    lines = [
        {"segment": name, "prompt": f"{name} {i}" + "." * len(name)} for name, n in counts.items() for i in range(n)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def test_a_third_of_the_prompts_is_never_trained_on(tmp_path):
    """Both parts together are all prompts, and none is in both; the seed decides which."""
    path = write_prompts(tmp_path / "p.jsonl", a=30, bb=30)
    for segment in load_segments(path, None, 5):
        assert len(segment.measuring) == 10
        assert not set(segment.learning) & set(segment.measuring)
        assert len(set(segment.learning) | set(segment.measuring)) == 30
    again, other = load_segments(path, None, 5), load_segments(path, None, 6)
    assert again == load_segments(path, None, 5)
    assert set(again[0].measuring) != set(other[0].measuring)


def test_the_two_largest_segments_of_short_prompts_are_taken(tmp_path):
    """Of equal numbers the shorter prompts win, and the longer of the two segments comes first."""
    path = write_prompts(tmp_path / "p.jsonl", few=7, long_ones=12, b=12, medium=12)
    assert [item.name for item in load_segments(path, None, 0)] == ["medium", "b"]
    assert [item.name for item in load_segments(path, ("few", "b"), 0)] == ["few", "b"]


@pytest.mark.parametrize(
    ("text", "names", "words"),
    [
        (None, None, "no such file"), ("{}\n", None, "line 1"), ("no json\n", None, "line 1"),
        ('{"segment": "a", "prompt": 3}\n', None, "must be text"),
        ('{"segment": "a", "prompt": "x"}\n', None, "two segments are needed"),
        ('{"segment": "a", "prompt": "x"}\n', ("a", "z"), "has 1 prompts; 6 are needed"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_used_are_refused_by_name(tmp_path, text, names, words):
    path = tmp_path / "p.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError, match=words):
        load_segments(path, names, 0)


def test_an_unknown_segment_is_refused_with_those_there_are(tmp_path):
    path = write_prompts(tmp_path / "p.jsonl", a=6, b=6)
    with pytest.raises(SettingsError, match="no segment 'c'; there are a, b"):
        load_segments(path, ("a", "c"), 0)


def test_no_wording_comes_twice_before_all_have_been_dealt():
    deck = Deck(("p", "q"), "seed")
    all_of_them = 2 * len(BEFORE) * len(BEHIND)
    dealt = [deck.next() for _ in range(all_of_them)]
    assert len(set(dealt)) == all_of_them
    assert deck.next() in dealt


# -- the schedule ----------------------------------------------------------------------------


def test_every_arm_gets_the_same_requests_and_another_seed_others():
    assert plan_of("abrupt") == plan_of("abrupt")
    assert plan_of("abrupt") != plan_of("abrupt", seed=2)


def test_arrivals_are_a_poisson_process():
    """Counts and gaps at 1 a second over 800 s: n = 800, bounds five standard deviations."""
    times = [arrival.at_s for arrival in plan_of("abrupt")]
    assert abs(len(times) - 800) < 5 * 800**0.5
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert abs(sum((gap - mean) ** 2 for gap in gaps) / len(gaps) - mean**2) < 5 * (8 / len(gaps)) ** 0.5


def test_every_fourth_request_measures_with_prompts_held_out_and_no_other_does():
    arrivals = plan_of("abrupt")
    assert not any(arrival.measuring for arrival in arrivals if arrival.at_s < 60)
    late = [arrival for arrival in arrivals if arrival.at_s >= 60]
    assert sum(arrival.measuring for arrival in late) == len(late) // MEASURE_EVERY
    assert all(("hold" in arrival.prompt) == arrival.measuring for arrival in arrivals)


def test_a_quarter_is_sampled_of_both_kinds():
    """The measuring ones as well, or half of what is reported would rest on one kind alone."""
    arrivals = plan_of("abrupt")
    for measuring in (True, False):
        kind = [arrival for arrival in arrivals if arrival.measuring == measuring]
        hot = sum(arrival.temperature == 0.7 for arrival in kind)
        assert abs(hot - len(kind) / 4) <= 1
        assert all(arrival.temperature in (0.0, 0.7) for arrival in kind)


def test_traffic_changes_as_the_scenario_says():
    """Parts by period; in the gradual one B's share grows from a third to a third, n about 80 each, 5 deviations."""
    parts = {name: [(item.period, item.part) for item in plan_of(name)] for name in SCENARIOS}
    assert set(parts["abrupt"]) == {(0, A), (1, B)}
    assert set(parts["recurring"]) == {(0, A), (1, B), (2, A), (3, B)}
    ramp = [arrival for arrival in plan_of("gradual") if arrival.period == 1]
    early = [arrival.part == B for arrival in ramp if arrival.at_s < 240]
    late = [arrival.part == B for arrival in ramp if arrival.at_s >= 320]
    assert sum(late) / len(late) - sum(early) / len(early) > 0.4
    mixed = Counter(part for _, part in parts["mixed"])
    assert abs(mixed[A] - mixed[B]) < 5 * 800**0.5


def test_only_mallory_sends_noise_and_only_after_her_change():
    """Before it she asks what everybody asks, under her own name, so that she has something to fall from."""
    arrivals = plan_of("adversarial")
    for arrival in arrivals:
        assert (arrival.part == NOISE) == (arrival.tenant == MALLORY and arrival.period == 1)
        assert arrival.tenant in (MALLORY, OTHERS)
    mine = [arrival for arrival in arrivals if arrival.tenant == MALLORY]
    assert {arrival.period for arrival in mine} == {0, 1}
    assert abs(len(mine) - len(arrivals) / 3) < 5 * (len(arrivals) * 2 / 9) ** 0.5
    assert all(arrival.temperature == 1.5 for arrival in mine if arrival.period)


# -- what is sent, and what comes back -------------------------------------------------------


def test_measuring_requests_ask_for_a_draft_length_and_are_not_learned_from():
    ordinary, measuring = (next(item for item in plan_of("abrupt") if item.measuring is kind) for kind in (False, True))
    wire = Wire(model="m", max_tokens=48)
    assert wire.body(measuring)["speculative"] == {"gamma": 2}
    assert "speculative" not in wire.body(ordinary)
    assert wire.headers(measuring)["x-draftsmith-learning"] == "off"
    assert "x-draftsmith-learning" not in wire.headers(ordinary)
    off = replace(wire, speculate=False, chat=False)
    assert all(off.body(item)["speculative"] == {"enabled": False} for item in (ordinary, measuring))
    assert off.body(ordinary)["prompt"] == ordinary.prompt
    assert off.path != wire.path


def test_examined_tokens_are_counted_from_what_the_service_tells():
    """Two tokens a round: the second is examined where the first was accepted; exact without a short last round."""

    def told(rounds: list[tuple[int, int]]) -> dict:
        at_least = [sum(accepted >= place for _, accepted in rounds) for place in (1, 2)]
        return {
            "num_spec_steps": len(rounds), "num_draft_tokens": sum(drafted for drafted, _ in rounds),
            "num_accepted_tokens_per_pos": at_least,
        }  # fmt: skip

    whole = [(2, 0), (2, 1), (2, 2), (2, 2), (2, 0)]
    assert examined(told(whole)) == sum(min(accepted + 1, drafted) for drafted, accepted in whole) == 8
    short = [*whole, (1, 1)]
    assert abs(examined(told(short)) - 9) < 1
    assert examined(told([(1, 1), (1, 0)])) == 2
    assert examined(told([])) == 0


# -- figures ---------------------------------------------------------------------------------


def test_what_was_won_back_is_the_part_of_what_the_oracle_has():
    """Acceptance goes from 0.3 to 0.6, the oracle's: all of it is won back; the static arm wins nothing.

    About 65 requests of 40 tokens a figure: standard deviation 0.01, bounds five of them.
    """
    found = figures(SCENARIOS["abrupt"], abrupt_runs(), SECONDS)
    adaptive, static = found["adaptive"], found["static"]
    assert abs(adaptive["at_shift"]["value"] - BASE) < 0.05
    assert abs(adaptive["recovered"]["value"] - TRAINED) < 0.05
    for name in ("recovered_fraction", "recovered_fraction_paired"):
        low, high = adaptive[name]["interval"]
        assert 0.85 < low <= adaptive[name]["value"] <= high < 1.15
        assert abs(static[name]["value"]) < 0.15
    assert static["requests_to_80_percent"] is None
    assert adaptive["training_seconds"] == 50.0


def test_the_goal_is_reached_when_the_trained_version_drafts():
    """The swap is at 400 s and the shift at 200 s: about 200 requests at one a second, 5 deviations and a few."""
    adaptive = figures(SCENARIOS["abrupt"], abrupt_runs(), SECONDS)["adaptive"]
    assert 195 < adaptive["seconds_to_80_percent"] < 240
    assert abs(adaptive["requests_to_80_percent"] - adaptive["seconds_to_80_percent"]) < 5 * 200**0.5


def test_a_lucky_streak_is_not_recovery():
    """Eight good requests among bad ones reach the goal at once, but not for good."""
    arrival = plan_of("abrupt")[0]
    good, bad = (replace_counts(answer(arrival, 0.5), accepted) for accepted in (36, 4))
    assert first_above([bad] * 10 + [good] * 8 + [bad] * 30, 0.85, 8) is None
    assert first_above([bad] * 10 + [good] * 30, 0.85, 8) is good
    assert first_above([good] * 7, 0.85, 8) is None


def replace_counts(seen: Seen, accepted: int) -> Seen:
    seen.accepted = accepted
    return seen


def test_without_a_better_oracle_there_is_nothing_to_win_back():
    runs = abrupt_runs() | {"oracle": run_of("oracle")}
    found = figures(SCENARIOS["abrupt"], runs, SECONDS)["adaptive"]
    assert found["recovered_fraction"]["value"] is None
    assert found["requests_to_80_percent"] is None


def test_requests_after_a_swap_do_not_say_what_was_before_it():
    """A swap in the middle of a measuring request: that one is no longer "at the shift", those before it are."""
    look = Stretch(SCENARIOS["abrupt"], SECONDS)
    measuring = [item for item in plan_of("abrupt") if item.measuring and item.at_s >= 200]
    swap_s = measuring[8].at_s + 0.1
    found = look.at_shift(run_of("adaptive", swap_s=swap_s))
    assert found
    assert found[0].arrival == measuring[0]
    assert all(seen.finished_s <= swap_s for seen in found)


def test_speeds_are_compared_request_by_request():
    """Decoding is 1.5 times faster once trained; end to end it is less, for the first token takes as long."""
    found = figures(SCENARIOS["abrupt"], abrupt_runs(), SECONDS)["adaptive"]["against_static"]
    assert found["recovered"]["decoding"]["value"] == pytest.approx(1.5, abs=0.01)
    whole = (0.2 + 48 / 50) / (0.2 + 48 / 75)
    assert found["recovered"]["end_to_end"]["value"] == pytest.approx(whole, abs=0.01)
    assert found["recovered"]["end_to_end"]["interval"][0] > 1
    assert 1 < found["since_shift"]["end_to_end"]["value"] < whole


def test_the_price_of_training_is_told_against_the_same_requests():
    """Answers twice as slow while a training runs: half the speed is lost, against other times and the static arm."""
    runs = abrupt_runs()
    for seen in runs["adaptive"].seen:
        if 350 < seen.started_s < 400:
            seen.finished_s = seen.first_s + 48 / 25
    for seen in runs["adaptive"].seen:  # and nothing gets faster by the swap
        if seen.arrival.at_s >= 400:
            seen.finished_s = seen.first_s + 48 / 50
    found = figures(SCENARIOS["abrupt"], runs, SECONDS)["adaptive"]["serving_slowdown_while_training"]
    assert found["value"] == pytest.approx(0.5, abs=0.05)
    low, high = found["against_static"]["interval"]
    assert low <= found["against_static"]["value"] <= high
    assert found["against_static"]["value"] == pytest.approx(0.5, abs=0.05)


def test_curves_show_measuring_requests_alone_and_leave_gaps_where_nothing_came():
    found = figures(SCENARIOS["abrupt"], abrupt_runs(), SECONDS)["adaptive"]
    assert len(found["tokens_per_s"]) == COLUMNS
    slice_s = SECONDS / COLUMNS  # the middle of a slice is told
    assert all(item["at_s"] > 200 - slice_s / 2 for item in found["acceptance"])
    assert all(60 - slice_s / 2 <= item["at_s"] < 200 + slice_s / 2 for item in found["acceptance_elsewhere"])
    assert sum(item["n"] for item in found["acceptance"] + found["acceptance_elsewhere"]) == found["measuring"]


def test_an_arm_without_speculation_has_no_acceptance():
    none = run_of("none")
    for seen in none.seen:
        seen.examined, seen.accepted = 0.0, 0
    found = figures(SCENARIOS["abrupt"], abrupt_runs() | {"none": none}, SECONDS)
    assert found["none"]["acceptance"] is None
    assert found["none"]["recovered"]["value"] is None
    assert found["adaptive"]["against_none"]["recovered"]["decoding"]["value"] == pytest.approx(1.5, abs=0.01)


def test_failures_and_other_texts_are_counted():
    runs = abrupt_runs()
    runs["adaptive"].seen[3].error = "HTTP 500: x"
    runs["adaptive"].seen[5].text = 8
    found = figures(SCENARIOS["abrupt"], runs, SECONDS)["adaptive"]
    assert (found["failed"], found["first_failure"], found["other_texts_than_static"]) == (1, "HTTP 500: x", 1)


def test_a_version_that_is_worse_on_the_same_requests_is_called_harmful():
    """The swap takes acceptance on B from 0.6 to 0.3: certainly worse than an arm that stays at 0.6."""
    runs = {"static": run_of("static", swap_s=0.0), "adaptive": run_of("adaptive", swap_s=400.0)}
    for one, two in zip(runs["adaptive"].seen, runs["static"].seen, strict=True):
        rate = BASE if one.arrival.at_s >= 400 else TRAINED
        if one.arrival.part == B:
            one.accepted = answer(one.arrival, rate).accepted
            two.accepted = answer(two.arrival, TRAINED).accepted
    rows = figures(SCENARIOS["abrupt"], runs, SECONDS)["adaptive"]["versions"]
    assert [(row["version"], row["harmful"]) for row in rows] == [(0, False), (1, True)]
    assert rows[1]["against_other_arm"]["value"] == pytest.approx(BASE - TRAINED, abs=0.05)


def test_a_version_whose_loss_may_be_chance_is_not_called_harmful():
    """Lots of the same odds in both arms: a difference, but no certain one (seeds are the requests' numbers)."""
    runs = {"static": run_of("static"), "adaptive": run_of("adaptive", swap_s=400.0)}
    for seen in runs["adaptive"].seen:
        if seen.arrival.at_s >= 400:
            seen.accepted = answer(replace(seen.arrival, index=seen.arrival.index + 10_000), BASE).accepted
    row = figures(SCENARIOS["abrupt"], runs, SECONDS)["adaptive"]["versions"][1]
    low, high = row["against_other_arm"]["interval"]
    assert low < 0 < high
    assert row["harmful"] is False


def test_the_interval_of_acceptance_covers_the_truth():
    """200 repeats of 40 requests at 0.4: 95 % intervals miss at most 26, five deviations above the expected 10.

    A percentile bootstrap of 40 is a little narrow, which the bound allows for.
    """
    arrival, missed = plan_of("abrupt")[0], 0
    for repeat in range(200):
        items = [answer(replace(arrival, index=1000 * repeat + i), 0.4) for i in range(40)]
        low, high = shift_stats.acceptance(items)["interval"]
        missed += not low <= 0.4 <= high
    assert missed <= 26


# -- single scenarios ------------------------------------------------------------------------


def test_a_return_tells_how_soon_and_whether_it_was_learned_anew():
    """A swap in the last period, 30 s after B's return: about 30 requests, no training begun then."""
    run = run_of("adaptive", "recurring", swap_s=670.0)
    run.marks.trainings[0]["from_s"] = 300.0
    found = figures(SCENARIOS["recurring"], {"static": run_of("static", "recurring"), "adaptive": run}, SECONDS)
    back_a, back_b = found["adaptive"]["returns"]
    assert (back_a["segment"], back_b["segment"]) == (A, B)
    assert abs(back_b["requests_to_first_swap"] - 30) < 5 * 30**0.5
    assert back_b["trainings_begun"] == 0
    assert abs(back_a["change"]["value"]) < 0.06
    assert back_a["change_beyond_static"]["value"] == 0
    low, high = back_b["change_beyond_static"]["interval"]
    assert 0.15 < low <= back_b["change_beyond_static"]["value"] <= high < 0.4
    losing = figures(SCENARIOS["recurring"], {"static": run, "adaptive": run_of("adaptive", "recurring")}, SECONDS)
    missed = [item for item in targets("recurring", losing) if item["met"] is False]
    assert any("below what it was" in item["target"] for item in missed)
    assert back_a["requests_to_first_swap"] is None


def test_a_tenant_is_bypassed_when_nothing_is_drafted_for_her():
    """Mallory's answers of the end were not drafted for, everybody else's were."""
    runs = {name: run_of(name, "adversarial") for name in ("static", "adaptive")}
    for seen in runs["adaptive"].seen:
        if seen.arrival.tenant == MALLORY and seen.arrival.at_s > 300 and not seen.arrival.measuring:
            seen.rounds, seen.drafted, seen.plain_rounds = 0, 0, 48
    found = figures(SCENARIOS["adversarial"], runs, SECONDS)["adaptive"]["tenants"]
    assert found[MALLORY]["bypassed"] is True
    assert found[OTHERS]["bypassed"] is False
    assert found[OTHERS]["speed_against_static"]["value"] == 1.0
    assert found[MALLORY]["acceptance_after"]["value"] < 0.1 < found[MALLORY]["acceptance_before"]["value"]
    assert {item["met"] for item in targets("adversarial", {"adaptive": {"tenants": found}})} == {True}


def test_targets_are_met_missed_or_unknown():
    found = figures(SCENARIOS["abrupt"], abrupt_runs(), SECONDS)
    assert [item["met"] for item in targets("abrupt", found)] == [True, True, True]
    worse = figures(SCENARIOS["abrupt"], abrupt_runs() | {"adaptive": run_of("adaptive")}, SECONDS)
    assert [item["met"] for item in targets("abrupt", worse)] == [False, False, False]
    alone = figures(SCENARIOS["abrupt"], {"adaptive": run_of("adaptive", swap_s=400.0)}, SECONDS)
    assert [item["met"] for item in targets("abrupt", alone)] == [None, None, None]
    assert targets("gradual", found) == []
    mixed = {"adaptive": run_of("adaptive", "mixed", swap_s=400.0)}
    unjudged = targets("mixed", figures(SCENARIOS["mixed"], mixed, SECONDS))
    assert [item["met"] for item in unjudged] == [None, False]
    mixed["oracle"] = run_of("oracle", "mixed")
    assert targets("mixed", figures(SCENARIOS["mixed"], mixed, SECONDS))[0]["met"] is True


# -- arms, command line, picture -------------------------------------------------------------


def test_arms_differ_by_settings_alone(tmp_path):
    """What is not the arm's own is the same in all of them."""
    base = Settings()
    made = {arm: arm_settings(base, arm, tmp_path / arm) for arm in ARMS}
    assert {arm for arm, item in made.items() if item.monitors.adapt} == {"adaptive"}
    assert {arm for arm, item in made.items() if "draft" not in item.engine.proposers} == {"suffix"}
    assert all(item.distill == base.distill and item.log == base.log for item in made.values())
    assert {arm for arm, item in made.items() if item.monitors.guard_margin == 1.0} == {"oracle"}
    longer = oracle_settings(base, tmp_path, 1e9)
    assert longer.distill.epochs > base.distill.epochs
    assert not longer.monitors.auto_promote
    assert oracle_settings(base, tmp_path, 60.0).distill.max_seconds == 60.0
    with pytest.raises(SettingsError, match="no arm 'x'"):
        arm_settings(base, "x", tmp_path)


def test_an_arm_begins_with_what_was_trained_but_not_with_its_sockets(tmp_path):
    old = tmp_path / "old"
    for name in ("run", "logs", "artifacts/run"):
        (old / name).mkdir(parents=True)
        (old / name / "file").write_text("x")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/left").write_text("over")
    fresh_folder(tmp_path / "new", old)
    assert {
        path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()
    } == {"artifacts/run/file"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--scenario", "sudden"], "no scenario 'sudden'; there are abrupt, gradual"),
        (["--arms", "best"], "no arm 'best'"),
        (["--segments", "a"], "two names with a comma"), (["--rate", "0"], "--rate 0: it must be above 0"),
        (["--prompts", "/nowhere.jsonl"], "no such file"), (["--minutes", "0.1", "--rate", "1"], "45 s are needed"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_said_before_anything_starts(tmp_path, capsys, words, says):
    """Exit status 2, the reason, and no file."""
    out = tmp_path / "x.json"
    assert shift.main(["--json", str(out), "--arms", "static", *words]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_quick_is_a_plan_of_its_own(tmp_path):
    plan = make_plan(read_arguments(["--json", "x", "--quick"]), tmp_path)
    assert [item.name for item in plan.scenarios] == ["abrupt"]
    assert plan.arms == ["static", "adaptive"]
    assert Path(plan.rig.settings.target).is_dir()
    more = make_plan(read_arguments(["--json", "x", "--quick", "--arms", *ARMS]), tmp_path / "again")
    assert more.arms == list(ARMS)


def test_the_picture_and_the_table_show_every_scenario(tmp_path):
    """Marks, gaps and missing arms included; the same figures give the same bytes."""
    result: dict = {"scenarios": {}, "timelines": {}, "targets": {}, "arms_failed": {}}
    for name, scenario in SCENARIOS.items():
        runs = {"static": run_of("static", name), "adaptive": run_of("adaptive", name, swap_s=400.0)}
        result["scenarios"][name] = figures(scenario, runs, SECONDS)
        result["timelines"][name] = timeline(scenario, SECONDS)
        result["targets"][name] = targets(name, result["scenarios"][name])
        result["arms_failed"][name] = {"oracle": "its training failed"}
    for name in SCENARIOS:
        plot_shift.draw(result, name, tmp_path / f"1-{name}.svg")
        plot_shift.draw(json.loads(json.dumps(result)), name, tmp_path / f"2-{name}.svg")
        assert (tmp_path / f"1-{name}.svg").read_bytes() == (tmp_path / f"2-{name}.svg").read_bytes()
    lines = table(result).splitlines()
    assert sum(line.startswith(tuple(SCENARIOS)) for line in lines) == 3 * len(SCENARIOS)
    assert any(line.startswith("missed") for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_quick_run_learns_on_a_live_service(tmp_path):
    """About a minute and a half: a file that is whole, a picture, no failed request, the same texts in both arms."""
    out = tmp_path / "quick.json"
    assert shift.main(["--json", str(out), "--quick"]) == 0
    result = json.loads(out.read_text())
    arms = result["scenarios"]["abrupt"]
    assert {"commit", "machine", "versions", "command"} <= result.keys()
    assert all(arm["failed"] == 0 and arm["requests"] > 200 for arm in arms.values())
    assert arms["adaptive"]["other_texts_than_static"] == 0
    assert arms["static"]["trainings"] == []
    assert arms["adaptive"]["trainings"]
    assert arms["adaptive"]["drift"]
    assert (tmp_path / "quick-abrupt.svg").exists()
    assert not list(tmp_path.glob("*.part"))
