"""The rounds an engine runs on its device, one for each shape of a step, captured where that can be done.

Made once for the whole deployment: called by `device.rounds`, warmed before serving.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial

import torch

from serving.engine.device.graphs import Captured
from serving.engine.device.models import DeviceModels
from serving.engine.device.program import CATCH_UP, Head, Known, RoundProgram
from serving.engine.device.wire import FRESH, LENGTH, SLOT

GAMMAS = (0, 1, 2, 3, 4, 6, 8, 12, 16)  # lengths programs are made for; a draft of another length runs the next one


@dataclass(frozen=True, slots=True)
class Sizes:
    """What fixes the shapes of buffers.

    `max_batch` requests at once, of at most `max_tokens` cached tokens in blocks of `block_tokens`, drafting at
    most `gamma_max` tokens; logits are `vocab` wide.
    """

    max_batch: int
    max_tokens: int
    block_tokens: int
    gamma_max: int
    vocab: int

    @property
    def table_width(self) -> int:
        """Blocks of the longest request."""
        return -(-self.max_tokens // self.block_tokens)

    @property
    def gammas(self) -> list[int]:
        """Draft lengths that programs are made for."""
        return sorted({*(gamma for gamma in GAMMAS if gamma < self.gamma_max), self.gamma_max})


class CapturedRound:
    """A round program with both of its halves ready to be begun; its draft once for each head that scores drafts."""

    def __init__(self, program: RoundProgram, capture: Callable[[Callable[[], None]], Captured]) -> None:
        self.program = program
        self._capture = capture
        self.drafts: dict[int, Captured] = {}  # by the place of the head
        self.verify = capture(program.verify)

    def draft(self, place: int, heads: Mapping[int, Head]) -> Captured:
        """Return the half that drafts with the head in a place, made now where it was never needed before."""
        if place not in self.drafts:
            for stale in self.drafts.keys() - heads.keys():
                del self.drafts[stale]  # it reads a head that has moved
            self.drafts[place] = self._capture(partial(self.program.draft, heads[place]))
        return self.drafts[place]


def buckets(max_batch: int) -> list[int]:
    """Return the batch sizes programs are made for: 1, 2, 4, then multiples of 8; others are padded."""
    sizes = [1, 2, 4, *range(8, max_batch, 8), max_batch]
    return sorted({size for size in sizes if size <= max_batch})


class Programs:
    """Makes programs and keeps them.

    Args:
        known: what the device knows of requests.
        maximal: use the maximal coupling.
        synthetic: see `RoundProgram`.
    """

    def __init__(
        self, models: DeviceModels, known: Known, sizes: Sizes, *, maximal: bool, synthetic: float | None
    ) -> None:  # fmt: skip
        self.sizes = sizes
        self._models = models
        self._known = known
        self._maximal = maximal
        self._synthetic = synthetic
        self._buckets = buckets(sizes.max_batch)
        self._made: dict[tuple[int, int, int], CapturedRound] = {}
        self._pool = torch.cuda.graph_pool_handle() if models.device.type == "cuda" else None
        self._laws: torch.Tensor | None = None
        if maximal and models.draft is not None:  # one place for all programs: they run one after the other
            shape = (sizes.max_batch * (sizes.gamma_max + 1), sizes.vocab)
            self._laws = torch.full(shape, -torch.inf, dtype=models.draft.head.weight.dtype, device=models.device)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._made)

    def get(self, batch: int, gamma: int, top_k: int) -> CapturedRound:
        """Return the program for a batch and a draft length, made now where it was never needed before."""
        size = next(item for item in self._buckets if item >= batch)
        length = next(item for item in self.sizes.gammas if item >= gamma)
        key = (size, length, top_k)
        if key not in self._made:
            self._made[key] = self._make(size, length, top_k)
        return self._made[key]

    def warm(self, top_k: int, batches: SequenceOf[int] = ()) -> None:
        """Make the programs of these batch sizes, or of all, largest first: so that nobody waits for them later.

        Drafts are made for every head there is a place for, as a vocabulary may be published at any time.
        """
        wanted = {next(item for item in self._buckets if item >= batch) for batch in batches} or set(self._buckets)
        gammas = self.sizes.gammas if self._models.draft is not None else [0]
        for size in sorted(wanted, reverse=True):
            for gamma in reversed(gammas):
                made = self.get(size, gamma, top_k)
                for place in self._models.heads if gamma else ():
                    made.draft(place, self._models.heads)

    def _make(self, size: int, gamma: int, top_k: int) -> CapturedRound:
        sizes, device = self.sizes, self._models.device
        made = RoundProgram(
            self._models.target, self._models.draft, self._known, batch=size, gamma=gamma, width=sizes.table_width,
            block_tokens=sizes.block_tokens, vocab=sizes.vocab, top_k=top_k, laws=self._laws if gamma else None,
            maximal=self._maximal, synthetic=self._synthetic,
        )  # fmt: skip
        # Whatever a capture runs, it runs for nobody.
        columns = torch.tensor([1, CATCH_UP, sizes.max_batch], dtype=torch.int32).to(device)
        made.input[:, [FRESH, LENGTH, SLOT]] = columns
        return CapturedRound(made, lambda run: Captured(run, device, self._pool))
