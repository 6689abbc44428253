"""The page of known failures of speculation, each with the tests that would notice it.

A test belongs to a hazard when its name carries the id: `test_serving_s1_eos_inside_block` is S1's.
Called by `docs/generate.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

HAZARDS = {
    "S1": "an end token inside an accepted block does not cut it",
    "S2": "a stop string inside or across blocks is found late, or not cut from text, log-probs and usage",
    "S3": "the cap on tokens hides an earlier stop, or gives the wrong reason",
    "S4": "the draft's own end token ends the answer; end tokens that were to be ignored are not",
    "S5": "a least number of tokens is counted per step instead of per token",
    "S6": "a grammar is complete inside a block and text goes on",
    "N1": "the reported token count is not the number of tokens returned",
    "N2": "clients that count stream events count too few tokens",
    "N3": "accepted and delivered tokens are mixed up",
    "N4": "the acceptance rate divides by a configured draft length instead of what was drafted",
    "K1": "after a full acceptance the bonus token's keys and values are missing or doubled",
    "K2": "positions shift by one after a rejection",
    "K3": "rows of a batch that accept different numbers share one roll back",
    "K4": "a cache is reset where it should be rolled back",
    "K5": "windows and recurrent states cannot be rolled back by length",
    "D1": "tokens are drafted greedily but judged by the draft's probabilities",
    "D2": "tokens are drawn in one precision and judged in another",
    "D3": "a match is demanded where a ratio decides",
    "D4": "probability rows of one request judge another",
    "D5": "an empty residual gives NaN",
    "D6": "temperature or nucleus is applied to one law and not the other",
    "P1": "penalties miss accepted tokens inside a block, or count rejected ones",
    "G1": "a grammar's state is not rolled back with rejected tokens",
    "L1": "log-probs are zero, shifted, stale or of the wrong law",
    "R1": "one seed gives different texts with other batch mates or draft lengths",
    "R2": "greedy text with speculation differs from plain greedy text",
    "A1": "a preempted request loses or repeats tokens",
    "A2": "placeholders or padding reach a result",
    "A3": "a step without output stalls the loop",
    "A4": "cancelling races with a step",
    "A5": "a block belongs to two requests",
    "C1": "unverified keys and values are shared through the prefix cache",
    "V1": "draft and target map ids differently, or pad their vocabularies differently",
    "V2": "a draft with a shorter context crashes or shrinks the server",
    "V3": "the target changes its law and the draft is not told",
    "T1": "what a tool call parses to depends on how the text was cut into pieces",
    "W4": "weights are read while they are written",
    "W5": "part of a weight update is applied",
    "W6": "weights that are not finite are accepted",
    "W7": "a swap leaves keys and values of the old draft, and the text changes",
    "W8": "a roll back loads what it should undo",
    "Q1": "acceptance dies with position or uptime",
    "Q2": "acceptance near zero or near one goes unnoticed",
}
OUT_OF_REACH = {"V3": "adapters on the target are not served: there is nothing that could change its law while it runs"}

_TEST = re.compile(r"^def (test_\w+)\(", re.MULTILINE)


def covering(hazard: str, tests: Path) -> Iterator[tuple[str, str]]:
    """Yield (file name, test name) of every test whose name carries the hazard's id."""
    pattern = re.compile(rf"_{hazard.lower()}(?=_|$)")
    for path in sorted(tests.glob("test_*.py")):
        for name in _TEST.findall(path.read_text(encoding="utf-8")):
            if pattern.search(name):
                yield path.name, name


def page(tests: Path) -> str:
    """Return the page."""
    rows = ["| id | what goes wrong | what would notice |", "|---|---|---|"]
    for hazard, text in HAZARDS.items():
        found = [f"`{name}`" for _, name in covering(hazard, tests)]
        rows.append(f"| {hazard} | {text} | {'<br>'.join(found) or OUT_OF_REACH[hazard]} |")
    return (
        "\n# Known failures\n\nWhat speculation engines got wrong in public, and the tests here that carry each id in "
        "their name. Most were\nseen to fail on a deliberate mistake of that kind.\n\n" + "\n".join(rows) + "\n"
    )
