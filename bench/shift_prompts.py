"""What is asked in a shift of traffic: two segments of prompts, each with a third kept for measuring only.

A segment has few prompts, and a greedy request repeated word for word teaches and measures nothing new.  So
a prompt is dealt with a wording before it and one behind it; a combination comes again only when all have
been dealt.  The third kept for measuring is cut off by prompt, before any wording is put around it.  Pure;
called by `bench.shift` and `bench.shift_schedule`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

from adapter.contracts import SettingsError
from serving.demo import prompts as families

KEPT = Path(__file__).resolve().parent.parent.parent / "shared/data/spec_bench/prompts.jsonl"
MIN_PROMPTS = 6
BEFORE = (
    "", "Please help me. ", "Here is a question. ", "I need this for school: ", "Read carefully. ", "Hello! ",
    "A friend asked me this. ", "Think first. ",
)  # fmt: skip
BEHIND = (
    "", " Answer briefly.", " Explain step by step.", " Use simple words.", " Give an example.",
    " Answer in full sentences.",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Prompts of one kind.  `measuring` is never logged for training; `varied` puts wordings around prompts."""

    name: str
    learning: tuple[str, ...]
    measuring: tuple[str, ...]
    varied: bool = True


def read_prompts(path: Path) -> dict[str, list[str]]:
    """Read a file of JSON lines with `segment` and `prompt`; return prompts by segment, in order, each once.

    Raises:
        SettingsError: the file is not there, or a line is not such an object.
    """
    if not path.is_file():
        raise SettingsError(f"--prompts {path}: there is no such file; give JSON lines with `segment` and `prompt`")
    found: dict[str, dict[str, None]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            segment, prompt = item["segment"], item["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"--prompts {path}, line {number}: {type(error).__name__} {error}; expected a JSON object with "
                "`segment` and `prompt`"
            ) from None
        if not (isinstance(segment, str) and isinstance(prompt, str) and prompt.strip()):
            raise SettingsError(
                f"--prompts {path}, line {number}: `segment` and `prompt` must be text that is not empty"
            )
        found.setdefault(segment, {})[prompt] = None
    return {name: list(prompts) for name, prompts in found.items()}


def family_prompts(seed: int) -> dict[str, list[str]]:
    """Return the demonstration's made-up traffic: everyday advice and markdown tables."""
    made = (families.advice(seed), families.tables(seed))
    return {family.name: list(family.prompts) for family in made}


def load_segments(path: Path | None, names: tuple[str, ...] | None, seed: int) -> tuple[Segment, Segment]:
    """Return the segments A and B.

    Args:
        path: JSON lines; None takes the kept file where it is there, else the made-up traffic.
        names: of A and B; None takes the two with most prompts, of equals the shorter ones, the longer of them first.

    Raises:
        SettingsError: a segment is unknown or too small, or there are not two.
    """
    by_name = read_prompts(path or KEPT) if path is not None or KEPT.is_file() else family_prompts(seed)
    first, second = names or _two(by_name)
    return split(first, by_name, seed), split(second, by_name, seed)


def split(name: str, by_name: dict[str, list[str]], seed: int) -> Segment:
    """Return one segment, a third of its prompts cut off for measuring.

    Raises:
        SettingsError: there is no such segment, or it has too few prompts.
    """
    prompts = list(by_name.get(name, ()))
    if not prompts:
        raise SettingsError(f"there is no segment {name!r}; there are {', '.join(sorted(by_name)) or 'none'}")
    if len(prompts) < MIN_PROMPTS:
        raise SettingsError(
            f"segment {name!r} has {len(prompts)} prompts; {MIN_PROMPTS} are needed, a third of them for measuring only"
        )
    random.Random(f"{seed}:split:{name}").shuffle(prompts)
    third = len(prompts) // 3
    return Segment(name=name, learning=tuple(prompts[third:]), measuring=tuple(prompts[:third]))


class Deck:
    """Deal prompts in a seeded order, none of its wordings twice before all have been dealt."""

    def __init__(self, prompts: tuple[str, ...], seed: str, *, varied: bool = True) -> None:
        wordings = product(BEFORE, BEHIND) if varied else [("", "")]
        self._cards = [before + prompt + behind for before, behind in wordings for prompt in prompts]
        self._pick = random.Random(seed)
        self._order = self._deal()

    def next(self) -> str:
        """Return the next prompt."""
        return next(self._order)

    def _deal(self) -> Iterator[str]:
        while True:
            self._pick.shuffle(self._cards)
            yield from self._cards


def _two(by_name: dict[str, list[str]]) -> tuple[str, str]:
    if len(by_name) < 2:
        raise SettingsError(f"two segments are needed, A and B; there is {', '.join(by_name) or 'none'}")
    lengths = {name: median(map(len, prompts)) for name, prompts in by_name.items()}
    best = sorted(by_name, key=lambda name: (-len(by_name[name]), lengths[name]))[:2]
    first, second = sorted(best, key=lambda name: -lengths[name])
    return first, second
