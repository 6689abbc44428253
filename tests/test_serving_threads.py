"""The engine's threads beside a training on the same machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapter.cores import taking
from serving.engine.threads import Threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "threads", "left"), [(2, 1, 1), (3, 1, 2), (2, 4, 1), (16, 1, 2), (1, 1, 1)])
def test_a_training_gets_its_cores_and_gives_them_back(tmp_path: Path, cores: int, threads: int, left: int) -> None:
    """The engine keeps at least one thread, never takes more than it was given, and looks twice a second."""
    now = 0.0
    engine = Threads(tmp_path, cores=cores, clock=lambda: now)
    engine.follow()
    assert torch.get_num_threads() == 2
    with taking(tmp_path, threads):
        engine.follow()
        assert torch.get_num_threads() == 2  # too soon to look again
        now = 1.0
        engine.follow()
        assert torch.get_num_threads() == left
    now = 2.0
    engine.follow()
    assert torch.get_num_threads() == 2
