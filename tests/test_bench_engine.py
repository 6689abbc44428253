"""The benchmark of the engine, end to end on the tiny pair: what is counted is right and comparable."""

from __future__ import annotations

import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_rig import build_rig, prompts
from tiny_pair import pair_settings, write_pair

from adapter.contracts import Counts, SettingsError
from adapter.models import prepare_pair
from bench import rows, workloads
from bench.budget import Budget, Cell
from bench.driver import Load, Window, burst, longest_answer, steady
from bench.engine import measure
from bench.options import Options
from bench.rows import Key, Row, ratios
from bench.vllm_arm import Vllm
from serving.engine.control.fixed import FixedGamma

ROW_FIELDS = {
    "target", "widen", "batch", "workload", "arm", "temperature", "coupling", "tokens_per_s", "tpot_ms_p50",
    "tpot_ms_p99", "ttft_ms_p50", "acceptance", "tokens_per_round", "gamma_mean", "repeat_spread",
}  # fmt: skip
TOKENS = 6


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run with two arms of the engine and both of the library, at two widths."""
    folder = tmp_path_factory.mktemp("bench")
    target, draft = write_pair(folder)
    options = Options(
        target=str(target), draft=str(draft), dtype="float32", widen=(1, 2), batches=(1, 2), workloads=("high", "rag",
        "sampled"), arms=("none", "fixed-3", "hf_generate", "hf_assisted"), repeats=2, tokens=TOKENS, minutes=10.0,
        max_prompt_tokens=48, cache_dir=folder / "cache", engine={"block_tokens": 8, "threads": 1},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # who is far behind is a matter of time, and would run once
        patch.setattr("bench.budget.contenders", lambda rows: {row.key for row in rows})
        return dict(json.loads(json.dumps(measure(options))))


def test_every_row_that_was_asked_for_is_there(result: dict[str, Any]) -> None:
    """Each width, batch, workload, coupling and arm has one row with every field; no speculation has all repeats."""
    found = sorted(
        (row["widen"], row["workload"], row["batch"], row["temperature"], row["coupling"], row["arm"],
         row["prefix_cache"]) for row in result["rows"]
    )  # fmt: skip
    expected = [
        (widen, "high", batch, 0.0, "gumbel", arm, True)
        for widen in (1, 2)
        for batch in (1, 2)
        for arm in ("none", "fixed-3") + (("hf_generate", "hf_assisted") if batch == 1 else ())
    ]
    expected += [
        (1, "mixed", 1, 0.8, coupling, arm, True) for coupling in ("gumbel", "maximal") for arm in ("none", "fixed-3")
    ]
    expected += [(1, "rag", 2, 0.0, "gumbel", "none", cached) for cached in (True, False)]

    assert sorted(expected) == found
    assert all(row.keys() >= ROW_FIELDS for row in result["rows"])
    assert {2} == {row["repeats"] for row in result["rows"]}
    assert {"cpu", "cores", "memory_gib"} <= result["machine"].keys()
    assert {"torch", "transformers", "draftsmith"} <= result["versions"].keys()


def test_arms_deliver_equal_token_counts(result: dict[str, Any]) -> None:
    """A window delivers what was asked for, beyond it at most the last round's tokens."""
    for row in result["rows"]:
        if row["workload"] == "rag":
            continue
        waves = 2 if row["batch"] == 1 else 1
        requests = row["repeats"] * waves * row["batch"]
        asked, most = requests * TOKENS, requests * 3
        exact = row["arm"] in ("none", "hf_generate")
        assert asked <= row["tokens"] <= asked + (0 if exact else most), row


def test_figures_of_speculation_belong_to_speculation(result: dict[str, Any]) -> None:
    """Plain decoding has one token a round and no acceptance; drafting has both, consistent with each other."""
    for row in result["rows"]:
        if row["arm"] == "none":
            assert (1.0, 0.0, None) == (row["tokens_per_round"], row["gamma_mean"], row["acceptance"])
        if row["arm"] == "fixed-3":
            assert 0 <= row["acceptance"] <= 1
            assert 2 < row["gamma_mean"] <= 3
            assert 1 <= row["tokens_per_round"] <= 4
        assert row["tokens_per_s"] > 0
        assert row["tpot_ms_p99"] >= row["tpot_ms_p50"] > 0
        assert row["ttft_ms_p50"] > 0


def test_widening_changes_cost_and_not_acceptance(result: dict[str, Any]) -> None:
    """The same prompts on the widened target, in float32: the same rounds, token for token."""
    by_width: dict[int, list[tuple[Any, ...]]] = {1: [], 2: []}
    for row in result["rows"]:
        if row["workload"] == "high" and row["arm"] == "fixed-3":
            by_width[row["widen"]].append((row["batch"], row["tokens"], row["acceptance"], row["tokens_per_round"]))

    assert by_width[1] == by_width[2]


def test_the_promised_ratios_are_given(result: dict[str, Any]) -> None:
    """Each ratio that these arms allow is there, with its spread; those of missing arms are empty."""
    found = {name: {(item["widen"], item["batch"]) for item in items} for name, items in result["ratios"].items()}

    assert found == {
        "adaptive_vs_best": set(), "adaptive_vs_none": set(), "none_vs_hf_generate": {(1, 1), (1, 2), (2, 1), (2, 2)},
        "fixed3_vs_hf_assisted": {(1, 1), (2, 1)}, "prefix_cache": {(1, 2)},
        "adaptive_vs_vllm": set(), "none_vs_vllm": set(),
    }  # fmt: skip
    for items in result["ratios"].values():
        assert all(item["low"] <= item["ratio"] <= item["high"] for item in items)


def test_what_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    """An unknown arm, workload or batch is named, with what there is."""
    for wrong, said in (
        ({"arms": ("fixed-2",)}, "--arms fixed-2: there are none, fixed-1"),
        ({"workloads": ("chat",)}, "--workloads chat: there are high"),
        ({"batches": (0,)}, "--batches 0: expected whole numbers from 1"),
    ):
        with pytest.raises(SettingsError, match=said):
            measure(Options(**wrong))  # type: ignore[arg-type]


def test_an_environment_without_vllm_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A python that cannot start, or cannot import vllm, is named; the worker's own words are shown."""
    write_pair(tmp_path)
    pair = prepare_pair(pair_settings(tmp_path, tmp_path / "data"))
    with pytest.raises(SettingsError, match="--vllm-python /no/such/python cannot be started"):
        Vllm("/no/such/python", pair, "vllm", max_batch=1, max_model_len=64)
    with pytest.raises(SettingsError, match="the vLLM worker ended with code 1"):
        Vllm(sys.executable, pair, "vllm", max_batch=1, max_model_len=64)
    assert "No module named 'vllm'" in capfd.readouterr().err


# -- windows -----------------------------------------------------------------------------------


def test_a_window_is_full_from_beginning_to_end(tmp_path: Path) -> None:
    """In a steady window every request decodes in every measured step, and nothing is left behind."""
    write_pair(tmp_path)
    engine = build_rig(tmp_path, tmp_path / "data").engine
    asked = prompts(97, (60, 5, 33, 90))
    free = engine.scheduler.free_blocks
    decoding: list[int] = []
    ticks = iter(range(10**6))
    real = engine.controller = FixedGamma(3)
    choose = real.choose
    real.choose = lambda requests, offers, shape: (decoding.append(len(requests)), choose(requests, offers, shape))[1]

    limit = longest_answer(asked, TOKENS, 8, 64)
    window = steady(engine, Load(asked, "test", "salt"), TOKENS, limit, clock=lambda: float(next(ticks)))

    measured = decoding[-len(window.steps_s) :]
    assert {len(asked)} == set(measured)
    assert window.rounds == sum(measured)
    assert window.tokens == window.rounds + window.counts.num_accepted
    assert TOKENS * len(asked) <= window.tokens <= TOKENS * len(asked) + 3 * len(asked)
    assert not engine.busy
    assert free == engine.scheduler.free_blocks


def test_runs_do_not_feed_each_other(tmp_path: Path) -> None:
    """The same prompts in a run of another salt find no cached prefix; inside one run they do."""
    write_pair(tmp_path)
    engine = build_rig(tmp_path, tmp_path / "data").engine
    asked = prompts(97, (60,)) * 3
    for salt in ("one", "two"):
        before = engine.scheduler.prefix_hits
        burst(engine, Load(asked, "test", salt), [4] * 3, 1)
        assert engine.scheduler.prefix_hits - before == 2 * (59 // 8) * 8


def test_tpot_and_ttft_come_from_the_times_of_steps(tmp_path: Path) -> None:
    """With a clock that a step moves by one, plain decoding takes one tick a token and prefill one a chunk."""
    write_pair(tmp_path)
    engine = build_rig(tmp_path, tmp_path / "data").engine
    engine.controller = FixedGamma(0)
    now = 0.0
    real = engine.step

    def step() -> Any:
        nonlocal now
        now += 1
        return real()

    engine.step = step  # type: ignore[method-assign]
    window = burst(engine, Load(prompts(97, (100,)), "test", "s"), [9], 1, clock=lambda: now)

    assert [1.0] == window.tpot_s
    assert [2.0] == window.ttft_s  # 100 prompt tokens in chunks of 64
    assert 9 / 10 == window.tokens_per_s


# -- rows and budget ---------------------------------------------------------------------------


def made(seconds: list[float], **about: Any) -> Row:
    key = Key(**({"target": "t", "widen": 1, "batch": 1, "workload": "high", "arm": "none"} | about))
    return Row(key, [Window(tokens=60, seconds=one, tpot_s=[one], ttft_s=[one]) for one in seconds])


def test_ratios_are_taken_repeat_by_repeat() -> None:
    """A machine that is twice as slow in one repeat changes no ratio; the best fixed length is by median."""
    slow = [1.0, 2.0, 1.0]
    table = [
        made([3 * one for one in slow]), made([2 * one for one in slow], arm="fixed-1"),
        made([4 * one for one in slow], arm="fixed-5"), made([1.6 * one for one in slow], arm="adaptive"),
    ]  # fmt: skip
    found = ratios(table)

    best = found["adaptive_vs_best"]
    assert [("fixed-1", 1.25, 1.25, 1.25)] == [
        (item["against"], item["ratio"], item["low"], item["high"]) for item in best
    ]
    assert [1.875] == [item["ratio"] for item in found["adaptive_vs_none"]]

    uneven = ratios([made([2.0, 4.0, 27.0]), made([1.0, 4.0, 9.0], arm="adaptive")])["adaptive_vs_none"][0]
    assert (2.0, 1.0, 3.0) == (uneven["ratio"], uneven["low"], uneven["high"])  # of the medians it would be 1


def test_luck_does_not_choose_the_rival() -> None:
    """Beside four arms equal but for noise of 10 % an equal one has a ratio of 1, within 1 % at n = 400 and seed 3."""
    chance = random.Random(3)
    arms = ("none", "fixed-1", "fixed-3", "fixed-5", "adaptive")
    seen = []
    for _ in range(400):
        table = [made([chance.gauss(1.0, 0.1) for _ in range(4)], arm=arm) for arm in arms]
        seen.append(ratios(table)["adaptive_vs_best"][0]["ratio"])

    assert statistics.mean(seen) == pytest.approx(1.0, abs=0.01)


def test_the_library_is_the_reference_of_every_batch() -> None:
    """No speculation at batch 8 is compared with the library's one-after-another speed at batch 1."""
    found = ratios([made([1.0], batch=8), made([4.0], arm="hf_generate")])

    assert [(8, 4.0)] == [(item["batch"], item["ratio"]) for item in found["none_vs_hf_generate"]]


def test_vllm_is_met_by_its_faster_arm() -> None:
    """The adaptive arm is compared with the better of vLLM's two at its point, no speculation with its plain one."""
    table = [
        made([2.0]), made([1.0], arm="adaptive"), made([3.0], arm="vllm"), made([1.5], arm="vllm-ngram"),
        made([0.1], arm="vllm", batch=8),
    ]  # fmt: skip
    found = ratios(table)

    assert [("vllm-ngram", 1.5)] == [(item["against"], item["ratio"]) for item in found["adaptive_vs_vllm"]]
    assert [("vllm", 1.5)] == [(item["against"], item["ratio"]) for item in found["none_vs_vllm"]]


def test_a_row_has_medians_percentiles_and_spread() -> None:
    """Speed is the median over repeats, spread their range over it, times percentiles over all requests."""
    report = made([1.0, 2.0, 3.0]).report()

    assert (30.0, 1.3333, 3) == (report["tokens_per_s"], report["repeat_spread"], report["repeats"])
    assert (2000.0, 2980.0) == (report["tpot_ms_p50"], report["tpot_ms_p99"])
    assert report["acceptance"] is None
    assert set(rows.ENGINE_ARMS) >= set(rows.FIXED)


def test_repeats_are_reduced_to_the_time_and_it_is_said() -> None:
    """Repeats that would end after the phase's share are not begun; the result says how many were run."""
    now = 0.0
    order: list[tuple[str, int]] = []

    def cell(arm: str, seconds: float) -> Cell:
        def run(repeat: int) -> Window:
            nonlocal now
            now += seconds
            order.append((arm, repeat))
            return Window(tokens=1, seconds=4.0, tpot_s=[], ttft_s=[])

        return Cell(Key(target="t", widen=1, batch=1, workload="low", arm=arm), run)

    budget = Budget(100.0, {"a": 1.0, "b": 3.0}, lambda line: None, clock=lambda: now)
    first = budget.run("a", [[cell("none", 4.0), cell("fixed-1", 5.0)]], 5, budget.share("a"))
    second = budget.run("b", [[cell("none", 30.0)]], 5, budget.share("b"))

    assert [2, 2] == [len(row.windows) for row in first]  # 25 s are its share
    assert [("none", 0), ("fixed-1", 0), ("fixed-1", 1), ("none", 1)] == order[:4]
    assert [2] == [len(row.windows) for row in second]  # 82 s are left
    assert budget.phases["a"]["reduced"] == "5 repeats of 9 s each did not fit into the time left; 2 were run"
    assert 2 == budget.phases["b"]["repeats"]


def test_arms_far_behind_leave_after_one_repeat() -> None:
    """What a promise compares goes on: no speculation, the adaptive arm, vLLM's and fixed lengths that may be best."""
    speeds = {"none": 10.0, "fixed-1": 9.0, "fixed-3": 5.0, "adaptive": 4.0, "hf_generate": 3.0, "vllm": 2.0}

    def cell(arm: str, speed: float, coupling: str) -> Cell:
        window = Window(tokens=10, seconds=10 / speed, tpot_s=[], ttft_s=[])
        key = Key(target="t", widen=1, batch=1, workload="mixed", arm=arm, coupling=coupling)
        return Cell(key, lambda repeat: window)

    group = [cell(arm, speed, "gumbel") for arm, speed in speeds.items()]
    group += [cell("none", 1.0, "maximal"), cell("fixed-3", 1.2, "maximal")]  # slow, yet the best of its coupling
    budget = Budget(1e9, {"a": 1.0}, lambda line: None, clock=lambda: 0.0)
    measured = {(row.key.coupling, row.key.arm): len(row.windows) for row in budget.run("a", [group], 4, 1.0)}

    gumbel = {"none": 4, "fixed-1": 4, "fixed-3": 1, "adaptive": 4, "hf_generate": 1, "vllm": 4}
    assert measured == {("gumbel", arm): count for arm, count in gumbel.items()} | {
        ("maximal", "none"): 4, ("maximal", "fixed-3"): 4,
    }  # fmt: skip


def test_the_first_repeat_is_always_run() -> None:
    """A budget of nothing still measures everything once."""
    budget = Budget(0.0, {"a": 1.0}, lambda line: None)
    cell = Cell(
        Key(target="t", widen=1, batch=1, workload="low", arm="none"),
        lambda repeat: Window(tokens=1, seconds=1.0, tpot_s=[], ttft_s=[], counts=Counts()),
    )
    assert [1] == [len(row.windows) for row in budget.run("a", [[cell]], 3, budget.share("a"))]


# -- workloads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_prompts_follow_from_the_seed(name: str) -> None:
    """The same seed gives the same prompts, another gives others, and a longer list begins with a shorter one."""
    assert workloads.prompts(name, 12, 7) == workloads.prompts(name, 12, 7)
    assert workloads.prompts(name, 12, 7) != workloads.prompts(name, 12, 8)
    assert workloads.prompts(name, 20, 7)[:12] == workloads.prompts(name, 12, 7)
    assert len({prompt.text for prompt in workloads.prompts(name, 40, 7)}) > 30


def test_high_answers_are_in_the_prompt_and_mixed_deals_both() -> None:
    """Every other prompt of `mixed` is one of `high`; these begin the answer, and `low` never does."""
    assert all(prompt.lead for prompt in workloads.prompts("high", 12, 1))
    assert not any(prompt.lead for prompt in workloads.prompts("low", 12, 1))
    assert [True, False] * 6 == [bool(prompt.lead) for prompt in workloads.prompts("mixed", 12, 1)]


def test_questions_share_their_passages() -> None:
    """Questions of one passage are equal up to the question; passages differ; questions to each come mixed."""
    asked = [prompt.text.split("\n\nQuestion: ") for prompt in workloads.rag(3, 4, 5)]

    assert 3 == len({passage for passage, _ in asked})
    assert [passage for passage, _ in asked[:3]] * 4 == [passage for passage, _ in asked]
    assert 12 == len({(passage, question) for passage, question in asked})


def test_real_prompts_replace_made_up_ones(tmp_path: Path) -> None:
    """Texts of .jsonl files are used by every workload; a line without a prompt is named."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": f"text {i} " * 30}) + "\n" for i in range(9)))
    texts = workloads.load_texts(tmp_path)

    assert 9 == len(texts)
    for name in workloads.WORKLOADS:
        assert all("text " in prompt.text for prompt in workloads.prompts(name, 12, 0, texts))
    assert workloads.prompts("high", 9, 0, texts) == workloads.prompts("high", 9, 0, list(reversed(texts)))
    assert "text " in workloads.rag(1, 1, 0, texts=texts)[0].text
    (tmp_path / "b.jsonl").write_text('{"text": "no prompt"}\n')
    with pytest.raises(SettingsError, match=r"b\.jsonl, line 1: expected a JSON object with the field \"prompt\""):
        workloads.load_texts(tmp_path)
