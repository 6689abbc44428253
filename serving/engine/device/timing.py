"""Time what a round costs on a device, as it will run: the captured programs themselves, by the device's clock."""

from __future__ import annotations

import numpy as np
import torch

from serving.engine.control.measuring import ROUND, Timers, timer
from serving.engine.device.graphs import Captured, Mark
from serving.engine.device.models import DeviceModels
from serving.engine.device.program import CATCH_UP, Known, RoundProgram
from serving.engine.device.programs import buckets
from serving.engine.device.wire import FRESH, LENGTH, SLOT, TABLE
from serving.engine.runner import ModelRunner

_RUNS = 3


class DeviceTimer:
    """Runs rounds for nobody: every row is a padding row, with as much context as asked for.

    They write no cache and read whatever lies in it.
    """

    def __init__(
        self, models: DeviceModels, *, most_requests: int, width: int, block_tokens: int, num_blocks: int, vocab: int
    ) -> None:
        self._models = models
        self._most = most_requests
        self._shape = {"width": width, "block_tokens": block_tokens, "vocab": vocab}
        self._num_blocks = num_blocks
        self._known = Known.empty(most_requests, models.device)
        self._made: dict[tuple[str, int, int], tuple[RoundProgram, Captured]] = {}
        self._pool = torch.cuda.graph_pool_handle() if models.device.type == "cuda" else None

    def target(self, rows: int, context: int) -> float:
        """Seconds of verifying about so many rows, shared out to requests of `ROUND`, judging included."""
        batch = max(1, min(-(-rows // ROUND), self._most))
        batch = next(size for size in buckets(self._most) if size >= batch)  # as a round of so many is padded
        return self._time("verify", batch, max(0, -(-rows // batch) - 1), context)

    def draft(self, rows: int, context: int) -> float:
        """Seconds of one draft step of so many requests: what a second drafted token costs beyond the first."""
        batch = next(size for size in buckets(self._most) if size >= min(rows, self._most))
        one, two = (self._time("draft", batch, gamma, context) for gamma in (1, 2))
        return max(two - one, 0.1 * one)

    def timers(self, draft: ModelRunner | None) -> Timers:
        """Return them as the cost table asks for them."""
        if draft is None:
            return Timers(self.target)
        eager = timer(draft, 1, 1)

        def read(rows: int, context: int) -> float:
            """What reading so many tokens takes beyond one, on top of a draft step: both without a graph."""
            return self.draft(1, context) + max(0.0, eager(rows, context) - eager(1, context))

        return Timers(self.target, None, self.draft, read)

    def _time(self, half: str, batch: int, gamma: int, context: int) -> float:
        """Seconds of one half of a round."""
        key = (half, batch, gamma)
        if key not in self._made:
            models = self._models
            made = RoundProgram(
                models.target, models.draft, self._known, batch=batch, gamma=gamma, top_k=0, maximal=False,
                **self._shape,
            )  # fmt: skip
            self._fill(made, 0)
            self._made[key] = (made, Captured(getattr(made, half), models.device, self._pool))
        made, program = self._made[key]
        self._fill(made, context)
        return self._seconds(program)

    def _fill(self, made: RoundProgram, context: int) -> None:
        packed = np.zeros(made.input.shape, np.int32)
        packed[:, FRESH], packed[:, SLOT] = 1, self._most
        packed[:, LENGTH] = max(CATCH_UP, min(context, self._shape["width"] * self._shape["block_tokens"]))
        blocks = np.arange(packed[:, TABLE:].size).reshape(len(packed), -1)
        packed[:, TABLE:] = blocks % self._num_blocks if context else 0
        made.input.copy_(torch.from_numpy(packed))

    def _seconds(self, program: Captured) -> float:
        program()
        best = float("inf")
        for _ in range(_RUNS):
            begin, end = Mark(self._models.device), Mark(self._models.device)
            begin.set()
            program()
            end.set()
            end.wait()
            best = min(best, end.seconds_since(begin))
        return max(best, 1e-9)
