"""Prompts for the benchmarks: answers that are easy to foresee, hard to foresee, both, and long shared prompts.

`high` asks for text that repeats the prompt or itself (copies, lists of one shape) and gives the answer's
beginning, as an editor does that lets a text be finished; `low` asks for free prose; `mixed` deals both in
turn; `rag` puts several short questions to each long passage.  Prompts are put together from short lists,
so that no data set has to ship; `load_texts` takes real ones instead.  Pure but for `load_texts`;
everything follows from the seed.  Called by `bench.engine` and `bench.record`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapter.contracts import SettingsError

WORKLOADS = ("high", "low", "mixed")
RAG = "rag"

_NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Ines", "Jonas", "Kira", "Leo", "Mona", "Nils")
_CITIES = ("Lyon", "Oslo", "Graz", "Porto", "Bergen", "Turin", "Ghent", "Lund", "Basel", "Cork", "Split", "Riga")
_GOODS = ("apples", "pears", "honey", "bread", "butter", "cheese", "onions", "carrots", "lamps", "chairs", "ropes")
_SENTENCES = (
    "The market opens at seven in the morning.", "The train to the coast leaves from the second platform.",
    "Every garden needs water, light and patience.", "The old bridge was closed for repairs.",
    "My brother plays the guitar on Sundays.", "The shop around the corner sells fresh bread.",
    "A small boat crossed the lake before sunset.", "The library keeps its maps on the top floor.",
)  # fmt: skip
_PLACES = ("a lighthouse", "a night train", "a mountain village", "an empty theatre", "a harbour in winter", "a bakery")
_HEROES = ("a retired captain", "a shy librarian", "two sisters", "a lost dog", "a young engineer", "an old gardener")
_FEELINGS = ("hope", "homesickness", "curiosity", "regret", "courage", "boredom", "pride", "forgiveness")
_THINGS = (
    "learning a language late in life", "moving to a small town", "working at night", "giving up sugar",
    "raising a puppy", "writing a first novel", "travelling without a plan", "living next to the sea",
    "repairing old radios", "a friendship that ended", "rain in the city", "cooking for strangers",
)  # fmt: skip
_PARTS = ("pump", "boiler", "filter", "gearbox", "fan", "valve", "sensor", "belt", "heater", "panel")
_SYMPTOMS = ("makes a humming noise", "runs hot", "loses pressure", "stops without warning", "drips", "starts slowly")
_ACTIONS = (
    "close the supply and wait for ten minutes", "clean the inlet with a soft brush", "replace the seal",
    "tighten the four bolts in a cross pattern", "check the voltage at the terminal", "call the service desk",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the user says, and how the answer begins where that is given."""

    text: str
    lead: str = ""


def prompts(workload: str, count: int, seed: int, texts: list[str] | None = None) -> list[Prompt]:
    """Return `count` prompts of a workload; the same for the same seed, and a longer list begins with a shorter one.

    Args:
        texts: real prompts to use instead of made-up ones; see `load_texts`.

    Raises:
        SettingsError: there is no such workload.
    """
    dealers: dict[str, Callable[[random.Random, int], Prompt]] = {"high": _high, "low": _low, "mixed": _mixed}
    if workload not in dealers:
        raise SettingsError(f"workload {workload!r} does not exist; there are {', '.join(dealers)}")
    order = _shuffled(texts, seed) if texts else []
    made = []
    for index in range(count):
        chance = random.Random(f"{seed}:{workload}:{index}")
        made.append(_real(workload, order[index % len(order)], index) if order else dealers[workload](chance, index))
    return made


def rag(
    passages: int, questions: int, seed: int, *, paragraphs: int = 36, texts: list[str] | None = None
) -> list[Prompt]:
    """Return passages x questions prompts; the questions of one passage differ only in their last lines.

    They come mixed, as from people who each read one document: a question to every passage, then the next.
    """
    kinds = [f"What should I do when the {part} {how}?" for part in _PARTS for how in _SYMPTOMS]
    longest = sorted(texts or [], key=len, reverse=True)[:passages]
    made = []
    for number in range(passages):
        chance = random.Random(f"{seed}:{RAG}:{number}")
        passage = longest[number % len(longest)][:4000] if longest else _manual(chance, number, paragraphs)
        intro = f"Answer in one short sentence from this text.\n\n{passage}\n\nQuestion: "
        made.append([Prompt(intro + question) for question in chance.sample(kinds, k=questions)])
    return [asked[turn] for turn in range(questions) for asked in made]


def load_texts(folder: Path) -> list[str]:
    """Read real prompts: the field `prompt` of every line of every .jsonl file of a folder, or of one file.

    Raises:
        SettingsError: nothing is there, or a line has no prompt.
    """
    files = [folder] if folder.is_file() else sorted(folder.glob("*.jsonl"))
    found = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                found.append(str(json.loads(line)["prompt"]))
            except (ValueError, KeyError, TypeError):
                raise SettingsError(f'{path}, line {number}: expected a JSON object with the field "prompt"') from None
    if not found:
        raise SettingsError(f"{folder} holds no prompts; expected .jsonl files with a field `prompt` in every line")
    return found


# -- made-up prompts ---------------------------------------------------------------------------


def _high(chance: random.Random, index: int) -> Prompt:
    kinds = (_copy_json, _repeat_sentence, _copy_table, _count, _copy_text, _rows)
    return kinds[index % len(kinds)](chance)


def _low(chance: random.Random, index: int) -> Prompt:
    place, hero, feeling, thing = (chance.choice(items) for items in (_PLACES, _HEROES, _FEELINGS, _THINGS))
    asked = (
        f"Write a short story about {hero} in {place}.", f"Write a letter to a friend about {thing}.",
        f"Describe {place} through the eyes of {hero}, with sounds and smells.",
        f"What does {feeling} have to do with {thing}? Give me your own thoughts.",
        f"Write a dialogue between {hero} and a stranger about {feeling}.",
    )  # fmt: skip
    return Prompt(asked[index % len(asked)])


def _mixed(chance: random.Random, index: int) -> Prompt:
    return (_low if index % 2 else _high)(chance, index // 2)


def _people(chance: random.Random) -> list[tuple[str, str, int]]:
    return [(name, chance.choice(_CITIES), chance.randint(20, 70)) for name in chance.sample(_NAMES, k=8)]


def _copy_json(chance: random.Random) -> Prompt:
    rows = [{"name": name, "city": city, "age": age} for name, city, age in _people(chance)]
    text = f"```json\n{json.dumps(rows, indent=1)}\n```"
    return Prompt(f"Repeat the following JSON exactly:\n\n{text}", _lines(text, 6))


def _copy_table(chance: random.Random) -> Prompt:
    rows = "".join(f"| {name} | {city} | {age} |\n" for name, city, age in _people(chance))
    text = f"| name | city | age |\n|---|---|---|\n{rows}"
    return Prompt(f"Copy this table and change nothing:\n\n{text}", _lines(text, 3))


def _copy_text(chance: random.Random) -> Prompt:
    text = "\n".join(chance.sample(_SENTENCES, k=len(_SENTENCES)))
    return Prompt(f"Repeat the following text word for word:\n\n{text}", _lines(text, 2))


def _repeat_sentence(chance: random.Random) -> Prompt:
    sentence = chance.choice(_SENTENCES)
    return Prompt(f'Write the sentence "{sentence}" forty times, one per line.', f"{sentence}\n" * 4)


def _count(chance: random.Random) -> Prompt:
    first = chance.randint(1, 60)
    lead = ", ".join(str(number) for number in range(first, first + 12))
    return Prompt(f"Count from {first} to {first + 90}.", lead + ",")


def _rows(chance: random.Random) -> Prompt:
    goods = chance.sample(_GOODS, k=len(_GOODS))
    lead = "".join(f"I would like to buy some {item}, please.\n" for item in goods[:3])
    return Prompt(f"Write a line for each of these: {', '.join(goods)}.", lead)


def _lines(text: str, count: int) -> str:
    return "".join(text.splitlines(keepends=True)[:count])


def _manual(chance: random.Random, number: int, paragraphs: int) -> str:
    """A service manual of so many paragraphs of about 25 tokens."""
    lines = [f"Service manual of machine {number + 1}, kept in {chance.choice(_CITIES)}."]
    for index in range(1, paragraphs + 1):
        part, how, action = chance.choice(_PARTS), chance.choice(_SYMPTOMS), chance.choice(_ACTIONS)
        lines.append(f"{index}. When the {part} {how}, {action}, then note it on page {chance.randint(2, 90)}.")
    return "\n".join(lines)


# -- real prompts --------------------------------------------------------------------------------


def _real(workload: str, text: str, index: int) -> Prompt:
    """Make copying out of a real prompt for `high`; take it as it is for `low`."""
    if workload == "low" or (workload == "mixed" and index % 2):
        return Prompt(text[:1600])
    words = text[:800].split(" ")
    return Prompt(f"Repeat the following text word for word:\n\n{text[:800]}", " ".join(words[: len(words) // 4]))


def _shuffled(texts: list[str], seed: int) -> list[str]:
    order = sorted(texts)
    random.Random(f"{seed}:texts").shuffle(order)
    return order
