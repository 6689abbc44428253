"""What the processor used since a moment, where the kernel tells: Intel's and AMD's RAPL counters.

They count whole packages, so everything else that ran meanwhile is in them.  Called by `distill.trainer`.
"""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/class/powercap")


class Energy:
    """The counters as they stood when this was made.  `root` is where the kernel shows them."""

    def __init__(self, root: Path = _ROOT) -> None:
        self._root = root
        self._began = self._read()

    def joules(self) -> float | None:
        """Return joules since then, all packages together; None where they cannot be read."""
        if not self._began:
            return None
        now = self._read()
        if now.keys() != self._began.keys():
            return None
        used = 0
        for name, (before, wraps_at) in self._began.items():
            used += (now[name][0] - before) % max(1, wraps_at)
        return round(used * 1e-6, 3)

    def _read(self) -> dict[str, tuple[int, int]]:
        found = {}
        for folder in sorted(self._root.glob("intel-rapl:?")):
            try:
                found[folder.name] = (
                    int((folder / "energy_uj").read_text()),
                    int((folder / "max_energy_range_uj").read_text()) + 1,
                )
            except (OSError, ValueError):
                return {}
        return found
