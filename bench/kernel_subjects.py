"""What `bench.kernels` measures: inputs, floors, references, peers and gates of every kernel.

Each subject keeps several copies of its inputs, so that consecutive runs do not find them in the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import kernel_peers as peers
from bench.kernel_subjects_learning import losses, merges
from bench.subject import Gate, Subject
from kernels import dispatch
from kernels.reference import attention as attention_reference
from kernels.reference import layers as layers_reference
from kernels.sampling import RowParams

BF16 = torch.bfloat16
VOCABS = (49152, 128256, 151936)
GAMMA = 4
TOP_K = 32
_LARGE_BYTES = 50e6


def subjects(only: tuple[str, ...], device: torch.device) -> Iterator[Subject]:
    """Yield the subjects of the groups that are asked for, the most telling shapes first."""
    builders = {
        "sampler": _samplers, "cuts": _cuts, "attention": _attentions, "layers": _layers, "loss": losses,
        "merge": merges,
    }  # fmt: skip
    for name in only:
        yield from builders[name](device)


# -- the sampler ---------------------------------------------------------------------------------


def _params(rows: int, device: torch.device, *, top_p: float = 1.0, share: float = 0.5) -> RowParams:
    """Half of the requests greedy, as they come; `top_p` for the rest."""
    sampled = torch.arange(rows, device=device) // (GAMMA + 1) % 2 < 2 * share
    return RowParams(
        torch.where(sampled, 0.8, 0.0).float(), torch.full((rows,), top_p, device=device),
        torch.zeros(rows, dtype=torch.long, device=device), torch.arange(rows, device=device) // (GAMMA + 1) + 7,
        torch.arange(rows, device=device) + 100, None,
    )  # fmt: skip


def _samplers(device: torch.device) -> Iterator[Subject]:
    for vocab in VOCABS:
        for batch in (1, 8, 64, 256):
            for coupling, top_k in (("gumbel", TOP_K), ("gumbel", 0), ("maximal", TOP_K)):
                yield _sampler(device, vocab, batch, coupling, top_k)


def _sampler(device: torch.device, vocab: int, batch: int, coupling: str, top_k: int) -> Subject:
    rows = batch * (GAMMA + 1)
    read = rows * vocab * 2 * (2 if coupling == "maximal" else 1)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * (GAMMA + 1)
    params = _params(rows, device)

    def make(number: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator(device=device).manual_seed(number)
        logits = 3 * torch.randn(rows, vocab, generator=generator, device=device)
        drafted = logits.argmax(-1).int()
        drafted[GAMMA :: GAMMA + 1] = -1
        draft = (logits + torch.randn(rows, vocab, generator=generator, device=device)).to(BF16)
        return logits.to(BF16), drafted, draft if coupling == "maximal" else draft[:0]

    def call(made: tuple[torch.Tensor, ...]) -> object:
        return dispatch.verify(
            made[0], params, starts, made[1], coupling=coupling, top_k=top_k,
            draft_logits=made[2] if coupling == "maximal" else None,
        )  # fmt: skip

    shape = {"vocab": vocab, "batch": batch, "gamma": GAMMA, "coupling": coupling, "top_k": top_k}
    large = read >= _LARGE_BYTES
    name, figure, bound = ("70 % of bandwidth", "fraction_of_floor", 0.7) if large else ("15 microseconds", "ms", 0.015)
    if not top_k:  # what recording costs: this row without it is what the one with it is compared with
        gate = None
    elif coupling == "gumbel" and large:
        gate = Gate("70 % of bandwidth", "fraction_of_floor", 0.7, True, shape | {"top_k": 0})
    else:
        gate = Gate(name, figure, bound, large)
    rivals: dict[str, Callable[[Any], object]] = {}
    if coupling == "gumbel":
        rivals = {"eager": lambda made: peers.eager_sampler(made[0], made[1], top_k)}
        if batch in (8, 64):
            rivals["torch.compile"] = lambda made: peers.compiled_sampler(made[0], made[1], top_k)
    return Subject(
        "verify sampler", shape, read, make, call, read, launches=3, rivals=rivals, gate=gate,
    )  # fmt: skip


def _cuts(device: torch.device) -> Iterator[Subject]:
    for vocab in VOCABS:
        for batch in (1, 8, 64):
            rows = batch * (GAMMA + 1)
            params = _params(rows, device, top_p=0.9, share=1.0)

            def make(number: int, rows: int = rows, vocab: int = vocab) -> torch.Tensor:
                generator = torch.Generator(device=device).manual_seed(number)
                return (3 * torch.randn(rows, vocab, generator=generator, device=device)).to(BF16)

            yield Subject(
                "cuts", {"vocab": vocab, "batch": batch, "gamma": GAMMA, "top_p": 0.9}, rows * vocab * 2, make,
                lambda logits, params=params: dispatch.cut_borders(logits, params), rows * vocab * 2,  # type: ignore[misc]
                rivals={"sort": peers.sorted_nucleus},
            )  # fmt: skip


# -- attention and layers ------------------------------------------------------------------------


def _attentions(device: torch.device) -> Iterator[Subject]:
    """Heads as an 8B model has them: 32 of 128, 8 of them keys."""
    for batch, context in ((1, 1024), (1, 16384), (8, 4096), (32, 4096), (64, 1024), (64, 4096)):
        for queries in (1, GAMMA + 1):
            yield _attention(device, batch, context, queries)


def _attention(device: torch.device, batch: int, context: int, queries: int) -> Subject:
    heads, kv_heads, dim, block = 32, 8, 128, 32
    width = context // block
    read = 2 * batch * context * kv_heads * dim * 2
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * queries

    def make(number: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator(device=device).manual_seed(number)
        shape = (batch * width, block, kv_heads, dim)
        keys, values = (torch.randn(shape, generator=generator, device=device).to(BF16) for _ in range(2))
        query = torch.randn(batch * queries, heads, dim, generator=generator, device=device).to(BF16)
        tables = torch.randperm(batch * width, generator=generator, device=device).int().view(batch, width)
        return query, keys, values, tables

    def call(made: tuple[torch.Tensor, ...]) -> object:
        return dispatch.paged_attention(*made, starts, lengths, dim**-0.5, max_query=queries)

    def gathered(made: tuple[torch.Tensor, ...]) -> object:
        """SDPA on keys and values that lie side by side already: what gathering costs is left out."""
        query, keys, values, _ = made
        q = query.view(batch, queries, heads, dim).transpose(1, 2)
        k, v = (item.view(batch, context, kv_heads, dim).transpose(1, 2) for item in (keys, values))
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    shape = {
        "batch": batch, "context": context, "queries": queries, "heads": heads, "kv_heads": kv_heads, "head_size": dim,
    }  # fmt: skip
    decode = shape | {"queries": 1}
    gate = None
    if queries > 1:
        gate = Gate("1.1 x decoding", "vs_row", 1.1, False, decode)
    elif context >= 4096 and batch * kv_heads >= 32:
        gate = Gate("80 % of bandwidth", "fraction_of_floor", 0.8, True)
    return Subject(
        "attention", shape, read, make, call, read, launches=1,
        flops=4 * batch * queries * context * heads * dim,
        against=lambda made: attention_reference.paged_attention(*made, starts, lengths, dim**-0.5, max_query=queries),
        rivals={
            "sdpa, gathered before": gathered,
            "flex attention, gathered before": lambda made: peers.flex(made, batch, context, queries, heads, kv_heads),
            "varlen attention, gathered before": lambda made: peers.varlen(made, starts, context, queries, kv_heads),
        }, gate=gate,
    )  # fmt: skip


def _layers(device: torch.device) -> Iterator[Subject]:
    for tokens in (1, 8, 64, 320):
        yield from _pointwise(device, tokens, hidden=4096, ffn=14336)


def _pointwise(device: torch.device, tokens: int, hidden: int, ffn: int) -> Iterator[Subject]:
    weight = torch.ones(hidden, dtype=BF16, device=device)

    def rows(width: int) -> Callable[[int], torch.Tensor]:
        return lambda number: torch.full((tokens, width), 0.1 + number, dtype=BF16, device=device)

    def pair(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return rows(hidden)(number), rows(hidden)(number)

    norm_bytes, silu_bytes = 4 * tokens * hidden * 2, 3 * tokens * ffn * 2
    yield Subject(
        "add-norm", {"tokens": tokens, "hidden": hidden}, norm_bytes, pair,
        lambda made: dispatch.add_rms_norm(made[0], made[1], weight, 1e-5), norm_bytes,
        against=lambda made: layers_reference.add_rms_norm(made[0], made[1], weight, 1e-5),
        rivals={"torch.compile": lambda made: peers.compiled_norm(made[0], made[1], weight)},
    )  # fmt: skip
    yield Subject(
        "silu-mul", {"tokens": tokens, "width": ffn}, silu_bytes, rows(2 * ffn), dispatch.silu_mul, silu_bytes,
        against=layers_reference.silu_mul, rivals={"torch.compile": peers.compiled_silu},
    )  # fmt: skip
    yield _rope(device, tokens)


def _rope(device: torch.device, tokens: int) -> Subject:
    heads, kv_heads, dim, block = 32, 8, 128, 32
    blocks = -(-tokens // block) + 1
    cos, sin = (torch.rand(4096, dim, device=device).to(BF16) for _ in range(2))
    positions = torch.arange(tokens, device=device)

    def make(number: int) -> tuple[torch.Tensor, ...]:
        qkv = torch.full((tokens, (heads + 2 * kv_heads) * dim), 0.1 + number, dtype=BF16, device=device)
        keys, values = (torch.zeros(blocks, block, kv_heads, dim, dtype=BF16, device=device) for _ in range(2))
        return qkv, keys, values

    def run(form: Any, made: tuple[torch.Tensor, ...]) -> object:
        return form(made[0], cos, sin, positions, positions, made[1], made[2], heads=heads)

    size = 2 * tokens * (heads + 2 * kv_heads) * dim * 2
    return Subject(
        "rope-and-write", {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_size": dim}, size, make,
        lambda made: run(dispatch.rope_and_write, made), size,
        against=lambda made: run(layers_reference.rope_and_write, made),
    )  # fmt: skip
