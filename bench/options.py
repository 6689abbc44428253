"""What a run of the benchmark measures, how often, and for how long.  Used by `bench.engine` and its phases.

`bench.record` takes the pair's part alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter.contracts import SettingsError
from bench.library import ARMS as LIBRARY_ARMS
from bench.rows import ENGINE_ARMS
from bench.workloads import RAG, WORKLOADS

ARMS = (*ENGINE_ARMS, *LIBRARY_ARMS)
SAMPLED = "sampled"
SEED = 20261122
_WIDE = 8  # requests at once, from which on a window's tokens are no longer multiplied by the batch


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOptions:
    """Which pair is measured and where its files are kept; None leaves a setting to the environment."""

    target: str | None = None
    draft: str | None = None
    dtype: str = "float32"
    cache_dir: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(PairOptions):
    """What is measured, how often, and for how long."""

    widen: tuple[int, ...] = (1, 2)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    workloads: tuple[str, ...] = (*WORKLOADS, SAMPLED, RAG)
    arms: tuple[str, ...] = ARMS
    repeats: int = 4
    tokens: int = 32
    minutes: float = 45.0
    max_prompt_tokens: int = 1400
    seed: int = SEED
    data: Path | None = None
    vllm_python: str | None = None
    rivals_dtype: str = "bfloat16"  # of the library's arms and vLLM's: the faster one for them
    engine: dict[str, Any] = field(default_factory=dict)  # more settings of the section `engine`

    def tokens_of(self, batch: int) -> int:
        """Measured tokens a request and window: fewer where many requests are measured at once."""
        return self.tokens if batch <= _WIDE else max(2, self.tokens * _WIDE // batch)

    def check(self) -> None:
        """Refuse what does not exist.

        Raises:
            SettingsError: an arm or a workload is unknown, or a number is too small.
        """
        for name, given, valid in (
            ("arms", self.arms, ARMS), ("workloads", self.workloads, (*WORKLOADS, SAMPLED, RAG)),
        ):  # fmt: skip
            for item in given:
                if item not in valid:
                    raise SettingsError(f"--{name} {item}: there are {', '.join(valid)}")
        for name, numbers in (("widen", self.widen), ("batches", self.batches), ("repeats", (self.repeats,))):
            if not numbers or min(numbers) < 1:
                raise SettingsError(f"--{name} {','.join(map(str, numbers))}: expected whole numbers from 1")
        if self.tokens < 2:
            raise SettingsError(f"--tokens {self.tokens}: expected at least 2")
