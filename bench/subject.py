"""One kernel at one shape, as `bench.kernels` measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Gate:
    """What a figure of a row must reach.

    `figure` is a field of the row, "vs_row" (time relative to the same kernel's at shape `against`) or "vs_peer"
    (relative to the peer `against`).
    """

    name: str
    figure: str
    bound: float
    at_least: bool
    against: Any = None


@dataclass(slots=True)
class Subject:
    """One kernel at one shape; `make` builds a copy of its inputs, `call` works on one."""

    kernel: str
    shape: dict[str, Any]
    bytes: int
    make: Callable[[int], Any]
    call: Callable[[Any], object]
    inputs_bytes: int
    flops: int = 0
    launches: int = 1
    against: Callable[[Any], object] | None = None
    rivals: dict[str, Callable[[Any], object]] = field(default_factory=dict)
    gate: Gate | None = None
    inputs: list[Any] = field(default_factory=list)

    def build(self, copies: int) -> None:
        """Make the inputs."""
        self.inputs = [self.make(number) for number in range(copies)]

    def free(self) -> None:
        """Let go of the inputs."""
        self.inputs = []

    def run(self, number: int) -> object:
        """Run the kernel on one copy."""
        return self.call(self.inputs[number % len(self.inputs)])

    @property
    def reference(self) -> Callable[[int], object] | None:
        """The plain-torch truth on one copy; None where it is left out."""
        against = self.against
        return None if against is None else lambda number: against(self.inputs[number % len(self.inputs)])

    @property
    def peers(self) -> dict[str, Callable[[int], object]]:
        """Others on one copy."""
        return {
            name: (lambda number, rival=rival: rival(self.inputs[number % len(self.inputs)]))  # type: ignore[misc]
            for name, rival in self.rivals.items()
        }
