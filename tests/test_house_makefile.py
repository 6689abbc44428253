"""Targets for a GPU, as far as a machine without one can tell: they refuse clearly and lose nothing on the way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
FAKE = """#!{python}
import os, pathlib, sys
with open({log!r}, "a") as log:
    print(" ".join(sys.argv[1:3] + sys.argv[3:]).replace("\\n", " "), file=log)
if sys.argv[1] == "-c" and "get_device_name" in sys.argv[2]:
    print("some-gpu")
if sys.argv[1] == "-m":
    sys.exit({statuses!r}.get(sys.argv[2], 0))
"""


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make in the repository."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DRAFTSMITH_", "XDG_", "MAKE"))}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("target", ["test-gpu", "bench-gpu"])
def test_without_a_gpu_the_target_is_not_green(target: str) -> None:
    """Neither skipped tests nor interpreted ones may look like a device that was checked."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = make(
        "-o", "install", target, f"BIN={Path(sys.executable).parent}", f"BENCH_PYTHON={sys.executable}",
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{target} needs a CUDA device; PyTorch finds none here" in done.stdout
    assert "pytest" not in done.stdout


def test_kernels_are_not_interpreted_in_the_test_of_a_device() -> None:
    """`make test-gpu` wins over a TRITON_INTERPRET that is set; other targets leave it alone."""
    script = f"{sys.executable} -c 'import os; print(os.environ.get(\"TRITON_INTERPRET\"))' #"
    for target, expected in (("test-gpu", "0"), ("test", "1")):
        done = make("-s", "-o", "install", target, f"BIN={script}", TRITON_INTERPRET="1")
        assert done.stdout.splitlines()[0] == expected, done.stderr


def fake_python(folder: Path, statuses: dict[str, int]) -> tuple[Path, Path]:
    """An interpreter that notes what it is asked for; `statuses` by module."""
    log, path = folder / "log", folder / "python"
    path.write_text(FAKE.format(python=sys.executable, log=str(log), statuses=statuses))
    path.chmod(0o700)
    return path, log


@pytest.mark.parametrize(
    "statuses", [{}, {"bench.kernels": 1}, {"bench.gpu": 1}, {"bench.kernels": 2, "bench.gpu": 1}], ids=str
)
def test_a_failure_of_one_benchmark_leaves_the_other(tmp_path: Path, statuses: dict[str, int]) -> None:
    """Both are run whatever happens, the status tells, and what to do next is said; PyTorch is asked twice in all."""
    python, log = fake_python(tmp_path, statuses)
    done = make("bench-gpu", f"BENCH_PYTHON={python}", HOME=str(tmp_path))
    calls = log.read_text().splitlines()
    assert (done.returncode != 0) == bool(statuses)
    assert ["-m bench.kernels", "-m bench.gpu"] == [" ".join(call.split()[:2]) for call in calls if "-m" in call]
    assert 2 == len([call for call in calls if call.startswith("-c")])
    assert all("--json bench/results/some-gpu-" in call for call in calls if "-m" in call)
    assert "make docs" in done.stdout


@pytest.mark.parametrize("variable", ["DRAFTSMITH_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
def test_the_target_is_looked_for_where_the_service_keeps_it(tmp_path: Path, variable: str) -> None:
    """The cache folder is the one of the settings; without a model in it, that is said."""
    below = {"DRAFTSMITH_CACHE_DIR": "", "XDG_CACHE_HOME": "draftsmith", "HOME": ".cache/draftsmith"}[variable]
    python, log = fake_python(tmp_path, {})
    environment = {"HOME": str(tmp_path / "home")} | {variable: str(tmp_path / "place")}
    done = make("bench-gpu", f"BENCH_PYTHON={python}", **environment)
    assert "random weights alone" in done.stdout
    assert "--target" not in log.read_text()

    model = tmp_path / "place" / below / "models/smollm2-135m-instruct"
    model.mkdir(parents=True)
    done = make("bench-gpu", f"BENCH_PYTHON={python}", **environment)
    assert "random weights alone" not in done.stdout
    assert f"--target {model}" in log.read_text()
