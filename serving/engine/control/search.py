"""Find, for one step, how many tokens each request should draft so that the step's tokens per second are most.

What counts is the time of decoding: prompts that are read beside it take theirs whatever is drafted, and a
draft must not look cheap because a step is long anyway; they matter by what a row more costs beside them.

For every depth the draft model might run to, slots (request, position) are taken in order of the
chance that their token survives, and every count of slots is priced: one sort and one sum a depth.
Survival never rises along a request, so what is taken is always the front of each draft.  Pure
numbers in, pure numbers out; called by `adaptive`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.engine.control.cost_model import CostModel
from serving.engine.control.cost_table import Floats

OFF_RULE = 1.03  # what speculation must promise before it is worth doing at all
_WIDEST = 64  # longest draft this can price
_ROWS = np.arange(_WIDEST + 1)
_DEPTHS = _ROWS.astype(float)
_INSIDE = _ROWS[None, :] < _ROWS[:, None]


@dataclass(frozen=True, slots=True)
class Problem:
    """What may be drafted in a step, for B requests and drafts of up to G tokens.

    Shapes: draft, free [B, G] survival by position, 0 where nothing is offered; catch_up_s [B] seconds of
    reading what the draft model missed, already shared over the rounds it will serve.  `free` are
    proposals that need no model; sampled_share is the part of the requests with a temperature.
    own_* are the requests that named their own draft length: their drafted rows by depth [G], the
    tokens the draft reads first for them, and the tokens they are expected to gain.
    """

    draft: Floats
    free: Floats
    catch_up_s: Floats
    prefill_rows: int
    context_tokens: int
    sampled_share: float
    own_rows: NDArray[np.int64]
    own_backlog: int
    own_gain: float


@dataclass(frozen=True, slots=True)
class Priced:
    """Every depth with its best number of slots.

    Shapes: tokens_per_s, slots [depths]; survival [depths, B * G], drafted [depths, B] where the
    draft model, rather than a free proposal, serves a request; `plain` is the rate without any.
    """

    tokens_per_s: Floats
    slots: NDArray[np.int64]
    survival: Floats
    drafted: NDArray[np.bool_]
    plain: float

    def allocate(self, depth: int, slots: int | None = None) -> NDArray[np.int64]:
        """Return how many tokens each request drafts at this depth.  Shapes: result [B]."""
        batch = self.drafted.shape[1]
        taken = np.argsort(-self.survival[depth], kind="stable")[: self.slots[depth] if slots is None else slots]
        return np.bincount(taken // (self.survival.shape[1] // batch), minlength=batch)


def price(problem: Problem, costs: CostModel) -> Priced:
    """Price every depth from 0 (no draft model) to the deepest draft offered."""
    batch, width = problem.draft.shape
    plain_s, plain = _plain(problem, costs)
    offered: NDArray[np.bool_] = np.any(problem.draft, axis=0)
    depths = width + 1 if offered[-1] else int(np.count_nonzero(offered)) + 1
    any_free = bool(problem.free.any())
    drafted = np.zeros((depths, batch), dtype=bool)
    # A backlog is worth reading if the draft, at today's tokens per second, beats what else there is.
    worth = np.cumsum(problem.draft[:, : depths - 1], axis=1) - plain * problem.catch_up_s[:, None]
    drafted[1:] = (worth > (problem.free.sum(axis=1)[:, None] if any_free else 0.0)).T
    inside = _INSIDE[:depths, :width]
    if any_free:
        by_model = drafted[:, :, None]
        survival = np.where(by_model, problem.draft * inside[:, None, :], problem.free).reshape(depths, -1)
    else:
        survival = (problem.draft * (drafted[:, :, None] & inside[:, None, :])).reshape(depths, -1)
    gain, by_draft, joined = _ordered(problem, survival, drafted, any_free)
    rows = batch + problem.prefill_rows + int(problem.own_rows.sum())
    seconds = _draft_s(problem, costs, drafted, by_draft, joined)
    seconds += plain_s + costs.more_target_s(rows, gain.shape[1], problem.sampled_share)
    rate = (gain + (batch + problem.own_gain)) / seconds
    rate[1:][by_draft[1:] == 0] = 0.0  # without a token of the draft model this is depth 0, not another one
    slots = rate.argmax(axis=1)
    return Priced(rate[_ROWS[:depths], slots], slots, survival, drafted, plain)


def price_matches(problem: Problem, costs: CostModel) -> tuple[float, float, NDArray[np.int64]]:
    """Return the tokens per second of verifying free tokens alone, those of none, and how many each request drafts.

    What `price` says of depth 0 when nobody named a length of its own, in a small part of its time: a step that
    leaves the draft model out is to cost next to nothing.  Shapes: last result [B].
    """
    batch, width = problem.free.shape
    survival = problem.free.ravel()
    order = np.argsort(-survival, kind="stable")[: np.count_nonzero(survival)]
    plain_s = costs.target_s(batch, problem.context_tokens, problem.sampled_share * batch) + costs.fixed_s
    seconds = plain_s + costs.more_target_s(batch + problem.prefill_rows, len(order) + 1, problem.sampled_share)
    rates = (batch + np.concatenate(([0.0], np.cumsum(survival[order])))) / seconds
    slots = int(rates.argmax())
    return float(rates[slots]), batch / plain_s, np.bincount(order[:slots] // width, minlength=batch)


def _plain(problem: Problem, costs: CostModel) -> tuple[float, float]:
    """Return seconds without drafting, and tokens per second if only requests with an own length draft."""
    batch = problem.draft.shape[0]
    own_total = int(problem.own_rows.sum())
    rows = batch + own_total
    sampled = problem.sampled_share * rows
    seconds = costs.target_s(rows, problem.context_tokens, sampled) + costs.fixed_s
    own_s = 0.0
    if own_total:
        nobody = np.zeros((1, batch), dtype=bool)
        own_s = float(_draft_s(problem, costs, nobody, np.zeros((1, 1)), np.zeros((1, 1)))[0, 0])
    return seconds, (batch + problem.own_gain) / (seconds + own_s)


def _ordered(
    problem: Problem, survival: Floats, drafted: NDArray[np.bool_], any_free: bool
) -> tuple[Floats, Floats, Floats]:
    """Sort each depth's slots, best first; sum what the first v gain.

    The other results are how many of the first v are the draft model's, and of how many requests.
    Shapes: results [depths, slots + 1].
    """
    batch, width = problem.draft.shape
    num_slots = int(np.count_nonzero(survival, axis=1).max())
    gain = np.zeros((len(survival), num_slots + 1))
    joined = np.zeros(gain.shape)
    if not any_free:
        by_value = -np.sort(-survival, axis=1)[:, :num_slots]
        by_draft = np.broadcast_to(np.arange(num_slots + 1, dtype=float), gain.shape)
        # A request's first slot is its best: those at least as good as the v-th are in.
        joined[:, 1:] = batch - np.searchsorted(np.sort(problem.draft[:, 0]), by_value)
    else:
        order = np.argsort(-survival, axis=1, kind="stable")[:, :num_slots]
        by_value = np.take_along_axis(survival, order, axis=1)
        by_draft = np.zeros(gain.shape)
        theirs = np.take_along_axis(drafted, order // width, axis=1)
        np.cumsum(theirs, axis=1, out=by_draft[:, 1:])
        np.cumsum(theirs & (order % width == 0), axis=1, out=joined[:, 1:])
    np.cumsum(by_value, axis=1, out=gain[:, 1:])
    return gain, by_draft, np.minimum(joined, by_draft)


def _draft_s(
    problem: Problem, costs: CostModel, drafted: NDArray[np.bool_], by_draft: Floats, joined: Floats
) -> Floats:
    """Seconds of the draft model at every depth and number of slots.

    The first forward reads the backlogs; how the rows of the later ones are spread hardly matters,
    so each is priced at their mean.  Shapes: result like by_draft.
    """
    depths, batch = drafted.shape
    own_total, own_first = int(problem.own_rows.sum()), int(problem.own_rows[0])
    depth = _DEPTHS[:depths, None]
    if own_total:
        depth = np.maximum(depth, np.count_nonzero(problem.own_rows))
    # A draft that was kept whole leaves one token more to read.  How deep the round before ran does not matter.
    whole = np.zeros((depths, 1))
    whole[1:, 0] = problem.draft[:, : depths - 1].sum(axis=0) / max(1, np.count_nonzero(problem.draft[:, 0]))
    first = (joined + own_first).astype(np.int64)
    read = whole * joined + (problem.own_backlog - own_first)
    later = ((by_draft - joined + (own_total - own_first)) / np.maximum(depth - 1, 1) + 0.5).astype(np.int64)
    context = (by_draft + own_total) * (problem.context_tokens / batch)
    seconds = costs.drafts_s(first, read, later, depth, context)
    if problem.catch_up_s.any():
        seconds += (drafted * problem.catch_up_s).sum(axis=1)[:, None]
    if not own_total:
        seconds[by_draft == 0] = 0.0
    return seconds
