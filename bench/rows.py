"""Turn measured windows into the rows of a result file, and rows into the ratios that are promised.

Arms of one group run one after the other in every repeat, so ratios are taken repeat by repeat and their
median is given with the smallest and the largest.  Pure.  Called by `bench.engine`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from adapter.contracts import Counts
from bench.driver import Window

ENGINE_ARMS = ("none", "fixed-1", "fixed-3", "fixed-5", "adaptive")
FIXED = ("fixed-1", "fixed-3", "fixed-5")
VLLM = ("vllm", "vllm-ngram")  # plain, and with its own speculation
_CLOSE = 0.85  # of the best arm's speed, that an arm needs to count as a rival for the best
RATIOS = (
    "adaptive_vs_best", "adaptive_vs_none", "none_vs_hf_generate", "fixed3_vs_hf_assisted", "prefix_cache",
    "adaptive_vs_vllm", "none_vs_vllm",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What one row is about; `prefix_cache` matters to the set with shared prefixes alone."""

    target: str
    widen: int
    batch: int
    workload: str
    arm: str
    temperature: float = 0.0
    coupling: str = "gumbel"
    prefix_cache: bool = True


@dataclass(slots=True)
class Row:
    """All windows of one key, a repeat each."""

    key: Key
    windows: list[Window] = field(default_factory=list)

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each repeat."""
        return [window.tokens_per_s for window in self.windows]

    def report(self) -> dict[str, Any]:
        """Return the row as plain values; times in milliseconds."""
        counts = sum((window.counts for window in self.windows), Counts())
        rounds = sum(window.rounds for window in self.windows)
        tokens = sum(window.tokens for window in self.windows)
        speeds = self.speeds
        median = statistics.median(speeds)
        tpot_s = [value for window in self.windows for value in window.tpot_s]
        ttft_s = [value for window in self.windows for value in window.ttft_s]
        return asdict(self.key) | {
            "tokens_per_s": round(median, 3), "tpot_ms_p50": _ms(tpot_s, 50), "tpot_ms_p99": _ms(tpot_s, 99),
            "ttft_ms_p50": _ms(ttft_s, 50), "acceptance": _rounded(counts.acceptance),
            "tokens_per_round": _rounded(tokens / rounds if rounds else None),
            "gamma_mean": _rounded(counts.num_drafted / rounds if rounds and self.key.arm in ENGINE_ARMS else None),
            "repeat_spread": round((max(speeds) - min(speeds)) / median, 4), "repeats": len(speeds),
            "tokens": tokens, "tokens_per_s_repeats": [round(speed, 3) for speed in speeds],
        }  # fmt: skip


def contenders(rows: list[Row]) -> set[Key]:
    """Return the rows of one group that promises still depend on.

    Those are no speculation, the adaptive arm, vLLM's and any fixed length that may be the best.  Where a group
    has neither of the first two, all of it goes on.
    """
    rivals = [row for row in rows if row.key.arm in ("none", *FIXED)]
    kept = {row.key for row in rows if row.key.arm in ("none", "adaptive")}
    if not kept or not rivals:
        return {row.key for row in rows}
    kept |= {row.key for row in rows if row.key.arm in VLLM}
    for row in rivals:
        alike = [other for other in rivals if _like(other.key, arm=row.key.arm) == row.key]
        best = max(statistics.median(other.speeds) for other in alike)
        if statistics.median(row.speeds) >= _CLOSE * best:
            kept.add(row.key)
    return kept


def ratios(rows: Iterable[Row]) -> dict[str, list[dict[str, Any]]]:
    """Return what the rows promise, as ratios of speeds; a ratio whose rows are missing is left out.

    `adaptive_vs_best` is against the fastest of no speculation and the fixed lengths, and `adaptive_vs_vllm`
    against the faster of vLLM's arms; see `_against_best`.
    """
    table = {row.key: row for row in rows if row.windows}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in RATIOS}
    for key, row in table.items():
        if key.workload == "rag":
            off = table.get(_like(key, prefix_cache=False))
            if key.prefix_cache and off is not None:
                found["prefix_cache"].append(_ratio(row, off))
            continue
        if key.arm == "adaptive":
            for name, rivals in (("adaptive_vs_best", ("none", *FIXED)), ("adaptive_vs_vllm", VLLM)):
                others = [table[other] for arm in rivals if (other := _like(key, arm=arm)) in table]
                if others:
                    found[name].append(_against_best(row, others))
            if (plain := table.get(_like(key, arm="none"))) is not None:
                found["adaptive_vs_none"].append(_ratio(row, plain))
        if key.arm == "none" and (one := table.get(_like(key, arm="vllm"))) is not None:
            found["none_vs_vllm"].append(_ratio(row, one))
        # The library answers one request after another, whatever the batch.
        if key.arm == "none" and (one := table.get(_like(key, arm="hf_generate", batch=1))) is not None:
            found["none_vs_hf_generate"].append(_ratio(row, one))
        if key.arm == "fixed-3" and (one := table.get(_like(key, arm="hf_assisted"))) is not None:
            found["fixed3_vs_hf_assisted"].append(_ratio(row, one))
    return found


def _like(key: Key, **changes: Any) -> Key:
    return Key(**(asdict(key) | changes))


def _against_best(row: Row, others: list[Row]) -> dict[str, Any]:
    """Compare a row with the fastest of others, by their medians.

    In every repeat the rival is the one that was fastest in the other repeats: were it chosen by its own
    repeat too, luck would choose it, and a row that equals the best would come out below it.
    """
    best = max(others, key=lambda other: statistics.median(other.speeds))
    if len(best.speeds) == 1:
        return _ratio(row, best)
    pairs = []
    for repeat, mine in enumerate(row.speeds[: len(best.speeds)]):
        there = [other.speeds for other in others if len(other.speeds) >= len(best.speeds)]
        rival = max(there, key=lambda speeds: statistics.median(speeds[:repeat] + speeds[repeat + 1 :]))
        pairs.append(mine / rival[repeat])
    return _compared(row, best, pairs)


def _ratio(row: Row, other: Row) -> dict[str, Any]:
    """Compare two rows repeat by repeat."""
    return _compared(row, other, [mine / theirs for mine, theirs in zip(row.speeds, other.speeds, strict=False)])


def _compared(row: Row, other: Row, pairs: list[float]) -> dict[str, Any]:
    about = asdict(row.key)
    against = other.key.arm if row.key.arm != other.key.arm else "prefix cache off"
    return {name: about[name] for name in ("widen", "batch", "workload", "arm", "temperature", "coupling")} | {
        "against": against, "ratio": round(statistics.median(pairs), 4), "low": round(min(pairs), 4),
        "high": round(max(pairs), 4), "repeats": len(pairs),
    }  # fmt: skip


def _ms(seconds: list[float], percent: float) -> float | None:
    return round(float(np.percentile(seconds, percent)) * 1e3, 3) if seconds else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
