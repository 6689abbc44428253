"""Two kinds of made-up traffic: everyday advice, and markdown tables.

Prompts are put together from short lists, so that no data set has to ship and no two prompts are
equal.  The second kind is one a draft distilled on chat guesses badly and can learn fast, since its
answers have one shape.  Pure; called by `serving.demo.stages`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

_GOALS = (
    "sleep better", "save more money", "learn the guitar", "make new friends", "stay calm", "eat more vegetables",
    "read more books", "get fit", "become a better listener", "find a new hobby", "write better letters",
    "keep my house tidy", "spend less time online", "prepare for an exam", "improve my memory", "drink more water",
    "speak in public", "wake up early", "grow tomatoes", "plan my week", "cook simple meals", "reduce waste",
)  # fmt: skip
_CIRCUMSTANCES = (
    "when I have very little time", "as a student", "after moving to a new city", "with two small children",
    "during a long winter", "while working from home", "without spending money", "after a stressful year",
    "at the age of sixty", "if I give up easily", "in a noisy house", "while travelling",
)  # fmt: skip
_THINGS = {
    "recipes": "title servings minutes author calories", "planets": "name mass radius moons age",
    "invoices": "number customer total currency date", "cameras": "brand model price weight lens",
    "books": "title author pages year language", "cars": "brand model year color doors",
    "houses": "address rooms price area garden", "students": "name age grade school email",
    "tickets": "number seat price date place", "songs": "title artist length year genre",
    "rivers": "name length source depth country", "lamps": "color height price power brand",
    "parcels": "sender receiver weight price status", "gardens": "owner area trees flowers fence",
    "hotels": "name city stars rooms price", "trains": "number speed cars origin destination",
    "bakeries": "name street owner ovens breads", "islands": "name area people beaches ocean",
    "phones": "brand model memory price color", "meetings": "title room start end host",
    "teachers": "name subject school years email", "museums": "name city paintings price director",
    "bridges": "name length width river year", "doctors": "name hospital patients age city",
    "movies": "title director minutes year rating", "farms": "owner cows fields tractors barns",
    "wallets": "owner coins notes cards color", "airports": "code city gates runways country",
    "chairs": "color legs price material height", "bicycles": "brand gears color weight price",
    "castles": "name towers year king walls", "coffees": "name origin price roast strength",
    "printers": "brand model pages ink price", "orders": "number customer items total date",
    "players": "name team goals age position", "ships": "name captain length speed flag",
    "flowers": "name color height petals season", "kitchens": "area oven sink fridge table",
    "sensors": "name unit value minimum maximum", "servers": "host port memory disks owner",
    "messages": "sender receiver subject text date", "bottles": "volume color material label price",
    "libraries": "name books members street city", "guitars": "brand strings color price year",
    "stores": "name street products owner sales", "horses": "name age color speed owner",
    "courses": "title teacher hours price level", "robots": "name battery arms speed task",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of traffic: a name, a description for people, and its distinct prompts in a fixed order."""

    name: str
    about: str
    prompts: tuple[str, ...]


def advice(seed: int) -> Family:
    """Return everyday questions, answered in prose."""
    prompts = [f"How can I {goal} {circumstance}?" for goal, circumstance in product(_GOALS, _CIRCUMSTANCES)]
    return _family("advice", "everyday advice", prompts, seed)


def tables(seed: int) -> Family:
    """Return requests for tables of three columns."""
    prompts = [
        f"Write a markdown table about {things} with the columns {first}, {second} and {third}."
        for things, columns in _THINGS.items()
        for first, second, third in combinations(columns.split(), 3)
    ]
    return _family("tables", "markdown tables", prompts, seed)


class Deck:
    """Deal the prompts of a family, none twice before all have been dealt."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._order = self._deal()

    def next(self) -> str:
        """Return the next prompt."""
        return next(self._order)

    def take(self, count: int) -> list[str]:
        """Return the next `count` prompts."""
        return [self.next() for _ in range(count)]

    def _deal(self) -> Iterator[str]:
        while True:
            yield from self.family.prompts


def _family(name: str, about: str, prompts: list[str], seed: int) -> Family:
    random.Random(f"{seed}:{name}").shuffle(prompts)
    return Family(name, about, tuple(prompts))
