"""Call the C draft loop: what a draft model does in a round, from reading what it lacks to the last token it draws.

Draws are those of `kernels.sampling.draw` with the noise of `kernels.noise`, for rows that are greedy or have a
temperature and nothing else.  Nothing here copies a weight or a cache, and what does not change from round to round
is checked and laid out once: a round is short, and Python's share of it counts.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from kernels.cpu.forward import Layers, threads_for
from kernels.cpu.library import load
from kernels.cpu.packing import PackedWeight
from kernels.cpu.structures import INT, DraftingStruct, ModelStruct, ScorerStruct, format_of, matrix_of, pointers
from kernels.noise import Purpose

_FLOAT_TYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request's round: read `tokens`, the first at position `start`, and draft `gamma` tokens after them.

    `blocks` are the cache's, in the order of positions.  A request of gamma 0 only reads.  Temperature 0 is greedy;
    a seed is 64 bits.
    """

    blocks: list[int]
    start: int
    tokens: list[int]
    gamma: int
    temperature: float
    seed: int

    @property
    def end(self) -> int:
        """Positions that are read: all but that of the token drafted last."""
        return self.start + len(self.tokens) + max(0, self.gamma - 1)


@dataclass(frozen=True, slots=True)
class Drafted:
    """What came of one request's round: tokens, and their natural log-probs at temperature 1 over what is scored.

    `totals` are the log-sum-exps of the logits, not finite where any logit is no number: one a drafted token, and
    one where the request only read.
    """

    tokens: list[int]
    logprobs: list[float]
    totals: list[float]


class Scorer:
    """Embedding and head of a draft model, ready for the C code.

    Args:
        embedding: float32 or bfloat16; states and logits are rounded to its type, as such a model's are.
        token_ids: the tokens the head's outputs score, ascending; None where output i scores token i.
        width: where token_ids is None, only the first so many tokens may be drafted.

    Shapes: embedding [vocabulary, hidden]; token_ids [head.outputs] int64.

    Raises:
        ValueError: they do not fit each other.
    """

    def __init__(self, embedding: torch.Tensor, head: PackedWeight, token_ids: torch.Tensor | None, width: int) -> None:
        columns = min(head.outputs, width) if token_ids is None else len(token_ids)
        end = columns if token_ids is None else int(token_ids[-1]) + 1
        fits = embedding.shape[1] == head.inputs and 0 < end <= len(embedding)
        if token_ids is not None:
            fits &= token_ids.dtype == torch.int64 and token_ids.is_contiguous() and len(token_ids) == head.outputs
        if not (fits and embedding.dtype in _FLOAT_TYPES and embedding.is_contiguous()):
            raise ValueError(
                f"embedding {list(embedding.shape)} in {embedding.dtype}, head [{head.outputs}, {head.inputs}] and "
                f"{columns} tokens, the last of them {end - 1}, do not fit each other"
            )
        self.embedding, self.head, self.width = embedding, head, width
        self._token_ids = token_ids  # kept alive for the structure
        self.macs = head.outputs * head.inputs
        self.structure = ScorerStruct(
            matrix_of(head), embedding.data_ptr(), None if token_ids is None else token_ids.data_ptr(),
            format_of(embedding), columns, len(embedding),
        )  # fmt: skip


class Drafter:
    """A draft model bound to its caches.

    Args:
        keys: a layer each; values alike.
        cos: of the rotary embedding; `sin` alike, its first half negated.

    Shapes: keys and values [slots, kv_heads, dim]; cos and sin [positions, dim] float32.

    Raises:
        ValueError: they do not fit each other.
    """

    def __init__(
        self, layers: Layers, scorer: Scorer, keys: list[torch.Tensor], values: list[torch.Tensor], block_tokens: int,
        cos: torch.Tensor, sin: torch.Tensor,
    ) -> None:  # fmt: skip
        _check(layers.structure, scorer, keys, values, cos, sin)
        self.scorer, self.keys, self.positions = scorer, keys, len(cos)
        self._layers = layers
        self._kept = (values, cos, sin)  # what is pointed to below
        self._caches = pointers(keys), pointers(values)
        self._tables = cos.data_ptr(), sin.data_ptr()
        self._blocks, self._block_tokens = len(keys[0]) // block_tokens, block_tokens
        self._format = format_of(keys[0])

    def draft(self, asks: list[Ask], purpose: Purpose = Purpose.SAMPLE) -> list[Drafted]:
        """Read what is missing, write the caches, and draft.

        Raises:
            ValueError: no request, no token or too many for the positions known, or a token that does not exist.
            IndexError: a request's blocks do not hold what is read, or do not exist.
        """
        count, longest = len(asks), max((ask.end for ask in asks), default=0)
        if not count or not all(ask.tokens and ask.start >= 0 for ask in asks) or longest > self.positions:
            raise ValueError(
                f"{count} requests, {longest} positions: each reads a token, up to {self.positions} in all"
            )
        tokens = [token for ask in asks for token in ask.tokens]
        most, read = max(1, max(ask.gamma for ask in asks)), len(tokens)
        width = -(-longest // self._block_tokens)
        ints, longs = INT * count, ctypes.c_int64 * (count * most)
        floats = ctypes.c_float * (count * most)
        drafted, logprobs, totals = longs(), floats(), floats()
        given = (
            (ctypes.c_int64 * read)(*tokens), ints(*[ask.start for ask in asks]),
            ints(*[len(ask.tokens) for ask in asks]), ints(*[ask.gamma for ask in asks]),
            (INT * (count * width))(*[block for ask in asks for block in self._row(ask, width)]),
            (ctypes.c_float * count)(*[ask.temperature for ask in asks]),
            (ctypes.c_uint64 * count)(*[ask.seed for ask in asks]),
        )  # fmt: skip
        arrays = [*given, *self._tables, *self._caches, drafted, logprobs, totals]
        structure = DraftingStruct(
            *[item if isinstance(item, int) else ctypes.addressof(item) for item in arrays], count, width, most, read,
            longest, self._blocks, self._block_tokens, self._format, int(purpose),
        )  # fmt: skip
        self._call(structure)
        rows = [(i * most, i * most + ask.gamma, i * most + max(1, ask.gamma)) for i, ask in enumerate(asks)]
        return [Drafted(drafted[begin:end], logprobs[begin:end], totals[begin:last]) for begin, end, last in rows]

    def _row(self, ask: Ask, width: int) -> list[int]:
        used = -(-ask.end // self._block_tokens)
        if len(ask.blocks) < used:
            raise IndexError(f"{len(ask.blocks)} blocks do not hold {ask.end} tokens")
        return ask.blocks[:used] + [0] * (width - used)

    def _call(self, structure: DraftingStruct) -> None:
        scored = structure.requests * self.scorer.macs
        first, later = (
            threads_for(tokens * self._layers.macs + scored) for tokens in (structure.read, structure.requests)
        )
        library = load()
        given = [ctypes.byref(item) for item in (self._layers.structure, self.scorer.structure, structure)]
        memory = torch.empty(library.draft_scratch(*given, max(first, later)), dtype=torch.uint8)
        if not library.draft(*given, memory.data_ptr(), first, later):
            known = f"one of the draft's {len(self.scorer.embedding)}"
            raise IndexError(f"a token is not {known}, or a block not one of the cache's {self._blocks}")


def _check(
    model: ModelStruct, scorer: Scorer, keys: list[torch.Tensor], values: list[torch.Tensor], cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:  # fmt: skip
    """Refuse what the C code would read as something else."""
    slots, kind = len(keys[0]), keys[0].dtype
    if not (
        scorer.head.inputs == model.hidden and len(keys) == len(values) == model.num_layers
        and kind in _FLOAT_TYPES
        and all(item.dtype == kind and item.is_contiguous() and item.shape == (slots, model.kv_heads, model.dim)
                for item in (*keys, *values))
        and all(item.dtype == torch.float32 and item.is_contiguous() and item.shape == (len(cos), model.dim)
                for item in (cos, sin))
    ):  # fmt: skip
        raise ValueError("caches or tables do not have the shapes and types that Drafter documents")
