"""Predict what a step costs: the measured table, corrected by what steps really cost.

Corrections are slow and clipped, one factor for the target and one for the draft, so that a pause of
the machine moves no decision and a wrong table is forgotten within a hundred steps; the target's curve
learns its shape besides.  What belongs to neither model is an overhead a step.  Knows nothing about
acceptance.  Used by `adaptive`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from serving.engine.control.base import StepReport, StepShape
from serving.engine.control.cost_table import CostTable, Floats
from serving.engine.control.learned_curve import LearnedCurve

_RATE = 0.02  # about fifty steps
_CLIP = 0.5  # the most, in log, that one step can disagree
_LIMIT = math.log(4.0)
_LEAST_PART = 0.05  # of a step that drawing must take, before the step says anything about it
ALARM = 0.25  # a correction beyond this, in log, deserves a look: the machine is not what it was


def clipped_log(ratio: float) -> float:
    """Return how wrong a prediction was, in log, as far as one step may say."""
    return min(_CLIP, max(-_CLIP, math.log(ratio))) if ratio > 0 else 0.0


class Correction:
    """One factor between what was predicted and what was seen."""

    def __init__(self) -> None:
        self.log_factor = 0.0
        self.num_seen = 0

    @property
    def factor(self) -> float:
        """What predictions are multiplied by."""
        return math.exp(self.log_factor)

    def observe(self, predicted_s: float, seen_s: float, weight: float = 1.0) -> None:
        """Move towards seen / predicted: fast at first, then slowly.

        `predicted_s` is corrected already; `weight` is this factor's part of it.
        """
        if predicted_s <= 0 or seen_s <= 0 or weight <= 0:
            return
        self.num_seen += 1
        rate = max(_RATE, 1 / (self.num_seen + 1)) * weight
        moved = self.log_factor + rate * clipped_log(seen_s / predicted_s)
        self.log_factor = min(_LIMIT, max(-_LIMIT, moved))


class CostModel:
    """Seconds of forwards and steps, as believed now."""

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self.target_correction = Correction()
        self.sample_correction = Correction()
        self.draft_correction = Correction()
        self.overhead_s = 0.0  # a step's time outside proposing and verifying
        self.propose_s = 0.0  # proposing without a draft forward: looking for matches, choosing
        self._overheads_seen = 0
        self._proposals_seen = 0
        self._target = LearnedCurve(table.target)
        self._draft = LearnedCurve(table.draft) if table.draft else None

    @property
    def sample_s(self) -> float:
        """Seconds it takes to draw from one row of the target at a temperature, beyond a greedy one."""
        return self.table.sample_s * self.sample_correction.factor

    def target_s(self, rows: int, context_tokens: float, sampled_rows: float = 0.0) -> float:
        """Seconds of a target forward, some of whose rows are drawn from at a temperature."""
        raw = self._target.at(rows) + self._target.context_s * context_tokens
        return raw * self.target_correction.factor + sampled_rows * self.sample_s

    def more_target_s(self, rows: int, count: int, sampled_share: float = 0.0) -> Floats:
        """Seconds that 0, 1, … count - 1 more rows add to a target forward of `rows`."""
        span = self._target.span(rows, count)
        more: Floats = (span - span[0]) * self.target_correction.factor
        return more + np.arange(count) * (sampled_share * self.sample_s) if sampled_share else more

    def draft_s(self, rows: int, read_tokens: int, context_tokens: float) -> float:
        """Seconds of a draft forward that scores `rows` and reads some tokens besides; 0 without a draft model."""
        if self._draft is None:
            return 0.0
        raw = self._draft.at(rows) + self._draft.context_s * context_tokens + self.table.read_s * read_tokens
        return raw * self.draft_correction.factor

    def read_s(self, tokens: int) -> float:
        """Seconds the draft model needs to read tokens within a forward that runs anyway."""
        return self.table.read_s * tokens * self.draft_correction.factor

    def drafts_s(
        self, first: NDArray[np.int64], read: Floats, later: NDArray[np.int64], depth: Floats, context: Floats
    ) -> Floats:
        """Seconds of a draft's forwards: one of `first` rows and `read` tokens besides, depth - 1 of `later` rows.

        `context` is summed over all of them.  Shapes: all broadcast to one.
        """
        if self._draft is None:
            return np.zeros(np.broadcast_shapes(first.shape, depth.shape))
        rows_s = self._draft.pick(first) + np.maximum(depth - 1, 0) * self._draft.pick(later)
        rows_s += self.table.read_s * read
        return (rows_s + self._draft.context_s * context) * self.draft_correction.factor

    @property
    def fixed_s(self) -> float:
        """What every step costs besides its forwards."""
        return self.overhead_s + self.propose_s

    def plain_s(self, shape: StepShape, batch: int, sampled: int) -> tuple[float, float]:
        """Seconds of a plain step of this batch without prefill, and what its prefill adds."""
        alone = self.target_s(batch, shape.context_tokens, sampled)
        if not shape.prefill_tokens:
            return alone + self.fixed_s, 0.0
        both = self.target_s(batch + shape.prefill_tokens, shape.context_tokens, sampled)
        return alone + self.fixed_s, both - alone

    def observe(self, report: StepReport) -> None:
        """Compare a step with what the table says of it."""
        if report.step_s <= 0 or not report.rounds:
            return
        shape = report.shape
        if shape.prefill_tokens <= 4 * len(report.rounds):  # long prompts have a shape, and a cost, of their own
            sampled = sum(item.num_drafted + 1 for item in report.rounds if item.request.sampling.temperature > 0)
            predicted = self.target_s(report.rows, shape.context_tokens, sampled)
            drawing = sampled * self.sample_s / predicted
            self._target.observe(report.rows, (1 - drawing) ** 2 * clipped_log(report.target_s / predicted))
            self.target_correction.observe(predicted, report.target_s, (1 - drawing) ** 2)
            if drawing > _LEAST_PART:  # greedy steps hold the target's factor; what is left is the drawing's
                self.sample_correction.observe(predicted, report.target_s, min(1 / drawing, 1 / (4 * _LEAST_PART)))
        overhead = max(0.0, report.step_s - report.propose_s - report.target_s)
        self._overheads_seen += 1
        self.overhead_s += _rate(self._overheads_seen) * (overhead - self.overhead_s)
        if not report.draft_forwards:
            self._proposals_seen += 1
            self.propose_s += _rate(self._proposals_seen) * (report.propose_s - self.propose_s)
        elif self._draft is not None:
            # Only rounds the draft model drafted count here, but matches in the same step hardly change the context.
            drafting = max(1, sum(item.num_drafted > 0 for item in report.rounds))
            scored = [min(rows, drafting) for rows in report.draft_forwards]
            raw = sum(self._draft.at(rows) for rows in scored)
            raw += self._draft.context_s * sum(scored) * shape.context_tokens / len(report.rounds)
            raw += self.table.read_s * (sum(report.draft_forwards) - sum(scored))
            self.draft_correction.observe(raw * self.draft_correction.factor, report.propose_s - self.propose_s)

    def explain(self) -> dict[str, object]:
        """Return the table and its corrections in plain values, times in milliseconds."""
        curves = {"target": self.table.target, "draft": self.table.draft}
        corrections = {
            "target": self.target_correction, "sampling": self.sample_correction, "draft": self.draft_correction,
        }  # fmt: skip
        return {
            "table": {
                name: {
                    "rows": curve.rows, "ms": [round(1e3 * item, 4) for item in curve.seconds],
                    "context_ms_per_1000_tokens": round(1e6 * curve.context_s, 4),
                }
                for name, curve in curves.items() if curve
            },
            "corrections": {
                name: {"factor": round(item.factor, 4), "steps": item.num_seen, "alarm": abs(item.log_factor) > ALARM}
                for name, item in corrections.items()
            },
            "target_sizes": self._target.corrections(),
            "sample_ms": round(1e3 * self.sample_s, 4),
            "draft_reads_1000_tokens_ms": round(1e6 * self.table.read_s, 3),
            "overhead_ms": round(1e3 * self.overhead_s, 4),
            "propose_ms": round(1e3 * self.propose_s, 4),
        }  # fmt: skip


def _rate(num_seen: int) -> float:
    return max(_RATE, 1 / num_seen)
