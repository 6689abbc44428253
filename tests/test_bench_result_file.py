"""The file of a result of the GPU benchmarks: refused early, whole at any time, honest at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from bench import result_file

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("module", ["bench.kernels", "bench.gpu"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--json", "{tmp}/missing/x.json"], "the folder {tmp}/missing does not exist; make it first"),
        (["--json", "{tmp}"], "{tmp} is a folder; name a file in it"),
        (["--minutes", "soon"], "'soon' is no time; expected minutes, a number above 0"),
    ],
    ids=lambda item: item[0] if isinstance(item, list) else "",
)
def test_wrong_arguments_are_refused_before_anything_is_measured(
    module: str, arguments: list[str], said: str, tmp_path: Path
) -> None:
    """A sentence without a traceback, under the name by which the program is started; exit 2."""
    words = [word.format(tmp=tmp_path) for word in arguments]
    done = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 2
    assert said.format(tmp=tmp_path) in done.stderr
    assert f"usage: python -m {module}" in done.stderr
    assert "Traceback" not in done.stderr


def test_devices_are_those_the_engine_runs_on() -> None:
    """cpu, cuda and a numbered one; what torch alone knows is refused with what is valid."""
    assert ["cpu", "cuda", "cuda:1"] == [result_file.device_of(name) for name in ("cpu", "cuda", "cuda:1")]
    for wrong in ("foo", "mps", "cuda:", "cuda:-1", ""):
        with pytest.raises(ArgumentTypeError, match="expected cuda, cuda:N or cpu"):
            result_file.device_of(wrong)


def test_a_growing_result_is_marked_and_the_whole_one_is_not(tmp_path: Path) -> None:
    """While it grows the file says `unfinished`; at the end it does not, and nothing else lies beside it."""
    path = tmp_path / "x.json"
    path.write_text("{}")
    keep = result_file.keeper(path, "python -m x")
    keep({"rows": [1]})
    assert {"command": "python -m x", "rows": [1], "unfinished": True} == json.loads(path.read_text())
    assert 0 == result_file.finish(path, {"command": "python -m x", "rows": [1, 2]}, "table", [])
    assert {"command": "python -m x", "rows": [1, 2]} == json.loads(path.read_text())
    assert [path] == list(tmp_path.iterdir())


def test_what_cannot_be_written_as_json_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A result is written beside the old one and takes its place whole."""
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        result_file.write(path, {"rows": [object()]})
    assert "old" == path.read_text()


@pytest.mark.parametrize(
    ("rows", "failures", "status", "last"),
    [([1], [], 0, ""), ([1], ["k: no memory"], 1, "failed: k: no memory"), ([], [], 1, "failed: nothing was measured")],
)
def test_failures_are_the_exit_status_and_the_last_words(
    rows: list[int], failures: list[str], status: int, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a file the result is all of standard output; the table is on the other, and failures end it."""
    assert status == result_file.finish(None, {"rows": rows}, "the table", failures)
    said = capsys.readouterr()
    assert {"rows": rows} == json.loads(said.out)
    assert ["the table", *([last] if last else [])] == said.err.splitlines()


def test_compiling_needs_no_file() -> None:
    """`--compile-only` alone prints what it found."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels", "--compile-only"], cwd=ROOT, capture_output=True, text=True,
        check=False, env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert [] == result["left_out"]
    assert {"module", "case", "registers", "spilled_bytes", "shared_bytes"} <= result["rows"][0].keys()
    assert f"{len(result['rows'])} cases compiled" in done.stderr
