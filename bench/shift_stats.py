"""Acceptance, speed and their comparison with 95 % intervals, from what a client saw.

Intervals are percentile bootstraps with a fixed seed.  Acceptance is Σ accepted / Σ examined, resampled by
request, because the tokens of one request go together; where two arms answered the same requests, both are
resampled together.  Speeds are resampled by blocks of time, because neighbours share steps.  Pure; called by
`bench.shift_figures` and `bench.shift_details`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.shift_client import Seen

RESAMPLES = 2000
SEED = 20261123
_FEWEST = 3
_BLOCKS = 12  # of a stretch, for speeds

Interval = dict[str, Any]
Floats = NDArray[np.float64]
Pairs = Sequence[tuple[Seen, Seen]]


def acceptance(items: Sequence[Seen]) -> Interval:
    """Return value, 95 % interval and number of requests; None where nothing was examined."""
    table = _counts(items)
    return ratio_of(table, lambda sums: sums[..., 0] / sums[..., 1])


def difference(pairs: Pairs) -> Interval:
    """Return how much higher acceptance is in the first than in the second, over the same requests."""
    table = np.hstack([_counts([pair[0] for pair in pairs]), _counts([pair[1] for pair in pairs])])
    return ratio_of(table, lambda sums: sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3])


def change(before: Sequence[Seen], after: Sequence[Seen]) -> Interval:
    """Return how much higher acceptance is after than before, over different requests."""
    if min(len(before), len(after)) < _FEWEST:
        return empty(min(len(before), len(after)))
    drawn = [_drawn(_counts(items), number) for number, items in enumerate((before, after))]
    (one, ones), (two, twos) = ((total, sums) for total, sums in drawn)
    values = twos[:, 0] / twos[:, 1] - ones[:, 0] / ones[:, 1]
    return _interval(two[0] / two[1] - one[0] / one[1], values, len(after))


def change_beyond(before: Pairs, after: Pairs) -> Interval:
    """Return the change of the first arm's lead over the second; prompts that are hard for both do not show in it."""
    if min(len(before), len(after)) < _FEWEST:
        return empty(min(len(before), len(after)))
    drawn = []
    for number, pairs in enumerate((before, after)):
        table = np.hstack([_counts([pair[0] for pair in pairs]), _counts([pair[1] for pair in pairs])])
        total, sums = _drawn(table, number)
        drawn.append((total[0] / total[1] - total[2] / total[3], sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]))
    return _interval(drawn[1][0] - drawn[0][0], drawn[1][1] - drawn[0][1], len(after))


def fraction(at_shift: Sequence[Seen], recovered: Sequence[Seen], oracle: Sequence[Seen]) -> Interval:
    """Return (recovered − at_shift) / (oracle − at_shift).

    `recovered` and `oracle` are the same requests in two arms where both have them.  All None where the oracle is
    not certainly better than `at_shift`: there is nothing to win back then, or too few requests to tell.
    """
    pairs = paired(recovered, oracle)
    if min(len(at_shift), len(pairs)) < _FEWEST:
        return empty(len(pairs))
    base, bases = _drawn(_counts(at_shift), 0)
    table = np.hstack([_counts([pair[0] for pair in pairs]), _counts([pair[1] for pair in pairs])])
    both, boths = _drawn(table, 1)
    return _share(base[0] / base[1], bases[:, 0] / bases[:, 1], both, boths, len(pairs))


def fraction_paired(static: Sequence[Seen], recovered: Sequence[Seen], oracle: Sequence[Seen]) -> Interval:
    """Return the same with the static arm's answers to the same requests in the place of `at_shift`."""
    ids = {seen.arrival.index: seen for seen in static}
    triples = [(ids[a.arrival.index], a, b) for a, b in paired(recovered, oracle) if a.arrival.index in ids]
    if len(triples) < _FEWEST:
        return empty(len(triples))
    total, sums = _drawn(np.hstack([_counts([item[i] for item in triples]) for i in range(3)]), 0)
    return _share(total[0] / total[1], sums[:, 0] / sums[:, 1], total[2:], sums[:, 2:], len(triples))


def speed(items: Iterable[Seen]) -> float | None:
    """Return delivered tokens a second of decoding: all but first tokens over the time after them."""
    table = _decoding(items)
    return round(float(table[:, 0].sum() / table[:, 1].sum()), 3) if len(table) else None


def speed_ratio(pairs: Pairs, *, whole: bool = False) -> Interval:
    """Return how many times faster the first arm served the same requests than the second.

    Args:
        whole: from the request to its end, with queue and prompt, instead of from the first token on.
    """
    table = _both(pairs, whole=whole)
    blocks = (
        np.array([block.sum(axis=0) for block in np.array_split(table, min(len(table), _BLOCKS))])
        if len(table)
        else table
    )
    found = ratio_of(blocks, lambda sums: (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3]))
    return found | {"n": len(table), "blocks": len(blocks)}


def slowdown(during: Iterable[Seen], outside: Iterable[Seen]) -> Interval:
    """Return 1 − speed during / speed outside, over different requests."""
    one, two = _decoding(during), _decoding(outside)
    if min(len(one), len(two)) < _FEWEST:
        return empty(min(len(one), len(two)))
    (a, many), (b, more) = _drawn(one, 0), _drawn(two, 1)
    values = 1 - (many[:, 0] / many[:, 1]) / (more[:, 0] / more[:, 1])
    return _interval(1 - (a[0] / a[1]) / (b[0] / b[1]), values, len(one))


def paired(first: Iterable[Seen], second: Iterable[Seen]) -> list[tuple[Seen, Seen]]:
    """Return both arms' answers to the same requests, in the order of the first."""
    others = {seen.arrival.index: seen for seen in second}
    return [(seen, others[seen.arrival.index]) for seen in first if seen.arrival.index in others]


def empty(n: int = 0) -> Interval:
    """Return what is said where there is too little to say anything."""
    return {"value": None, "interval": None, "n": n}


def ratio_of(table: Floats, figure: Callable[[Floats], Floats]) -> Interval:
    """Return a figure of column sums and its interval; rows are what is resampled.

    Shapes: table [n, k]; `figure` takes [k] or [resamples, k].
    """
    if len(table) < _FEWEST:
        return empty(len(table))
    total, sums = _drawn(table, 0)
    return _interval(figure(total), figure(sums), len(table))


def _share(base: Any, bases: Floats, both: Floats, boths: Floats, n: int) -> Interval:
    def part(low: Any, sums: Floats) -> tuple[Any, Any]:
        won, best = sums[..., 0] / sums[..., 1] - low, sums[..., 2] / sums[..., 3] - low
        return won, best

    won, best = part(base, both)
    many, bests = part(bases, boths)
    if np.percentile(bests, 2.5) <= 0:
        return empty(n)
    return _interval(won / best, many / bests, n)


def _drawn(table: Floats, stream: int) -> tuple[Floats, Floats]:
    """Return column sums and those of the resamples; shapes [n, k] to [k] and [resamples, k]."""
    pick = np.random.default_rng([SEED, stream])
    weights = pick.multinomial(len(table), np.full(len(table), 1 / len(table)), size=RESAMPLES)
    return table.sum(axis=0), weights @ table


def _interval(value: Any, values: Floats, n: int) -> Interval:
    values = values[np.isfinite(values)]
    if not len(values) or not np.isfinite(value):
        return empty(n)
    low, high = np.percentile(values, (2.5, 97.5))
    return {"value": round(float(value), 4), "interval": [round(float(low), 4), round(float(high), 4)], "n": n}


def _counts(items: Sequence[Seen]) -> Floats:
    return np.array([[seen.accepted, seen.examined] for seen in items], dtype=np.float64).reshape(-1, 2)


def _decoding(items: Iterable[Seen]) -> Floats:
    rows = [[seen.tokens - 1, seen.decoding_s] for seen in items if seen.decoding_s]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def _both(pairs: Pairs, *, whole: bool) -> Floats:
    rows = []
    for one, two in pairs:
        if whole:
            rows.append([one.tokens, one.finished_s - one.started_s, two.tokens, two.finished_s - two.started_s])
        elif one.decoding_s and two.decoding_s:
            rows.append([one.tokens - 1, one.decoding_s, two.tokens - 1, two.decoding_s])
    return np.array(rows, dtype=np.float64).reshape(-1, 4)
