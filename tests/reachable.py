"""What can be reached from an object: for tests that nothing is remembered."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import FunctionType, ModuleType


def names_within(root: object) -> Iterator[str]:
    """Every text that can be reached from an object."""
    seen, waiting = {id(root)}, [root]
    while waiting:
        for found in gc.get_referents(waiting.pop()):
            if id(found) in seen or isinstance(found, (ModuleType, type, FunctionType)):
                continue
            seen.add(id(found))
            if isinstance(found, str):
                yield found
            else:
                waiting.append(found)
