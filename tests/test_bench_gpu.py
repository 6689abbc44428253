"""The benchmarks for a GPU, as far as they run without one: wiring, judgement, and what they may import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu as bench_gpu
from bench import kernels as bench_kernels
from bench import plot_kernels, roofline
from bench.gpu import Options, measure, options_for
from bench.gpu_ratios import failures, ratios, table
from bench.kernel_gates import failures as kernel_failures
from bench.kernel_gates import judge
from bench.kernel_gates import table as gates_table
from bench.kernel_subjects import subjects
from bench.subject import Gate

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 300,
}  # fmt: skip
BARE = ("torch", "triton", "transformers", "peft", "safetensors", "numpy")
OURS = ("adapter", "bench", "kernels", "serving")


@pytest.fixture(scope="module")
def result() -> dict:
    """The whole end-to-end benchmark on the smallest random pair, on the CPU."""
    options = Options(
        device="cpu", large=TINY, small=TINY | {"num_hidden_layers": 1}, batches=(1, 3), acceptances=(0.6,), tokens=12,
        repeats=2, swaps=4, minutes=1.0,
    )  # fmt: skip
    return measure(options, lambda line: None)


def test_the_gpu_benchmark_runs_every_arm_and_says_where(result):
    """All arms at all batches, ratios, swaps, logging and the host's share, with machine and versions."""
    arms = {(row["batch"], row["arm"]) for row in result["rows"]}
    assert arms == {(b, a) for b in (1, 3) for a in ("none", "fixed-1", "fixed-3", "fixed-5", "adaptive")}
    assert all(row["tokens_per_s"] > 0 for row in result["rows"])
    effects = result["effects"]["tiny-0.6"]
    assert effects["swaps"]["swaps"] == 4
    assert effects["logging"]["records"] > 0
    assert {"step_ms", "host_ms"} <= effects["host"].keys()
    assert {"machine", "versions", "phases"} <= result.keys()
    assert len(table(result).splitlines()) == 3
    assert failures(result) == []
    assert effects["left_out"] == {}
    json.dumps(result)


def test_on_a_cpu_shapes_are_tiny_and_on_a_gpu_they_are_not():
    """`--device cpu` tries the program: everything it measures fits a second; a GPU gets an 8B model's shapes."""
    here, there = options_for(None, "cpu", 2.0), options_for(None, "cuda", 2.0)
    assert here.large is not None
    assert here.large["hidden_size"] * here.large["vocab_size"] < 1e6
    assert max(here.batches) * here.swaps < 100
    assert there == Options(minutes=2.0)


def test_when_the_minutes_are_over_nothing_more_is_begun():
    """The first target begins whatever the time; its other batches, its effects and other targets are listed."""
    kept = []
    options = Options(
        device="cpu", large=TINY, small=TINY | {"num_hidden_layers": 1}, batches=(1, 3), acceptances=(0.6, 0.8),
        tokens=4, repeats=2, swaps=4, minutes=1e-6,
    )  # fmt: skip
    found = measure(options, lambda line: None, lambda result: kept.append(json.loads(json.dumps(result))))
    effects = found["effects"]
    assert {(row["synthetic_acceptance"], row["batch"]) for row in found["rows"]} == {(0.6, 1)}
    assert effects["tiny-0.6"]["left_out"] == dict.fromkeys(("batch 3", "swaps", "logging", "host"), "time")
    late = effects["tiny-0.8"]["left_out"]
    assert late == {"the target": "time"}
    assert failures(found) == []
    assert "the target left out: time" in table(found)
    assert [list(item["effects"]) for item in kept] == [["tiny-0.6"], ["tiny-0.6", "tiny-0.8"]]


def test_a_target_that_fails_keeps_what_it_had_measured(monkeypatch):
    """Rows stay when what comes after them fails; the failure is one line, and the next target is measured."""
    options = Options(
        device="cpu", large=TINY, small=TINY | {"num_hidden_layers": 1}, batches=(1,), acceptances=(0.6, 0.8),
        tokens=4, repeats=1, swaps=4, minutes=1.0,
    )  # fmt: skip
    logging_cost = bench_gpu.logging_cost
    broken = iter((True, False))

    def failing(*arguments):
        if next(broken):
            raise RuntimeError("no more memory")
        return logging_cost(*arguments)

    monkeypatch.setattr(bench_gpu, "logging_cost", failing)
    found = measure(options, lambda line: None)
    assert failures(found) == ["tiny-0.6: RuntimeError: no more memory"]
    assert {row["synthetic_acceptance"] for row in found["rows"]} == {0.6, 0.8}
    assert "swaps" in found["effects"]["tiny-0.6"]
    assert "host" in found["effects"]["tiny-0.8"]


def test_synthetic_acceptance_is_what_was_asked_for(result):
    """Drafted tokens are accepted by lot: over all arms 0.6 of those examined, whatever random models say.

    n is the number of tokens the arms examined, about 150; bound: five standard deviations of so many lots.
    """
    rows = [row for row in result["rows"] if row["arm"] == "fixed-1"]
    tokens = sum(row["tokens"] for row in rows)
    rate = sum(row["acceptance"] * row["tokens"] for row in rows) / tokens
    assert abs(rate - 0.6) < 5 * (0.24 / (tokens / 1.6)) ** 0.5


def test_ratios_compare_repeat_by_repeat():
    """The adaptive arm is compared with the fastest other one by medians, and the spread is told."""

    def row(arm: str, speeds: list[float]) -> dict:
        return {
            "target": "t", "synthetic_acceptance": None, "batch": 1, "arm": arm, "tokens_per_s": sorted(speeds)[1],
            "tokens_per_s_repeats": speeds,
        }  # fmt: skip

    found = ratios([row("none", [10, 10, 10]), row("fixed-3", [20, 20, 25]), row("adaptive", [20, 22, 20])])[0]
    assert found["best"] == "fixed-3"
    assert found["adaptive_vs_best"] == {"median": 1.0, "low": 0.8, "high": 1.1}
    assert found["adaptive_vs_none"]["median"] == 2.0


@pytest.mark.parametrize("group", ["cuts", "attention", "layers", "sampler", "merge"])
def test_every_group_of_kernels_is_wired_to_its_reference(group):
    """The first subject of each group builds its inputs and runs, with its reference, where the door leads here."""
    subject = next(item for item in subjects((group,), torch.device("cpu")) if item.bytes < 5e8)
    subject.build(1)
    subject.run(0)
    if subject.reference is not None:
        subject.reference(0)
    assert subject.bytes > 0
    assert json.dumps(subject.shape)


def test_the_picture_shows_floors_and_what_was_measured(tmp_path):
    """Every kernel is on it, the same figures give the same bytes, and measured times change it."""
    plot_kernels.draw(None, tmp_path / "a.svg")
    plot_kernels.draw(None, tmp_path / "b.svg")
    found = plot_kernels.measured({"rows": [{"kernel": "cuts", "bytes": 10**6, "ms": 0.01}]})
    assert found == {"cuts": [(1.0, 10.0)]}
    plot_kernels.draw(found, tmp_path / "c.svg")
    first, again, other = ((tmp_path / f"{name}.svg").read_bytes() for name in "abc")
    assert first == again != other
    assert plot_kernels.floors().keys() == plot_kernels.STYLES.keys()


def test_gates_are_judged_by_their_figures():
    """A bound from below, one from above, one against another row, and one against a peer that is not there."""
    rows = [
        {"kernel": "k", "shape": {"q": 1}, "ms": 2.0, "fraction_of_floor": 0.8, "peers": {}, "gate": None},
        {"kernel": "k", "shape": {"q": 5}, "ms": 2.4, "fraction_of_floor": 0.5, "peers": {"liger": "ImportError"}},
    ]
    cases = [
        (Gate("a", "fraction_of_floor", 0.7, True), False), (Gate("b", "ms", 3.0, False), True),
        (Gate("c", "vs_row", 1.1, False, {"q": 1}), False), (Gate("d", "vs_peer", 0.6, False, "liger"), None),
    ]  # fmt: skip
    for gate, expected in cases:
        from dataclasses import asdict

        rows[1]["gate"] = asdict(gate)
        judge(rows[1], rows)
        assert rows[1]["gate"]["passed"] is expected


def group_result(group: str, copy: float, **more: object) -> dict:
    """What the process of a group writes."""
    gate = {"name": "g", "figure": "ms", "bound": 1.0, "at_least": False, "against": None, "value": 2.0}
    row = {"kernel": group, "shape": {"q": 1}, "gate": gate | {"passed": False}}
    late = {"kernel": group, "shape": {"q": 2}, "reason": "time", "failed": False}
    return {
        "ceilings": {group: {"copy_tb_per_s": copy}}, "rows": [row], "left_out": [late],
        "machine": {"gpu": "x"}, "versions": {}, "commit": "c",
    } | more  # fmt: skip


def test_groups_keep_their_own_ceilings_and_a_lost_one_is_a_failure():
    """Results of processes put together: a group that ended early is named, what it had is kept; late is no failure."""
    runs = {
        "sampler": (0, group_result("sampler", 4.0)), "cuts": (-11, group_result("cuts", 4.2, unfinished=True)),
        "merge": (-6, None),
    }  # fmt: skip
    shares, kept = [], []

    def run(group, minutes):
        shares.append(minutes)
        return runs[group]

    found = bench_kernels.merged(tuple(runs), 6.0, lambda result: kept.append(len(result["rows"])), run)
    assert {name: item["copy_tb_per_s"] for name, item in found["ceilings"].items()} == {"sampler": 4.0, "cuts": 4.2}
    assert [row["kernel"] for row in found["rows"]] == ["sampler", "cuts"]
    assert kept == [1, 2, 2]
    assert [line.split(" before")[0] for line in kernel_failures(found)] == [
        "group cuts: its process ended with -11", "group merge: its process ended with -6",
    ]  # fmt: skip
    assert found["machine"] == {"gpu": "x"}
    assert "unfinished" not in found
    assert shares == pytest.approx([2.0, 3.0, 6.0], rel=1e-3)  # what is left, divided by who is left
    shown = gates_table(found)
    assert "no time was left for 2:\n  sampler q 2" in shown


def test_the_page_says_what_shapes_are_and_where_floors_come_from():
    """Drafts, heads and head sizes are in the rows; measured ceilings are a range over the groups."""
    plain = roofline.page([], None)
    assert "| verify sampler | vocab 49152, batch 1, gamma 4, coupling gumbel, top_k 32 |" in plain
    assert "queries 5, heads 32, kv_heads 8, head_size 128 |" in plain
    assert "copies at 4.3 TB/s (90% of the data sheet's 4.8)" in plain
    assert "products at 790 TFLOP/s (80% of its 989, dense bfloat16)" in plain
    row = {
        "kernel": "cuts", "shape": {"vocab": 9}, "ms": 1.0, "floor_ms": 0.5, "fraction_of_floor": 0.5,
        "reference_ms": None, "peers": {}, "gate": None,
    }  # fmt: skip
    ceilings = {
        name: {"copy_tb_per_s": copy, "matmul_tflop_per_s": 700.0, "launch_us": 1.5}
        for name, copy in (("sampler", 4.2), ("cuts", 4.0))
    }
    late = {"kernel": "cuts", "shape": {"vocab": 10}, "reason": "time", "failed": False}
    measured = roofline.page(
        [
            {
                "command": "x",
                "commit": "c",
                "machine": {"gpu": "G"},
                "ceilings": ceilings,
                "rows": [row],
                "left_out": [late],
            }
        ],
        None,
    )
    assert "copies 4.0–4.2 TB/s, products 700.0 TFLOP/s, a launch in a graph 1.5 µs." in measured
    assert "- cuts vocab 10: time" in measured


@pytest.mark.parametrize("group", ["sampler", "attention"])
def test_a_gate_against_another_row_names_one_that_is_measured(group):
    """The row a gate compares with has exactly the shape that the gate names, so it is found."""
    found = list(subjects((group,), torch.device("meta")))
    shapes = [subject.shape for subject in found]
    against = [item.gate.against for item in found if item.gate and isinstance(item.gate.against, dict)]
    assert against
    assert all(shape in shapes for shape in against)


@pytest.mark.parametrize("module", ["bench.kernels", "bench.gpu"])
def test_without_a_gpu_the_benchmark_says_so_and_leaves(module, tmp_path):
    """A clear sentence, exit 2, and no file."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    out = tmp_path / "x.json"
    done = subprocess.run(
        [sys.executable, "-m", module, "--json", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stderr
    assert not out.exists()


def test_the_gpu_benchmarks_import_little():
    """They and all they import need what CONTRIBUTING.md lists, and the standard library."""
    listed = re.search(r"need nothing but (.+?) \(", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    assert listed is not None
    assert set(BARE) == set(re.split(r",\s+|\s+and\s+", listed[1]))
    code = f"""
import sys
before = set(sys.modules)
import torch, transformers, peft, safetensors, numpy, triton
theirs = set(sys.modules)
import bench.gpu, bench.kernels, kernels.gpu.catalog
from importlib import import_module
for name in kernels.gpu.catalog.MODULES:
    import_module("kernels.gpu." + name)
ours = {{name.partition(".")[0] for name in set(sys.modules) - theirs}}
others = sorted(ours - set(sys.stdlib_module_names) - set({BARE + OURS!r}))
print(",".join(name for name in others if not name.startswith("_")))
"""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "DRAFTSMITH_BARE": "1"}
    blocked = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("structlog", "msgspec", "sqlalchemy", "pydantic", "pydantic_settings", "redis",
                                      "celery", "fastapi", "alembic", "llguidance", "zmq", "gguf", "apprise"):
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Missing())
{code}"""
    done = subprocess.run(
        [sys.executable, "-c", blocked], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() in ("", "scipy"), "something else is imported"


def test_every_kernel_compiles_for_hopper_without_spilling_much(tmp_path):
    """A case of every module down to machine code for compute capability 9.0: shared memory and spills are bounded."""
    code = """
import json, sys
from kernels.gpu import aot, catalog
seen, rows = set(), []
for module, case in catalog.cases():
    if module not in seen:
        seen.add(module)
        found = aot.compile_case(case)
        rows.append([module, found.registers, found.spilled_bytes, found.shared_bytes])
print(json.dumps(rows))
"""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert len(rows) == 8
    for module, registers, spilled, shared in rows:
        assert 0 < registers <= 255, module
        assert spilled <= 64, module
        assert shared <= 200 * 1024, module
