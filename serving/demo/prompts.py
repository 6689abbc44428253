"""Two kinds of made-up traffic: conversation, and Python boilerplate.

Prompts are put together from short lists, so that no data set has to ship and no two prompts are
equal.  The second kind is one a draft distilled on chat guesses badly and can learn fast, since its
answers have one shape.  Pure; called by `serving.demo.stages`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

_HEROES = (
    "a fox", "a young baker", "a retired sailor", "a lonely robot", "a curious cat", "an old gardener",
    "a brave mouse", "a tired teacher", "a small dragon", "a village doctor", "a shy painter", "a lost astronaut",
    "a clever crow", "a kind giant",
)  # fmt: skip
_EVENTS = (
    "finds a silver key", "learns to dance", "misses the last train", "builds a boat", "makes a new friend",
    "hears a strange song", "walks through a snowstorm", "opens a small shop", "returns home after many years",
    "discovers a hidden garden", "loses a precious map", "wins a cooking contest",
)  # fmt: skip
_GOALS = (
    "sleep better", "save more money", "learn the guitar", "make new friends", "stay calm", "eat more vegetables",
    "read more books", "get fit", "become a better listener", "find a new hobby", "write better letters",
    "keep my house tidy",
)  # fmt: skip
_CIRCUMSTANCES = (
    "when I have very little time", "as a student", "after moving to a new city", "with two small children",
    "during a long winter", "while working from home", "without spending money", "after a stressful year",
    "at the age of sixty", "if I give up easily",
)  # fmt: skip
_THINGS = {
    "Recipe": "title servings minutes author calories", "Planet": "name mass radius moons age",
    "Invoice": "number customer total currency date", "Camera": "brand model price weight lens",
    "Book": "title author pages year language", "Car": "brand model year color doors",
    "House": "address rooms price area garden", "Student": "name age grade school email",
    "Ticket": "number seat price date place", "Song": "title artist length year genre",
    "River": "name length source depth country", "Lamp": "color height price power brand",
    "Parcel": "sender receiver weight price status", "Garden": "owner area trees flowers fence",
    "Hotel": "name city stars rooms price", "Train": "number speed cars origin destination",
    "Bakery": "name street owner ovens breads", "Island": "name area people beaches ocean",
    "Phone": "brand model memory price color", "Meeting": "title room start end host",
    "Teacher": "name subject school years email", "Museum": "name city paintings price director",
    "Bridge": "name length width river year", "Doctor": "name hospital patients age city",
    "Movie": "title director minutes year rating", "Farm": "owner cows fields tractors barns",
    "Wallet": "owner coins notes cards color", "Airport": "code city gates runways country",
    "Chair": "color legs price material height", "Bicycle": "brand gears color weight price",
    "Castle": "name towers year king walls", "Coffee": "name origin price roast strength",
    "Printer": "brand model pages ink price", "Order": "number customer items total date",
    "Player": "name team goals age position", "Ship": "name captain length speed flag",
    "Flower": "name color height petals season", "Kitchen": "area oven sink fridge table",
    "Sensor": "name unit value minimum maximum", "Server": "host port memory disks owner",
    "Message": "sender receiver subject text date", "Bottle": "volume color material label price",
    "Library": "name books members street city", "Guitar": "brand strings color price year",
    "Store": "name street products owner sales", "Horse": "name age color speed owner",
    "Course": "title teacher hours price level", "Robot": "name battery arms speed task",
}  # fmt: skip
_SIZES = (2, 3)


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of traffic: a name, a description for people, and its distinct prompts in a fixed order."""

    name: str
    about: str
    prompts: tuple[str, ...]


def conversation(seed: int) -> Family:
    """Return stories and advice."""
    stories = [f"Write a short story about {hero} who {event}." for hero, event in product(_HEROES, _EVENTS)]
    advice = [f"How can I {goal} {circumstance}?" for goal, circumstance in product(_GOALS, _CIRCUMSTANCES)]
    return _family("conversation", "short stories and everyday advice", stories + advice, seed)


def boilerplate(seed: int) -> Family:
    """Return requests for small Python classes."""
    prompts = [
        f"Write a Python class named {thing} with the attributes {', '.join(chosen[:-1])} and {chosen[-1]}."
        for thing, attributes in _THINGS.items()
        for size in _SIZES
        for chosen in combinations(attributes.split(), size)
    ]
    return _family("boilerplate", "small Python classes", prompts, seed)


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
