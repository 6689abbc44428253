"""The two models as the device's programs run them: weights at addresses that never change.

A new draft version, or a new draft vocabulary, is copied over the old one between two rounds, in the order of
the device's work: captured graphs stay valid.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from adapter.contracts import SettingsError
from serving.engine.device.llama import DeviceLlama
from serving.engine.device.program import Head, Model
from serving.engine.llama import ONLY_LEAN, LeanLlama, lean_reason
from serving.engine.proposers.draft import DraftProposer
from serving.engine.runner import ModelRunner
from serving.engine.sequence import Sequence
from serving.engine.trimmed_head import TrimmedHead
from serving.engine.work import Work


class DeviceModels:
    """Target and draft for one set of programs.

    Args:
        proposer: the draft model's; None where nothing drafts.
        positions: how many positions a token may be at.
        head_rows: the most tokens a trimmed vocabulary is expected to have; one that has more moves to a new place,
            and programs for that are made when it is first drafted with.
    """

    def __init__(
        self, target: ModelRunner, proposer: DraftProposer | None, positions: int, *, head_rows: int = 0
    ) -> None:  # fmt: skip
        self.device: torch.device = target.model.lm_head.weight.device
        self.target = Model(target.on_device(), Head(target.model.lm_head.weight))
        self.num_blocks = target.pool.num_blocks
        self.draft: Model | None = None
        self._proposer = proposer
        self._loaded: tuple[int, int] | None = None  # version and model whose weights lie in the fixed place
        self._trimmed: TrimmedHead | None = None
        self._small: Head | None = None  # where trimmed heads lie
        self._places = 0  # how often a place for trimmed heads was made
        if proposer is None:
            return
        runner = proposer.runner
        self._live = LeanLlama(_own_layers(runner.model))
        self._layers = DeviceLlama(self._live, runner.pool, positions)
        self._full = Head(runner.model.lm_head.weight)
        self.draft = Model(self._layers, self._full)
        if head_rows:  # now, so that programs for it are made before anybody waits, whatever vocabulary is served first
            self._make_place(head_rows)

    @property
    def head_place(self) -> int:
        """Which head the draft's programs read: 0 the full one, else the number of the place for trimmed ones."""
        return 0 if self._trimmed is None else self._places

    @property
    def heads(self) -> dict[int, Head]:
        """The heads that drafts may be scored with, by place."""
        if self._proposer is None:
            return {}
        return {0: self._full} | ({} if self._small is None else {self._places: self._small})

    @torch.inference_mode()
    def follow(self) -> None:
        """Take over the draft version and the vocabulary that are in force."""
        if self._proposer is None:
            return
        runner = self._proposer.runner
        key = (self._proposer.version, id(runner.model))
        if key != self._loaded:
            _copy_layers(self._live, _lean(runner))
            self._loaded = key
        head = runner.head if isinstance(runner.head, TrimmedHead) else None
        if head is not self._trimmed:
            self._trimmed = head
            self.draft = Model(self._layers, self._full if head is None else self._fitted(head))

    def backlog(self, request: Sequence, count: int) -> Work:
        """Return the forward that reads `count` tokens the draft model lacks, and note that they are read."""
        start = request.num_draft_kv
        request.num_draft_kv = start + count
        tokens = request.tokens[start : start + count]
        known = 0 if self._proposer is None else int(self._proposer.runner.model.config.vocab_size)
        return Work(request.block_table, start, [min(token, known - 1) for token in tokens], 0)

    def read_with_draft(self, work: list[Work]) -> None:
        """Let the draft model read."""
        if self._proposer is not None:
            self._proposer.runner.run(work)

    def _fitted(self, head: TrimmedHead) -> Head:
        """Copy a trimmed head into the fixed place for one, or into a new one where that is too small."""
        small = self._small
        if small is None or len(small.weight) < head.size:
            small = self._make_place(head.size)
        if small.bias is None or small.token_ids is None:
            raise RuntimeError("a trimmed head has a bias and token ids")
        small.weight[: head.size].copy_(head.weight)
        small.bias.fill_(-torch.inf)
        small.bias[: head.size] = 0.0 if head.bias is None else head.bias
        small.token_ids.copy_(head.token_ids[-1].expand(len(small.token_ids)))
        small.token_ids[: head.size].copy_(head.token_ids)
        return small

    def _make_place(self, rows: int) -> Head:
        """Make a place for trimmed heads of so many rows; until one lies there it scores every token alike."""
        size = -(-rows // 64) * 64
        weight = self._full.weight.new_zeros(size, self._full.weight.shape[1])
        self._small = Head(weight, weight.new_zeros(size), torch.zeros(size, dtype=torch.long, device=self.device))
        self._places += 1
        return self._small


def _lean(runner: ModelRunner) -> LeanLlama:
    lean = runner.forwards.of(runner.model)
    if lean is None:
        raise SettingsError(f"{lean_reason(runner.model) or 'engine.lean is false'}; {ONLY_LEAN}")
    return lean


def _own_layers(model: Any) -> Any:
    """Copy a model's linear layers; it shares everything else."""
    own = {id(module.weight) for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)}
    shared = {id(item): item for item in model.parameters() if id(item) not in own}
    return copy.deepcopy(model, shared)


def _copy_layers(into: LeanLlama, source: LeanLlama) -> None:
    for mine, theirs in zip(into.layers, source.layers, strict=True):
        for name in ("qkv", "output", "gate_up", "down"):
            getattr(mine, name).weight.copy_(getattr(theirs, name).weight)
