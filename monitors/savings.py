"""What a change of acceptance is worth: seconds of the engine saved with each token.

The guard pairs requests of a new version with like ones of the version before it, so their acceptances are about the
same traffic; the engine's own document says what rounds cost on this machine.  Between the two stands the usual model
(Leviathan et al., arXiv 2211.17192): with acceptance a, a round of g drafted tokens brings (1 - a^(g+1)) / (1 - a)
tokens.  For both versions the best g is taken, as the adaptive controller does.  What is not known stays None with
the reason.  Pure functions; `monitors.payoff` calls them.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from monitors.guard import Guard, confidence_sequence

_LARGEST = 0.999  # an acceptance of 1 makes the model divide by zero


class Saving(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds saved with each token a version delivers, against the version it replaced.

    `interval` is 95 %, from acceptance alone; costs are taken as measured.  Where it is not known, `seconds` and
    `interval` are None and `why` says why; else `why` is empty.
    """

    seconds: float | None = None
    interval: tuple[float, float] | None = None
    before: float | None = None
    after: float | None = None
    pairs: int = 0
    why: str = ""


def saving_of(guard: Guard, engine: dict[str, Any] | None, *, need: int, gamma_max: int) -> Saving:
    """Say what the version that `guard` watched saves; `engine` is the document `adapter.facts.ENGINE`."""
    pairs = len(guard.pairs)
    if pairs < need:
        why = f"{pairs} of its requests had a comparable one on v{guard.previous}; {need} are needed"
        return Saving(pairs=pairs, why=why)
    gain = float(np.mean(guard.pairs))
    after = sum(item.paired for item in guard.seen.values()) / pairs
    before = after - gain
    low, high = confidence_sequence([(pair + 1) / 2 for pair in guard.pairs])
    was = seconds_per_token(engine, before, gamma_max)
    if was is None:
        why = "the engine tells no costs of rounds; only its adaptive controller measures them"
        return Saving(before=before, after=after, pairs=pairs, why=why)
    changes = (gain, 2 * low - 1, 2 * high - 1)
    now, worst, best = (seconds_per_token(engine, before + change, gamma_max) or was for change in changes)
    return Saving(seconds=was - now, interval=(was - worst, was - best), before=before, after=after, pairs=pairs)


def seconds_per_token(engine: dict[str, Any] | None, acceptance: float, gamma_max: int) -> float | None:
    """Return the engine's seconds for each token at an acceptance, or None where it tells no costs.

    Costs are those of its median batch, one request where it served none yet.
    """
    try:
        said = engine["controller"]["costs"]  # type: ignore[index]
        batch = max(1, round(engine["median_batch"] or 1))  # type: ignore[index]
        table, factors = said["table"], said["corrections"]
        rows, target = (np.array(table["target"][key], float) for key in ("rows", "ms"))
        lines, draft = (np.array(table["draft"][key], float) for key in ("rows", "ms"))
        target_factor, draft_factor = (float(factors[name]["factor"]) for name in ("target", "draft"))
        overhead_ms = float(said["overhead_ms"])
    except (KeyError, TypeError, ValueError):
        return None
    if not len(rows) or not len(lines):
        return None
    share = min(_LARGEST, max(0.0, acceptance))
    gammas = np.arange(gamma_max + 1)
    verify = target_factor * np.interp(batch * (gammas + 1), rows, target)
    propose = gammas * draft_factor * np.interp(batch, lines, draft)
    tokens = batch * (1 - share ** (gammas + 1)) / (1 - share)
    return float(np.min((verify + propose + overhead_ms) / tokens) * 1e-3)
