"""Who computes on which cores: what a training says, who hears it, and what a killed one leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adapter.cores import CORES_FILE, taken, taking

_HOLDER = """
import sys
from pathlib import Path
from adapter.cores import taking
with taking(Path(sys.argv[1]), 3):
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_what_a_training_takes_is_heard_while_it_runs(tmp_path: Path) -> None:
    """Nothing before, its threads while it lasts, nothing afterwards; the folder need not be there."""
    folder = tmp_path / "run"
    assert taken(folder) == 0
    with taking(folder, 2):
        assert taken(folder) == 2
        with taking(folder, 5):  # a second one waits for nobody, and changes nothing
            assert taken(folder) == 2
        assert taken(folder) == 2
    assert taken(folder) == 0


def test_a_killed_training_takes_nothing(tmp_path: Path) -> None:
    """SIGKILL leaves the file and no lock, so its cores are free at once."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "holding\n"
    assert taken(tmp_path) == 3
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / CORES_FILE).exists()
    assert taken(tmp_path) == 0


def test_a_file_that_says_nonsense_is_one_core(tmp_path: Path) -> None:
    """A number half written means that somebody computes."""
    with taking(tmp_path, 2):
        (tmp_path / CORES_FILE).write_text("")
        assert taken(tmp_path) == 1


@pytest.mark.parametrize("nice", [0, 7])
def test_stepping_aside_counts_between_sessions(nice: int) -> None:
    """The process is nicer, and so is its session where the kernel weighs sessions."""
    code = (
        "import os; from pathlib import Path; from adapter.cores import step_aside; "
        f"before = os.nice(0); step_aside({nice}); at = Path('/proc/self/autogroup'); "
        "print(before, os.nice(0), at.read_text().split()[-1] if at.exists() else 'none')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, start_new_session=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    before, after, session = done.stdout.split()
    assert int(after) == min(19, int(before) + nice)
    on = Path("/proc/sys/kernel/sched_autogroup_enabled")
    if on.exists() and on.read_text().strip() == "1" and os.geteuid() == 0:
        assert session == after
