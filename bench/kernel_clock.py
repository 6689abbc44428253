"""Times of kernels on a CUDA device, and what the device can do at best.

Knows nothing of any kernel.  Used by `bench.kernels`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from bench.subject import Subject

_CACHE_BYTES = 256 << 20  # inputs of consecutive runs together: several times the second-level cache
_MOST_COPIES = 24
_RUNS = 24  # in one captured graph
_REPLAYS = 5


class Clock:
    """Times callables on the device, and knows what the device can do at best."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        source = torch.empty(1 << 29, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.numel() / self._seconds(lambda _: target.copy_(source), 1)
        a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
        self.flops = 2 * 8192**3 / self._seconds(lambda _: torch.mm(a, b), 1)
        one = torch.zeros(1, device=device)
        self.launch_s = self._seconds(lambda _: one.add_(1), 1)

    def ceilings(self) -> dict[str, float]:
        """What floors are made of."""
        return {
            "copy_tb_per_s": round(self.bandwidth / 1e12, 3), "matmul_tflop_per_s": round(self.flops / 1e12, 1),
            "launch_us": round(self.launch_s * 1e6, 3),
        }  # fmt: skip

    def floor_s(self, subject: Subject) -> float:
        """The least time the device could need."""
        return max(
            subject.bytes / self.bandwidth, subject.flops / self.flops, subject.launches * self.launch_s
        )  # fmt: skip

    def seconds(self, run: Callable[[int], object], inputs_bytes: int) -> float:
        """Median seconds of one run; `run` gets the number of the copy of its inputs to work on."""
        return self._seconds(run, copies_for(inputs_bytes))

    def _seconds(self, run: Callable[[int], object], copies: int) -> float:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))  # which may still be making the inputs
        with torch.cuda.stream(side):
            for number in range(min(3, copies)):
                run(number)
        side.synchronize()
        times = []
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for number in range(_RUNS):
                    run(number % copies)
            begin_all: Callable[[], None] = graph.replay
        except RuntimeError:  # a peer that asks the host something cannot be captured
            torch.cuda.synchronize()

            def begin_all() -> None:
                for number in range(_RUNS):
                    run(number % copies)

        for _ in range(_REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            begin_all()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / _RUNS)
        return statistics.median(times)


def copies_for(inputs_bytes: int) -> int:
    """How many copies of the inputs take turns."""
    return max(1, min(_MOST_COPIES, -(-_CACHE_BYTES // max(1, inputs_bytes))))
