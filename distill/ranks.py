"""The processes that share one training: which of them this is, and how they agree.

Rank 0 collects, decides and publishes; the others help it with what it hands out.  A process alone is a group of
its own, where every call returns what it was given, so that nobody asks how many there are.  Built on
torch.distributed over gloo, as torchrun sets it up, because training stays on the CPU.  Knows nothing about models
or jobs.  Called by `distill.trainer`, `distill.tuning`, `distill.sharding` and `distill.assignment`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from adapter.contracts import SettingsError

T = TypeVar("T")

_PATIENCE = timedelta(days=1)  # whoever waits for rank 0 sets no limit of its own; the task does
_LOOPBACK = "lo"
_CPU = torch.device("cpu")


@dataclass(slots=True)
class Ranks:
    """A group of `size` processes, of which this one is `rank`."""

    rank: int
    size: int
    _handed_out: bool = False

    @staticmethod
    def alone() -> Ranks:
        """Return the group of one process; nothing is set up."""
        return Ranks(0, 1)

    @staticmethod
    def join(size: int) -> Ranks:
        """Meet the other processes that torchrun started, over loopback.

        Raises:
            SettingsError: torchrun did not start this process, or started another number of them.
        """
        if not launched() or int(os.environ["WORLD_SIZE"]) != size:
            found = f"one of {os.environ['WORLD_SIZE']}" if launched() else "on its own"
            raise SettingsError(
                f"distill.processes is {size}, but this trainer was started {found}; let the worker start it, or use "
                f"`torchrun --standalone --nproc-per-node {size} -m distill.trainer`"
            )
        if _LOOPBACK in [name for _, name in socket.if_nameindex()]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
        dist.init_process_group("gloo", timeout=_PATIENCE)
        return Ranks(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """Return what rank 0 gave, whatever the others gave; it is pickled on its way."""
        if self.size == 1:
            return value
        box = [value if self.first else None]
        dist.broadcast_object_list(box, src=0, device=_CPU)
        return box[0]  # type: ignore[return-value]

    def decide(self, value: float) -> float:
        """Return rank 0's number; what depends on a clock is decided by it."""
        if self.size == 1:
            return value
        number = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(number, src=0)
        return float(number)

    def total(self, *values: float) -> list[float]:
        """Return each number summed over the group, to the last bit the same everywhere."""
        if self.size == 1:
            return list(values)
        mine = torch.tensor(values, dtype=torch.float64)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        summed: list[float] = torch.stack(parts).sum(0).tolist()
        return summed

    def gather(self, value: T) -> list[T]:
        """Return what every rank gave, in the order of ranks; pickled on its way."""
        if self.size == 1:
            return [value]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, value)
        return parts

    def deal(self, sizes: Sequence[int]) -> list[list[int]]:
        """Divide items by size, largest first, each to the rank that has least; some may get none."""
        hands: list[list[int]] = [[] for _ in range(self.size)]
        loads = [0] * self.size
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            least = loads.index(min(loads))
            hands[least].append(i)
            loads[least] += sizes[i]
        return hands

    def hand_out(self, work: T) -> T:
        """Rank 0: give the others what they `receive`, and return it."""
        self._handed_out = True
        return self.share(work)

    def receive(self) -> Any:
        """Wait for what rank 0 hands out; None when there is nothing to do."""
        return self.share(None)

    def dismiss(self) -> None:
        """Rank 0: let go those who still wait for something to do."""
        if not self._handed_out:
            self.hand_out(None)

    def leave(self) -> None:
        """Take this process out of the group."""
        if self.size > 1:
            dist.destroy_process_group()


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ
