"""Run a model over a ragged batch on its paged cache: lean where it can, else through transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from adapter.contracts import SettingsError
from adapter.logs import get_logger
from kernels.packed_linear import can_compile, pack_linears
from serving.engine.attention import IMPLEMENTATION, KVPool, Row, build_layout
from serving.engine.device.llama import DeviceLlama, places_of
from serving.engine.llama import ONLY_LEAN, LeanLlama, lean_reason
from serving.engine.work import Work

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """Logits [rows, vocab] float32 of the scored rows.

    `broken` are the works, by number, whose rows were only looked at and are no numbers.
    """

    logits: torch.Tensor
    broken: tuple[int, ...] = ()


class Forwards:
    """Which forward each model runs: its own lean one, or transformers'.

    Args:
        lean: run models lean where their architecture is known; False leaves all to transformers.
        pack: keep a second copy of linear weights where that is faster.
        int8: let the products of bfloat16 models be inexact; for drafts only.
        compiled: pack for our own kernels, where they can be compiled.
    """

    def __init__(self, *, lean: bool = True, pack: bool = True, int8: bool = False, compiled: bool = True) -> None:
        self._lean = lean
        self._pack = pack
        self._int8 = int8
        self.compiled = pack and compiled and can_compile()
        self._built: WeakKeyDictionary[Any, LeanLlama | None] = WeakKeyDictionary()

    def prepare(self, model: Any, like: Any = None) -> None:
        """Make a model ready to run; again after its weights were written in place.

        What it shares with `like`, a prepared model of the same shape, is not packed twice.
        """
        lean = self._built[model] if model in self._built else self._build(model)
        if model.config._attn_implementation != IMPLEMENTATION:
            model.set_attn_implementation(IMPLEMENTATION)
        if self._pack:
            if lean is not None:
                lean.pack(int8=self._int8, compiled=self.compiled)
            only = None if lean is None else ("lm_head",)
            pack_linears(model, like, only=only, int8=self._int8, compiled=self.compiled)
        self._built[model] = lean

    def of(self, model: Any) -> LeanLlama | None:
        """Return a model's lean forward; None runs transformers'.  A model not seen before is prepared."""
        if model not in self._built:
            self.prepare(model)
        return self._built[model]

    def _build(self, model: Any) -> LeanLlama | None:
        if not self._lean:
            return None
        reason = lean_reason(model)
        if reason is not None:
            log.info("generic_forward", reason=reason)
            return None
        return LeanLlama(model)


class ModelRunner:
    """A model bound to a KV pool.  Models of one shape may share the pool: see `use`.

    Args:
        forwards: shared by runners that run the same models; None runs everything through transformers.
        positions: run the forward that is made for devices, over so many positions; 0 runs the CPU's.
    """

    def __init__(self, model: Any, pool: KVPool, forwards: Forwards | None = None, *, positions: int = 0) -> None:
        self.pool = pool
        self.model = model
        self.forwards = forwards or Forwards(lean=False, pack=False)
        self.positions = positions
        self._on_device: WeakKeyDictionary[Any, DeviceLlama] = WeakKeyDictionary()  # what it runs does not hold the key
        self.head: Callable[[torch.Tensor], torch.Tensor] | None = None  # scores instead of the model's own, where set
        self.use(model)

    def use(self, model: Any) -> None:
        """Run this model from now on, on the keys and values that are there."""
        self.forwards.of(model)
        self.model = model

    def forward(self, work: list[Work], model: Any = None) -> torch.Tensor:
        """Process the new tokens of every request and return the logits asked for.

        Shapes: result [sum of num_logits, vocab] float32, in the order of `work`.
        """
        return self.run(work, model).logits

    def on_device(self, model: Any = None) -> DeviceLlama:
        """Return the forward of a model, by default this one's, that is made for devices.

        Raises:
            SettingsError: it cannot be run so.
        """
        used = self.model if model is None else model
        if used not in self._on_device:
            lean = self.forwards.of(used)
            if lean is None:
                raise SettingsError(f"{lean_reason(used) or 'engine.lean is false'}; {ONLY_LEAN}")
            self._on_device[used] = DeviceLlama(lean, self.pool, self.positions)
        return self._on_device[used]

    @torch.inference_mode()
    def run(self, work: list[Work], model: Any = None, *, looked_at: Collection[int] = ()) -> TargetOutput:
        """Process the new tokens of every request; rows of the result follow the order of `work`.

        The wanted rows of the works numbered in `looked_at` are not scored: all that is said of them is
        whether they are numbers.
        """
        if not work:
            return TargetOutput(torch.empty(0, 0))
        used = self.model if model is None else model
        states = self._states_on_device(work, used) if self.positions else self._states(work, used)
        states, broken = _apart(states, work, looked_at)
        if not len(states):
            return TargetOutput(torch.empty(0, 0), broken)
        head = self.head if self.head is not None else used.lm_head
        logits = head(states).float()
        return TargetOutput(logits.cpu() if self.positions else logits, broken)

    def _states(self, work: list[Work], model: Any) -> torch.Tensor:
        """Return the normed states of the wanted rows, in the order of `work`.  Shapes: [rows, hidden_size]."""
        order = sorted(range(len(work)), key=lambda i: len(work[i].token_ids))
        rows = [Row(work[i].block_table, work[i].start, len(work[i].token_ids)) for i in order]
        tokens = torch.tensor([token for i in order for token in work[i].token_ids])
        wanted = _wanted(work, order)
        lean = self.forwards.of(model)
        if lean is not None:
            return lean.run(tokens, self.pool, rows, wanted)
        layout = build_layout(rows, self.pool.block_tokens, self.pool.dtype, self.pool.shared)
        states: torch.Tensor = model.model(
            input_ids=tokens[None], position_ids=layout.positions[None], use_cache=False, paged=(self.pool, layout)
        ).last_hidden_state[0]
        return states if wanted is None else states[wanted]

    def _states_on_device(self, work: list[Work], model: Any) -> torch.Tensor:
        """Return the same where the weights are; nothing here waits for the device."""
        layers = self.on_device(model)
        device = self.pool.keys[0].device
        tokens = torch.tensor([token for item in work for token in item.token_ids], device=device)
        wanted = _wanted(work, list(range(len(work))))
        return layers.states(
            tokens, places_of(work, self.pool.block_tokens, device), None if wanted is None else wanted.to(device)
        )


def _apart(
    states: torch.Tensor, work: list[Work], looked_at: Collection[int]
) -> tuple[torch.Tensor, tuple[int, ...]]:  # fmt: skip
    """Take wanted rows apart: return the states to score, and which of the works looked at have no numbers there."""
    if not looked_at:
        return states, ()
    scored: list[int] = []
    seen: list[int] = []
    owners: list[int] = []
    row = 0
    for number, item in enumerate(work):
        rows = range(row, row + item.num_logits)
        (seen if number in looked_at else scored).extend(rows)
        owners += [number] * len(rows) if number in looked_at else []
        row += item.num_logits
    sound = torch.isfinite(states[torch.tensor(seen, device=states.device)]).all(dim=1).tolist()
    broken = {number for number, fine in zip(owners, sound, strict=True) if not fine}
    kept = states[torch.tensor(scored, dtype=torch.long, device=states.device)]
    return kept, tuple(sorted(broken))


def _wanted(work: list[Work], order: list[int]) -> torch.Tensor | None:
    """Flat indices of the wanted rows, in the order of `work`; None when that is all of them as they lie."""
    ends, total = {}, 0
    for i in order:
        total += len(work[i].token_ids)
        ends[i] = total
    indices = [row for i, item in enumerate(work) for row in range(ends[i] - item.num_logits, ends[i])]
    return None if indices == list(range(total)) else torch.tensor(indices, dtype=torch.long)
