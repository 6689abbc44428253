"""The benchmarks for a GPU, as far as they run without one: wiring, judgement, and what they may import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import kernels as bench_kernels
from bench import plot_kernels
from bench.gpu import Options, measure, ratios, table
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
    effects = result["effects"]["8b-0.6"]
    assert effects["swaps"]["swaps"] == 4
    assert effects["logging"]["records"] > 0
    assert {"step_ms", "host_ms"} <= effects["host"].keys()
    assert {"machine", "versions", "phases"} <= result.keys()
    assert len(table(result).splitlines()) == 3
    json.dumps(result)


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
        bench_kernels.judge(rows[1], rows)
        assert rows[1]["gate"]["passed"] is expected


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
    """They and all they import need torch, triton, transformers, peft, safetensors, numpy and the standard library."""
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
