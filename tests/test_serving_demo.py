"""The demonstration's parts: its traffic, what counts as cut, its figures, its report, its failure path."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from sqlalchemy import Engine
from typer.testing import CliRunner

from adapter.accounting import Accounting, Window
from adapter.contracts import SettingsError
from adapter.sections import DistillSettings
from adapter.settings import Settings
from serving.demo import exactness, measure
from serving.demo.__main__ import app, empty_result, write_json
from serving.demo.prompts import Deck, Family, advice, tables
from serving.demo.report import chart, print_report
from serving.demo.service import PACE, demo_settings
from serving.demo.traffic import Ask, Reply, Traffic, read_event


def test_families_are_large_distinct_and_deterministic() -> None:
    """Each kind of traffic has over 200 different prompts, the same for the same seed, none shared."""
    one, other = advice(1), tables(1)
    for family in (one, other):
        assert len(family.prompts) >= 200
        assert len(set(family.prompts)) == len(family.prompts)
        assert all(prompt == prompt.strip() and prompt.endswith((".", "?")) for prompt in family.prompts)
    assert not set(one.prompts) & set(other.prompts)
    assert one == advice(1)
    assert other == tables(1)


def test_another_seed_reorders_and_keeps_the_prompts() -> None:
    """The seed decides the order only."""
    one, other = tables(1).prompts, tables(2).prompts
    assert one != other
    assert sorted(one) == sorted(other)


def test_a_deck_deals_every_prompt_before_any_twice() -> None:
    """Nothing is asked twice before everything has been asked once."""
    deck = Deck(Family("n", "about", ("a", "b", "c")))
    assert deck.take(4) == ["a", "b", "c", "a"]


def reply(**fields: Any) -> Reply:
    values = {"started_s": 0.0, "finished_s": 1.0, "finish_reason": "length", "completion_tokens": 48, "ended": True}
    return Reply(ask=Ask(prompt="p", max_tokens=48), **(values | fields))


@pytest.mark.parametrize(
    ("fields", "truncated"),
    [
        ({}, False),
        ({"finish_reason": "stop", "completion_tokens": 7}, False),
        ({"completion_tokens": 47}, True),
        ({"finish_reason": None}, True),
        ({"ended": False}, True),
        ({"completion_tokens": None}, True),
        ({"error": "HTTP 503", "finish_reason": None, "ended": False}, False),
    ],
)
def test_truncated_is_shorter_than_asked_without_an_end(fields: dict[str, Any], truncated: bool) -> None:
    """An answer is truncated when its end is missing or early; a refused request failed instead."""
    assert reply(**fields).truncated is truncated
    assert reply(**fields).failed is ("error" in fields)


def test_a_stream_is_read_to_its_end() -> None:
    """Text, finish reason and usage are collected; without [DONE] the answer counts as cut."""
    events = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {"choices": [{"delta": {"content": "Hi"}, "finish_reason": None}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"completion_tokens": 2}},
    ]
    got = reply(finish_reason=None, completion_tokens=None, ended=False)
    for event in events:
        read_event(f"data: {json.dumps(event)}", got)
        read_event("", got)
    assert (got.text, got.finish_reason, got.completion_tokens) == ("Hi", "stop", 2)
    assert got.truncated
    read_event("data: [DONE]", got)
    assert not got.truncated


def test_an_error_inside_a_stream_is_a_failure() -> None:
    """A stream that ends in an error event failed, even though it was closed in order."""
    got = reply(finish_reason=None)
    read_event('data: {"error": {"message": "the engine restarted"}}', got)
    read_event("data: [DONE]", got)
    assert got.failed
    assert got.error == "the engine restarted"


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_loop_stops_when_told_and_forgets_no_reply(anyio_backend: str) -> None:
    """A closed loop against a server that is not there ends when told; every request is a failure."""
    traffic = Traffic("http://127.0.0.1:9", "m", timeout_s=1.0)
    left = iter([True, True, False, False])
    replies = await traffic.loop(lambda: "p", 2, lambda: next(left))
    await traffic.close()
    assert len(replies) == len(traffic.replies) == 2
    assert all(item.failed and not item.truncated for item in replies)


def window(at_s: float, version: int | None, accepted: int, examined: int = 100, judged: int = 10) -> Window:
    mean = accepted / examined
    return Window(
        at_s=at_s, seconds=1.0, segment="default", version=version, requests=judged, rounds=50, examined=examined,
        accepted=accepted, acceptance_sum=judged * mean, acceptance_sum_squares=judged * (mean * mean + 0.01),
        judged_requests=judged,
    )  # fmt: skip


@pytest.fixture
def accounting(database: Engine) -> Accounting:
    """Ten seconds at 0.5 under version 0, ten at 0.2, then version 1 at 0.6 with a row of version 0 in between."""
    rows = [window(at, 0, 50) for at in range(1, 11)] + [window(at, 0, 20) for at in range(11, 21)]
    rows += [window(21, 0, 20), window(21, None, 0, 1)] + [window(at, 1, 60) for at in range(21, 31)]
    accounting = Accounting(database)
    accounting.add(rows)
    return accounting


def test_acceptance_is_of_one_stretch_and_one_version(accounting: Accounting) -> None:
    """A stretch takes windows that ended inside it; other versions and plain traffic are left out."""
    before = measure.acceptance(accounting, 0, 10, 0)
    assert (before["value"], before["n"]) == (0.5, 100)
    low, high = before["interval"]
    assert low < 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 99**0.5, rel=0.01)
    assert measure.acceptance(accounting, 10, 20, 0)["value"] == 0.2
    assert measure.acceptance(accounting, 20, 30, 1)["value"] == 0.6
    assert measure.acceptance(accounting, 20, 30, 0)["n"] == 10


def test_acceptance_without_requests_is_unknown(accounting: Accounting) -> None:
    """Nothing served is null, not zero."""
    assert measure.acceptance(accounting, 0, 10, 7) == {"value": None, "n": 0, "interval": None}


def test_all_ended_requests_are_counted_as_recorded(accounting: Accounting) -> None:
    """Boundaries are drawn by how many requests were recorded, whatever drafted them."""
    assert measure.recorded_requests(accounting, 0) == 320
    assert measure.recorded_requests(accounting, 25) == 50


def test_series_merges_versions_and_leaves_gaps(accounting: Accounting) -> None:
    """A column is Σ accepted / Σ examined of its slice; a slice without rounds is None."""
    values = measure.series(accounting.between(0), 0, 44, 4)
    assert values[0] == pytest.approx(0.5)
    assert values[3] is None
    assert measure.series([], 0, 1, 3) == [None, None, None]


def test_throughput_counts_while_all_clients_are_busy() -> None:
    """Two clients of 48 tokens a second each give 96, and the run-down at the end does not count."""
    replies = [reply(started_s=float(i), finished_s=i + 1.0) for i in range(10) for _ in range(2)]
    assert measure.throughput(replies) == pytest.approx(96)
    assert measure.throughput(replies, until_s=4.5) == pytest.approx(96)
    assert measure.throughput([reply(error="x")]) is None


class Words:
    """A tokenizer of one token a letter."""

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        return type("Encoding", (), {"ids": [ord(letter) for letter in text]})

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def reference(text: str, lead: float = 1.0) -> dict[str, Any]:
    return {"text": text, "token_ids": [ord(letter) for letter in text], "leads": [lead] * len(text)}


@pytest.mark.parametrize(
    ("text", "lead", "differing", "ties"),
    [("abcd", 1.0, 0, 0), ("abXd", 1.0, 1, 0), ("abXY", 1.0, 2, 0), ("abXY", 1e-4, 0, 1), ("ab", 1.0, 2, 0)],
)
def test_differences_are_counted_and_ties_apart(text: str, lead: float, differing: int, ties: int) -> None:
    """Differing positions are counted, unless the reference itself was undecided at the first of them."""
    totals = exactness.Exactness()
    got = reply(text=text, completion_tokens=len(text))
    exactness.compare_greedy(totals, Words(), [got], [reference("abcd", lead)])  # type: ignore[arg-type]
    assert totals == exactness.Exactness(prompts=1, tokens=4, differing_tokens=differing, ties=ties)


def test_a_missing_token_counts_though_the_text_is_equal() -> None:
    """An answer whose text is right and whose length is not differs."""
    totals = exactness.Exactness()
    exactness.compare_greedy(
        totals,
        Words(),  # type: ignore[arg-type]
        [reply(text="ab", completion_tokens=3)],
        [reference("ab")],
    )
    assert totals.differing_tokens == 1


def test_sampled_pairs_are_compared_with_each_other() -> None:
    """Equal pairs count nothing; a pair that differs without a reference counts in full."""
    totals = exactness.Exactness()
    pairs = [(reply(text="ab"), reply(text="ab")), (reply(text="ax"), reply(text="ab"))]
    exactness.compare_sampled(totals, Words(), pairs, {})  # type: ignore[arg-type]
    assert (totals.prompts, totals.differing_tokens, totals.ties) == (2, 1, 0)
    exactness.compare_sampled(totals, Words(), pairs[1:], {0: reference("ab", 1e-5)})  # type: ignore[arg-type]
    assert (totals.differing_tokens, totals.ties) == (1, 1)


def test_sampled_requests_differ_in_temperature_and_seed() -> None:
    """The sampled half covers several temperatures and nuclei, each request with a seed of its own."""
    asks = exactness.sampled_asks(["a", "b", "c", "d"])
    assert len({ask.seed for ask in asks}) == 4
    assert all(ask.temperature > 0 for ask in asks)
    assert any(ask.top_p < 1 for ask in asks)


def test_comparisons_stay_out_of_the_watched_traffic() -> None:
    """Requests that are only compared go to a segment of their own, so they set no baseline."""
    asks = [*exactness.greedy_asks(["a"]), *exactness.sampled_asks(["b"])]
    assert {ask.headers["x-draftsmith-segment"] for ask in asks} == {exactness.SEGMENT}
    assert Ask(prompt="p").headers == {}


def test_the_pace_is_named_and_leaves_the_users_choices(tmp_path: Path) -> None:
    """What the demonstration changes is listed with its default; what the user chose stays."""
    base = Settings(distill=DistillSettings(epochs=3), dtype="bfloat16", redis_url="redis://elsewhere")
    settings, changed = demo_settings(base, data_dir=tmp_path / "new", draft="/a/draft", target=None)
    assert settings.distill.epochs == 3
    assert "distill.epochs" not in changed
    assert changed["monitors.baseline_requests"]["demo"] == PACE["monitors"]["baseline_requests"]
    assert settings.monitors.baseline_requests == PACE["monitors"]["baseline_requests"]
    assert (settings.dtype, settings.redis_url, settings.draft) == ("float32", None, "/a/draft")


def test_every_setting_of_the_pace_exists() -> None:
    """The pace names real settings and really differs from the defaults."""
    defaults = Settings()
    for section, wishes in PACE.items():
        for name, value in wishes.items():
            assert getattr(getattr(defaults, section), name) != value


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    """The demonstration never runs in a folder that holds a deployment."""
    (tmp_path / "draftsmith.db").touch()
    with pytest.raises(SettingsError, match="folder of its own"):
        demo_settings(Settings(), data_dir=tmp_path)


def sample() -> dict[str, Any]:
    one = {"value": 0.31, "n": 60, "interval": [0.29, 0.33]}
    two = {"value": 0.12, "n": 110, "interval": [0.11, 0.13]}
    values = [0.3] * 20 + [0.12] * 30 + [None] * 2 + [0.4] * 10 + [0.12] * 10
    return empty_result() | {
        "target": "t", "draft": "d", "exact": {"prompts": 16, "tokens": 700, "differing_tokens": 0, "ties": 1},
        "acceptance": {"before_shift": one, "at_shift": two, "after_adaptation": one, "after_rollback": two},
        "tokens_per_second": {
            "no_speculation": 40.0, "no_speculation_after": 50.0, "before_shift": 50.0, "at_shift": 38.0,
            "after_adaptation": 69.0,
        },
        "swap_pause_ms": 0.004, "median_step_ms": 80.0, "rollback_s": 0.4, "rollback_swap_s": 0.1,
        "requests": {"sent": 400, "failed": 0, "truncated": 0}, "log": {"entries": 800, "dropped": 0},
        "training": {"seconds": 130.0, "blocks": 200, "gate": {"verdict": "Passed: acceptance 0.12 → 0.31."}},
        "marks": {"shift": 160.0, "promotion": 420.0, "rollback": 500.0},
        "timeline": {"seconds": 576.0, "acceptance": values}, "wall_seconds": 580.0,
    }  # fmt: skip


def printed(result: dict[str, Any]) -> str:
    out = io.StringIO()
    print_report(Console(file=out, width=120), result)
    return out.getvalue()


def test_the_report_shows_every_figure() -> None:
    """Chart, marks, acceptance with intervals, speed ratios and the rest are all on the page."""
    text = printed(sample())
    for expected in ("0.310", "[0.290, 0.330]", "1.25x", "0.76x", "1.38x", "0 of 700 tokens differ", "1 tie",
                     "0.004 ms", "0.40 s", "400 sent, 0 failed, 0 truncated", "800 entries written, 0 dropped",
                     "Passed: acceptance",
                     "S shift at 160 s", "P promotion at 420 s", "R rollback at 500 s"):  # fmt: skip
        assert expected in text
    assert "Not finished" not in text


def test_the_report_of_an_early_end_says_why() -> None:
    """With nothing measured the report still prints, and says which stage failed and why."""
    text = printed(empty_result() | {"failed": {"stage": "drift", "reason": "no drift was found"}})
    assert "Not finished: no drift was found (stage 'drift')" in text


def test_the_chart_is_as_wide_as_its_values_and_as_high_as_they_are() -> None:
    """A full column is filled to the top, an empty one stays blank, and marks stand under their column."""
    lines = [line.plain for line in chart([1.0, 0.5, None, 0.0], 40.0, {"shift": 10.0})]
    columns = [line[7:11] for line in lines[:8]]
    assert [row[0] for row in columns] == ["█"] * 8
    assert [row[1] for row in columns] == [" "] * 4 + ["█"] * 4
    assert {row[2:] for row in columns} == {"  "}
    assert lines[9][7:11] == " S  "


def test_the_document_has_the_promised_names() -> None:
    """Readers of the JSON find every name, measured or not."""
    promised = {
        "target", "draft", "exact", "acceptance", "tokens_per_second", "swap_pause_ms", "median_step_ms", "rollback_s",
        "requests", "log", "training", "machine", "versions", "wall_seconds", "settings", "failed",
    }  # fmt: skip
    result = empty_result()
    assert promised <= set(result)
    assert set(result["acceptance"]) == {"before_shift", "at_shift", "after_adaptation", "after_rollback"}
    speeds = {"no_speculation", "no_speculation_after", "before_shift", "at_shift", "after_adaptation"}
    assert set(result["tokens_per_second"]) == speeds


def test_a_document_is_written_whole(tmp_path: Path) -> None:
    """The file appears under its name only when complete, in a folder that is made for it."""
    path = tmp_path / "new" / "demo.json"
    write_json(path, sample())
    assert json.loads(path.read_text())["rollback_s"] == 0.4
    assert [item.name for item in path.parent.iterdir()] == ["demo.json"]


def test_settings_that_cannot_work_end_with_a_sentence_and_a_document(tmp_path: Path) -> None:
    """A used folder ends the command with status 2, says why, and still writes the JSON."""
    used, out = tmp_path / "used", tmp_path / "out.json"
    used.mkdir()
    (used / "draftsmith.db").touch()
    done = CliRunner().invoke(app, ["--data-dir", str(used), "--json", str(out)])
    assert done.exit_code == 2
    assert "folder of its own" in done.output
    assert json.loads(out.read_text())["failed"]["stage"] == "settings"


def test_the_body_asks_for_what_the_request_says() -> None:
    """Speculation is only switched off where asked, and streams ask for their token counts."""
    plain = Ask(prompt="p", speculate=False).body("m")
    assert plain["speculative"] == {"enabled": False}
    assert "stream" not in plain
    assert Ask(prompt="p", stream=True).body("m")["stream_options"] == {"include_usage": True}
    assert httpx.Request("POST", "http://x", json=plain).content
