"""What the benchmarks write down: the cost of logging, the picture, and the page made from kept results."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_pair import write_pair

from bench import load, page, record
from bench.driver import Window
from bench.environment import command, environment
from bench.plot import draw, speedups
from bench.rows import Key, Row, ratios
from bench.runs import merge

ROOT = Path(__file__).resolve().parent.parent


def window(seconds: float, steps: list[float] | None = None) -> Window:
    return Window(tokens=100, seconds=seconds, tpot_s=[seconds], ttft_s=[seconds], rounds=100, steps_s=steps or [])


@pytest.fixture
def result() -> dict[str, Any]:
    """A result as `bench.engine` writes it, with figures made up by a rule."""
    table = []
    for widen in (1, 2):
        for workload in ("high", "low", "mixed"):
            for batch in (1, 8):
                speed = {"none": 1.0, "fixed-1": 1.1, "fixed-3": 1.4, "fixed-5": 1.2, "adaptive": 1.6}
                speed |= {"hf_generate": 0.5, "hf_assisted": 0.7} if batch == 1 else {}
                for arm, gain in speed.items():
                    key = Key(target="t", widen=widen, batch=batch, workload=workload, arm=arm)
                    table.append(Row(key, [window(slow / (gain * batch)) for slow in (1.0, 2.0, 1.0)]))
    for cached, seconds in ((True, 1.0), (False, 3.0)):
        key = Key(target="t", widen=1, batch=4, workload="rag", arm="none", prefix_cache=cached)
        table.append(Row(key, [window(seconds)]))
    made = {
        "command": "python -m bench.engine --json FILE", "target": "t", "dtype": "float32", "phases": {},
        "rows": [row.report() for row in table], "ratios": ratios(table),
    }  # fmt: skip
    return dict(json.loads(json.dumps(made | environment())))


def test_the_cost_of_logging_is_measured_on_a_real_log(tmp_path: Path) -> None:
    """Windows with the log on write every block and outcome to a Valkey; windows with it off write none."""
    target, draft = write_pair(tmp_path)
    options = record.Options(
        target=str(target), draft=str(draft), dtype="float32", batches=(1, 2), pairs=2, tokens=8, max_prompt_tokens=40,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    found = json.loads(json.dumps(record.measure(options)))

    assert [1, 2] == [row["batch"] for row in found["rows"]]
    windows = [3 * 2 * 1, 3 * 2 * 1 + 3 * 2 * 2]  # (pairs + the first) x requests, so far
    assert [2 * requests for requests in windows] == [row["entries_written"] for row in found["rows"]]
    for row in found["rows"]:
        assert row["entries_dropped"] == 0
        assert row["low"] <= row["cost"] <= row["high"]
        assert row["windows_low"] <= row["windows_cost"] <= row["windows_high"]
        assert row["tokens_per_s_on"] > 0


def test_cost_compares_the_same_steps() -> None:
    """A tenth more in every step is a cost of 0.1, whatever one slow step of one window says."""
    off = [window(3.0, [1.0, 2.0]) for _ in range(5)]
    on = [window(3.3, [1.1, 2.2]) for _ in range(4)] + [window(99.0, [1.1, 97.9])]

    assert 0.1 == record.cost(on, off)["cost"]
    assert 0.1 == record.cost(on, off)["windows_cost"]


def test_speedups_are_over_no_speculation_of_the_same_repeat(result: dict[str, Any]) -> None:
    """Each point is the median ratio to `none`, so a slow repeat does not bend the line."""
    panels = speedups(result)

    assert {(widen, name) for widen in (1, 2) for name in ("high", "low", "mixed")} == set(panels)
    assert {"fixed-1", "fixed-3", "fixed-5", "adaptive"} == set(panels[1, "high"])
    assert [(1, pytest.approx(1.6, rel=1e-3)), (8, pytest.approx(1.6, rel=1e-3))] == panels[2, "low"]["adaptive"]


def test_the_picture_is_light_and_repeatable(result: dict[str, Any], tmp_path: Path) -> None:
    """The paper is opaque white, every arm is named, and the same result gives the same bytes."""
    draw(result, tmp_path / "a.svg")
    draw(result, tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()

    assert (tmp_path / "b.svg").read_text() == text
    assert re.search(r'<g id="patch_1">\s*<path [^>]*style="fill: #ffffff"', text)
    assert "<!-- adaptive -->" in text


def test_the_page_says_what_was_measured(result: dict[str, Any]) -> None:
    """Every promise has its figure and its row, and every measured speed its cell."""
    text = page.page([result], None, None, picture=True)

    assert "≥ 0.97 | 1.14 [1.14, 1.14] |" in text
    assert "batch 1, `high`, target widened 2x | ≥ 1.5 | 1.60 [1.60, 1.60] |" in text
    assert "one request after another, worst row | ≥ 3 | 16.00 [16.00, 16.00] | `high`, batch 8" in text
    assert "assisted generation, worst row | ≥ 1.3 | 2.00 [2.00, 2.00] |" in text
    assert "prefix cache on against off, shared passages, worst row | ≥ 2 | 3.00 (one repeat) |" in text
    assert "(img/speedup.svg)" in text
    assert all(len(line) < 200 or line.startswith(("|", "`")) for line in text.splitlines())
    assert page.RECORD_COMMAND in text


def test_a_longer_run_of_a_group_replaces_the_shorter_one_whole(result: dict[str, Any]) -> None:
    """Of two runs each group is the one that was repeated more, with all its arms and ratios; the rest stays."""
    longer = copy.deepcopy(result)
    longer["rows"] = [row | {"repeats": 9, "tokens_per_s": 77.7} for row in longer["rows"] if row["workload"] == "low"]
    longer["ratios"] = {
        name: [item | {"ratio": 7.7, "repeats": 9} for item in items if item["workload"] == "low"]
        for name, items in longer["ratios"].items()
    }  # fmt: skip
    both = merge([result, longer])

    assert len(result["rows"]) == len(both["rows"])
    assert {"low"} == {row["workload"] for row in both["rows"] if row["repeats"] == 9}
    assert not [row for row in both["rows"] if row["workload"] == "low" and row["repeats"] != 9]
    for name, items in result["ratios"].items():
        assert len(items) == len(both["ratios"][name])
    text = page.page([result, longer], None, None, picture=True)
    assert 2 == text.count(result["command"])
    assert "77.7 ±" in text
    merged_again = merge([longer, result])
    assert sorted(map(json.dumps, both["rows"])) == sorted(map(json.dumps, merged_again["rows"]))


def test_the_page_says_how_to_make_what_is_missing() -> None:
    """Without results the page names the commands, and no figure."""
    text = page.page([], None, None, picture=False)

    assert page.ENGINE_COMMAND in text
    assert page.RECORD_COMMAND in text
    assert not re.search(r"\d\.\d", text)


def test_a_token_that_one_side_lost_is_seen() -> None:
    """guidellm's totals are put beside the server's; one token less, or a failed request, is not equal."""
    value = {"total_sum": 96.0, "mean": 12.345, "median": 3.21}
    names = ("prompt_token_count", "output_token_count", "output_tokens_per_second", "time_to_first_token_ms",
             "inter_token_latency_ms")  # fmt: skip
    totals = {"successful": 3, "errored": 0, "incomplete": 0, "total": 3}
    report = {
        "metadata": {"guidellm_version": "0.8.1"},
        "benchmarks": [{"metrics": {name: {"successful": value} for name in names} | {"request_totals": totals}}],
    }  # fmt: skip
    server = {"requests": 3, "prompt_tokens": 96, "output_tokens": 96}
    row = {"endpoint": "/v1/completions"} | load.compare(report, server)

    assert row["equal"]
    assert not load.compare(report, server | {"output_tokens": 95})["equal"]
    result = {"streams": 4, "rows": [row], "command": "c", "dtype": "float32", "target": "t"} | environment()
    text = page.page([], None, result, picture=False)
    assert "| `/v1/completions` | 3 / 3 | 0 | 96 / 96 | 96 / 96 | yes | 12.3 | 3 | 3.2 |" in text
    totals |= {"errored": 1, "total": 4}
    assert not load.compare(report, server)["equal"]


def test_the_command_names_no_place_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders given for data and interpreters are left out of what is kept."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    said = command("bench.engine", ["--json", "out.json", "--data", "/home/me/x", "--vllm-python", "/opt/v/bin/python"])

    assert "python -m bench.engine --json out.json --data FOLDER --vllm-python PYTHON" == said
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert "OMP_WAIT_POLICY=PASSIVE python -m bench.engine" == command("bench.engine", [])


def test_make_runs_what_the_page_names() -> None:
    """`make bench`, `make bench-record` and `make bench-load` run the very commands."""
    makefile = (ROOT / "Makefile").read_text()

    for line in (page.ENGINE_COMMAND, page.RECORD_COMMAND, page.PLOT_COMMAND, page.LOAD_COMMAND):
        assert re.search(rf"^\t\$\(BIN\)/{re.escape(line)}$", makefile, re.MULTILINE)
