"""Run a program of fixed buffers: on CUDA as a captured graph, elsewhere as it stands.

Also what else differs between the two: events that time it, and memory the device copies from and to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

_WARM_UPS = 2  # runs before a capture: libraries allocate and choose algorithms in their first


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: libraries keep a workspace for each stream they have seen."""
    return torch.cuda.Stream(device)


class Captured:
    """A callable that does what `run` does, without the host's part of it where that can be left out.

    Graphs of one `pool` share their memory: only one of them may run at a time.
    """

    def __init__(self, run: Callable[[], None], device: torch.device, pool: object = None) -> None:
        self._run = run
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            return
        side = _side_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side), torch.inference_mode():
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # The thread that merges draft versions may use the device meanwhile.
        with (
            torch.inference_mode(),
            torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local"),
        ):
            run()

    def __call__(self) -> None:
        """Begin a run."""
        if self._graph is not None:
            self._graph.replay()
        else:
            with torch.inference_mode():
                self._run()


class Mark:
    """A moment in the device's work."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._at = 0.0

    def set(self) -> None:
        """Mark the end of what was begun so far."""
        if self._event is not None:
            self._event.record()
        else:
            self._at = time.perf_counter()

    def wait(self) -> None:
        """Wait until the device is there."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """How long the device took from an earlier mark to this one; both must be over."""
        if self._event is not None and earlier._event is not None:
            return float(earlier._event.elapsed_time(self._event)) / 1e3
        return self._at - earlier._at


class Outbox:
    """Host memory the device reads a step's input from, and device memory it ends in.

    One of several takes turns with the others, so that the next input is written while the last is read.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device, turns: int = 2) -> None:
        pinned = device.type == "cuda"
        self._host = [torch.zeros(shape, dtype=torch.int32, pin_memory=pinned) for _ in range(turns)]
        self._arrays = [item.numpy() for item in self._host]
        self._turn = 0

    def next(self) -> np.ndarray:
        """Return the array to write the next input into.  Shapes: as given."""
        self._turn = (self._turn + 1) % len(self._host)
        return self._arrays[self._turn]

    def send(self, to: torch.Tensor) -> None:
        """Copy what was written to the device, in the order of its work."""
        to.copy_(self._host[self._turn][: len(to), : to.shape[1]], non_blocking=True)


class Inbox:
    """Host memory that a step's output is copied into, on a stream of its own, while the next step computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._spare: dict[tuple[int, ...], list[_Staging]] = {}

    def fetch(self, output: torch.Tensor) -> Fetch:
        """Begin to copy an output, which the device's next step may overwrite; nobody waits for the copy."""
        spare = self._spare.setdefault(tuple(output.shape), [])
        place = spare.pop() if spare else _Staging.like(output)
        done = Mark(self._device)
        place.device.copy_(output)
        if self._stream is None:
            place.host.copy_(place.device)
            return Fetch(place, done, spare)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            place.host.copy_(place.device, non_blocking=True)
            done.set()
        return Fetch(place, done, spare)


@dataclass(frozen=True, slots=True)
class _Staging:
    device: torch.Tensor
    host: torch.Tensor

    @classmethod
    def like(cls, output: torch.Tensor) -> _Staging:
        return cls(torch.empty_like(output), torch.empty(output.shape, dtype=output.dtype, pin_memory=output.is_cuda))


class Fetch:
    """A copy under way."""

    def __init__(self, place: _Staging, done: Mark, spare: list[_Staging]) -> None:
        self._place = place
        self._done = done
        self._spare = spare

    def wait(self) -> np.ndarray:
        """Return what arrived, and give the memory back for the next one."""
        self._done.wait()
        array = self._place.host.numpy().copy()
        self._spare.append(self._place)
        return array
