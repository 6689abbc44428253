"""Leave an off draft model out of the next steps: considering it takes half a millisecond, a part of a fast step.

The longer the same requests run without a change, the longer the next rest.  Used by `adaptive`.
"""

from __future__ import annotations

_SHORTEST, _LONGEST = 8, 64  # steps


class Rest:
    """Steps for which "off" stands."""

    def __init__(self) -> None:
        self._left = 0
        self._length = 0
        self._requests: list[str] = []

    def begin(self, requests: list[str]) -> None:
        """Let "off" stand for these requests; twice as long as the last time, if that was for the same ones."""
        again = self._length > 0 and self._requests == requests
        self._length = min(_LONGEST, 2 * self._length) if again else _SHORTEST
        self._left, self._requests = self._length, requests

    def take(self, requests: list[str]) -> bool:
        """Take one more step of the rest; False when it is over, or other requests run now."""
        self._left = max(0, self._left - 1)
        return self._left > 0 and self._requests == requests

    def end(self) -> None:
        """Consider the draft model in the next step, and begin with short rests again."""
        self._left = self._length = 0
        self._requests = []
