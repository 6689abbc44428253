"""When which request arrives: scenarios of changing traffic as one seeded list, the same for every arm.

Arrivals are a Poisson process (open loop: nobody waits for an answer before asking again).  Every fourth
one after a warm-up measures: its prompt is held out, it is never logged for training, and it asks for a
fixed draft length, so that acceptance is seen even where the controller would not draft.  Pure; called by
`bench.shift_arms`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from adapter.contracts import SettingsError
from bench.shift_prompts import Deck, Segment

A, B, NOISE = "a", "b", "noise"
OTHERS, MALLORY = "default", "mallory"  # segments as the service is told; everybody's is the default one
MEASURE_EVERY = 4
NOISE_AT = 1.5  # the temperature of text that no draft can predict
_NOISE_WORDS = (5, 12)
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@dataclass(frozen=True, slots=True)
class Heat:
    """How many requests are sampled, of both kinds alike: every so manyth, at this temperature; others are greedy."""

    every: int = 4
    temperature: float = 0.7


USUAL = Heat()


@dataclass(frozen=True, slots=True)
class Period:
    """A stretch of a scenario: its share of the time, and B's share of the traffic at its begin and end."""

    share: float
    b_from: float
    b_to: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One way in which traffic changes.

    Args:
        judged: whose acceptance is reported.
        oracle_on: what the oracle's draft is trained on.
        noise_share: share of arrivals that are Mallory's; until the second period she asks what everybody asks.
        cycles: trainings are asked for one after another, and the adaptive arm begins with the oracle's draft.
    """

    name: str
    about: str
    periods: tuple[Period, ...]
    judged: tuple[str, ...] = (B,)
    oracle_on: tuple[str, ...] = (B,)
    noise_share: float = 0.0
    cycles: bool = False

    def edges(self, seconds: float) -> list[float]:
        """Return where periods begin and the last one ends, in seconds."""
        total, edges = sum(item.share for item in self.periods), [0.0]
        for item in self.periods:
            edges.append(edges[-1] + seconds * item.share / total)
        return edges


SCENARIOS = {
    item.name: item
    for item in (
        Scenario(name="abrupt", about="A, then B at once", periods=(Period(0.25, 0, 0), Period(0.75, 1, 1))),
        Scenario(name="gradual", about="A, then more and more B",
                 periods=(Period(0.2, 0, 0), Period(0.3, 0, 1), Period(0.5, 1, 1))),
        Scenario(name="recurring", about="A, B, A and B again",
                 periods=(Period(0.2, 0, 0), Period(0.4, 1, 1), Period(0.2, 0, 0), Period(0.2, 1, 1))),
        Scenario(name="mixed", about="A and B in equal parts, one training after another from a good draft",
                 periods=(Period(0.2, 0.5, 0.5), Period(0.8, 0.5, 0.5)), judged=(A, B), oracle_on=(A, B), cycles=True),
        Scenario(name="adversarial", about="A all the time; one tenant changes to text no draft can predict",
                 periods=(Period(0.3, 0, 0), Period(0.7, 0, 0)), judged=(A,), oracle_on=(A,), noise_share=1 / 3),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request to come.  `at_s` counts from the begin of the scenario; `part` is A, B or NOISE."""

    index: int
    at_s: float
    period: int
    part: str
    prompt: str
    temperature: float
    measuring: bool
    tenant: str = OTHERS


def scenarios_named(names: list[str] | None) -> list[Scenario]:
    """Return scenarios by name, all of them for None.

    Raises:
        SettingsError: there is none of this name.
    """
    for name in names or ():
        if name not in SCENARIOS:
            raise SettingsError(f"there is no scenario {name!r}; there are {', '.join(SCENARIOS)}")
    return [SCENARIOS[name] for name in dict.fromkeys(names or SCENARIOS)]


def schedule(
    scenario: Scenario, segments: tuple[Segment, Segment], *, rate: float, seconds: float, seed: int, warm_up_s: float,
    heat: Heat = USUAL,
) -> list[Arrival]:  # fmt: skip
    """Return all arrivals of a scenario; the same arguments give the same list.

    Args:
        rate: arrivals a second.
        warm_up_s: no arrival measures before this.
    """
    times, kinds = random.Random(f"{seed}:times:{scenario.name}"), random.Random(f"{seed}:kinds:{scenario.name}")
    decks = _Decks(segments, f"{seed}:{scenario.name}")
    edges, now = scenario.edges(seconds), 0.0
    found: list[Arrival] = []
    ordinary = warm = 0
    while (now := now + times.expovariate(rate)) < seconds:
        period = max(i for i, edge in enumerate(edges[:-1]) if edge <= now)
        share = _share(scenario.periods[period], edges, period, now)
        theirs = bool(scenario.noise_share) and kinds.random() < scenario.noise_share
        part = NOISE if theirs and period else B if kinds.random() < share else A
        warm += now >= warm_up_s
        measuring = now >= warm_up_s and warm % MEASURE_EVERY == 0
        ordinary += not measuring
        sampled = (warm // MEASURE_EVERY if measuring else ordinary) % heat.every == 0
        found.append(Arrival(
            index=len(found), at_s=round(now, 4), period=period, part=part, measuring=measuring,
            temperature=NOISE_AT if part == NOISE else heat.temperature if sampled else 0.0,
            prompt=decks.next(part, measuring), tenant=MALLORY if theirs else OTHERS,
        ))  # fmt: skip
    return found


class _Decks:
    def __init__(self, segments: tuple[Segment, Segment], seed: str) -> None:
        self._pick = random.Random(f"{seed}:noise")
        self._decks = {}
        for part, segment in zip((A, B), segments, strict=True):
            self._decks[part, False] = Deck(segment.learning, f"{seed}:{part}:learn", varied=segment.varied)
            self._decks[part, True] = Deck(segment.measuring, f"{seed}:{part}:measure", varied=segment.varied)

    def next(self, part: str, measuring: bool) -> str:
        if part != NOISE:
            return self._decks[part, measuring].next()
        words = ("".join(self._pick.choices(_LETTERS, k=self._pick.randint(2, 7))) for _ in range(self._length()))
        return " ".join(words)

    def _length(self) -> int:
        return self._pick.randint(*_NOISE_WORDS)


def _share(period: Period, edges: list[float], number: int, now: float) -> float:
    part = (now - edges[number]) / (edges[number + 1] - edges[number])
    return period.b_from + part * (period.b_to - period.b_from)
