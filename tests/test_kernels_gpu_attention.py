"""Paged attention: the definition in float64 loops, poisoned memory, page edges, mixed batches, and bits that stay."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.gpu.attention import paged_attention
from kernels.gpu.attention_plan import plan
from kernels.reference.attention import paged_attention as reference

pytestmark = pytest.mark.slow  # in the interpreter: half a minute of CPU

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NOWHERE = 10**8  # a block number that no cache has
SCALING = 0.3
# Up to 9 queries a request, a whole prompt, nothing cached, nothing new, and both sides of a page's end.
RAGGED = [(33, 5), (0, 0), (16, 1), (9, 9), (40, 0), (1, 1), (15, 2), (17, 4), (0, 0)]


@dataclass(frozen=True)
class Batch:
    """Arguments of a call: what is unused is NaN, and table entries beyond a length name no block.

    `sequences` holds each request's own keys and values [length, kv_heads, dim].
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    sequences: list[tuple[torch.Tensor, torch.Tensor]]
    longest: int

    def run(self, form=paged_attention, **more) -> torch.Tensor:
        """Call one of the forms."""
        more.setdefault("max_query", max(1, self.longest))
        return form(
            self.query, self.keys, self.values, self.tables, self.starts, self.lengths, SCALING, **more
        )  # fmt: skip


def _batch(
    requests, *, group=1, kv_heads=1, dim=16, block_tokens=16, dtype=torch.float32, padding=0, seed=0, poison=torch.nan
) -> Batch:  # fmt: skip
    """Make a batch of (length, queries); its blocks are scattered and the last rows of the query are padding."""
    generator = torch.Generator().manual_seed(seed)
    used = [-(-length // block_tokens) for length, _ in requests]
    blocks = sum(used) + 3
    cache = torch.full((2, blocks, block_tokens, kv_heads, dim), poison, dtype=dtype)
    tables = torch.full((len(requests), max(used) + 2), NOWHERE, dtype=torch.int32)
    free = torch.randperm(blocks, generator=generator).tolist()
    sequences = []
    for (length, _), count, table in zip(requests, used, tables, strict=True):
        mine = torch.tensor([free.pop() for _ in range(count)], dtype=torch.long)
        table[:count] = mine
        own = torch.randn(2, length, kv_heads, dim, generator=generator).to(dtype)
        position = torch.arange(length)
        cache[:, mine[position // block_tokens], position % block_tokens] = own
        sequences.append((own[0], own[1]))
    counts = [count for _, count in requests]
    query = torch.randn(sum(counts), group * kv_heads, dim, generator=generator).to(dtype)
    query = torch.cat((query, torch.full((padding, *query.shape[1:]), torch.nan, dtype=dtype)))
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    lengths = torch.tensor([length for length, _ in requests], dtype=torch.int32)
    tensors = [item.to(DEVICE) for item in (query, *cache, tables, starts, lengths)]
    return Batch(*tensors, sequences, max(counts))


def _naive(batch: Batch) -> torch.Tensor:
    """The definition, one query and one head at a time, in float64; without the padding."""
    rows = []
    starts = batch.starts.tolist()
    for number, (keys, values) in enumerate(batch.sequences):
        count = starts[number + 1] - starts[number]
        for index in range(count):
            query = batch.query[starts[number] + index].cpu().double()
            seen = len(keys) - count + index + 1
            group = len(query) // keys.shape[1]
            for head, row in enumerate(query):
                weights = torch.softmax(SCALING * keys[:seen, head // group].double() @ row, 0)
                rows.append(weights @ values[:seen, head // group].double())
    return torch.stack(rows).view(-1, *batch.query.shape[1:])


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got = got[: len(wanted)].cpu().double()
    return float((got - wanted).norm() / wanted.norm())


def _poisoned(monkeypatch) -> None:
    """Fill every new buffer with NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *size, **more: empty(*size, **more).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda like, **more: empty_like(like, **more).fill_(torch.nan))


# -- the reference ---------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "kv_heads", "block_tokens"), [(1, 2, 16), (3, 3, 5), (8, 1, 32)])
def test_attention_reference_is_the_definition(group, kv_heads, block_tokens):
    """In float64 the reference is the loop over queries and heads to 1e-13, and zero in padding."""
    batch = _batch(
        RAGGED, group=group, kv_heads=kv_heads, block_tokens=block_tokens, dtype=torch.float64, padding=3
    )  # fmt: skip
    got = batch.run(reference)
    assert _error(got, _naive(batch)) < 1e-13
    assert (got[-3:] == 0).all()


def test_attention_reference_asks_the_device_nothing():
    """Over tensors without contents every operation of the reference knows its shape."""
    batch = _batch(RAGGED)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(getattr(batch, name)) for name in ("query", "keys", "values", "tables", "starts")]
        result = reference(*fake, mode.from_tensor(batch.lengths), SCALING, max_query=9)
    assert result.shape == batch.query.shape


# -- the numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "kv_heads", "dim", "block_tokens", "splits"),
    [(1, 2, 16, 16, 1), (3, 3, 64, 16, 3), (7, 2, 64, 32, 1), (8, 1, 128, 64, 3), (4, 2, 80, 16, 1), (5, 1, 24, 8, 2)],
)
def test_attention_is_the_definition(monkeypatch, group, kv_heads, dim, block_tokens, splits):
    """Ragged rows with any group, head size and page are the loop in float64 to 1e-6, whatever buffers held before."""
    batch = _batch(RAGGED, group=group, kv_heads=kv_heads, dim=dim, block_tokens=block_tokens, padding=2)
    _poisoned(monkeypatch)
    assert _error(batch.run(splits=splits), _naive(batch)) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_attention_rounds_once_in_16_bit(dtype, bound):
    """16-bit caches give what the loop gives on the same numbers, up to the rounding of weights and result."""
    batch = _batch(RAGGED, group=3, kv_heads=2, dim=64, dtype=dtype)
    got = batch.run()
    assert got.dtype == dtype
    assert _error(got, _naive(batch)) < bound


@pytest.mark.parametrize("block_tokens", [16, 32, 64])
def test_attention_at_the_edges_of_pages_and_tiles(block_tokens):
    """One token before, at and after the end of a page, of a tile of 64 and of a split, decoding and verifying."""
    edges = [edge + by for edge in (block_tokens, 64, 2 * block_tokens + 64, 256) for by in (-1, 0, 1)]
    batch = _batch(
        [(edge, 1 + number % 2 * 4) for number, edge in enumerate(edges)], group=2, block_tokens=block_tokens
    )  # fmt: skip
    assert _error(batch.run(splits=2), _naive(batch)) < 1e-6


@pytest.mark.parametrize("splits", [None, 1, 5])
def test_attention_of_one_long_and_many_short_requests(monkeypatch, splits):
    """A request of 1,500 tokens, cut into splits, and short ones, for which most splits are empty, are all right."""
    batch = _batch([(3, 1), (1500, 2), *[(number, 1) for number in range(1, 6)], (300, 3)], group=4, block_tokens=32)
    _poisoned(monkeypatch)
    assert _error(batch.run(splits=splits), _naive(batch)) < 1e-6


@pytest.mark.parametrize("group", [1, 7])
def test_attention_mixes_prefill_and_decoding(monkeypatch, group):
    """Chunks that start a prompt, go on with one and end in mid-tile mix with decoding rows and empty requests."""
    requests = [(5, 1), (150, 150), (0, 0), (70, 4), (300, 131), (0, 0), (40, 40), (260, 1), (20, 9), (9, 0)]
    batch = _batch(requests, group=group, padding=4)
    _poisoned(monkeypatch)
    assert _error(batch.run(splits=1), _naive(batch)) < 1e-6


def test_attention_splits_prefill_too(monkeypatch):
    """Tiles of a chunk whose cache is cut into splits, some of which its first queries do not see at all."""
    batch = _batch([(5, 1), (330, 90), (270, 1)], group=2)
    _poisoned(monkeypatch)
    assert _error(batch.run(splits=2), _naive(batch)) < 1e-6


def test_attention_of_a_single_prompt(monkeypatch):
    """One request alone, longer than a tile, needs no second launch and no neighbour."""
    batch = _batch([(200, 140)], group=2)
    _poisoned(monkeypatch)
    assert _error(batch.run(max_query=512), _naive(batch)) < 1e-6


def test_attention_prefill_equals_decoding():
    """Token by token, in chunks of verify rows, or as one prefill chunk: the same results to 1e-6."""
    whole = _batch([(150, 150)], group=3, kv_heads=2)
    wanted = whole.run()
    for step in (1, 5):
        for end in range(step, 151, 29 * step):
            part = replace(
                whole, query=whole.query[end - step : end], longest=step,
                starts=torch.tensor([0, step], dtype=torch.int32).to(DEVICE),
                lengths=torch.tensor([end], dtype=torch.int32).to(DEVICE),
            )  # fmt: skip
            assert _error(part.run(), wanted[end - step : end].cpu().double()) < 1e-6


# -- what must not matter --------------------------------------------------------------------


@pytest.mark.parametrize(("longest", "splits"), [(9, 2), (140, 1)])
def test_attention_reads_no_slot_beyond_the_length(longest, splits):
    """NaN or zeros in unused slots and pages, and table entries that name no block: not a bit of the result differs."""
    requests = [*RAGGED, (longest, longest)]
    results = [_batch(requests, group=3, poison=poison).run(splits=splits) for poison in (torch.nan, 0.0)]
    assert torch.isfinite(results[0]).all()
    assert torch.equal(*results)


def test_attention_leaves_padding_rows_alone(monkeypatch):
    """Rows past the last start are not written and NaN in them reaches no other row."""
    batch = _batch(RAGGED, group=3, padding=5)
    _poisoned(monkeypatch)
    got = batch.run(splits=2)
    assert torch.isfinite(got[:-5]).all()
    assert torch.isnan(got[-5:]).all()


@pytest.mark.parametrize(("longest", "splits"), [(9, 2), (140, 1)])
def test_attention_bits_do_not_depend_on_batch_mates(longest, splits):
    """Alone, in any order, among others, or padded: each request has the same bits at the same number of splits."""
    requests = [(300, 5), (17, longest if longest < 17 else 3), (longest + 30, longest), (64, 1)]
    batch = _batch(requests, group=3, padding=3)
    together = batch.run(splits=splits)
    starts = batch.starts.tolist()
    order = [2, 0, 3, 1]
    pieces = [slice(starts[number], starts[number + 1]) for number in order]
    turned = replace(
        batch, query=torch.cat([batch.query[piece] for piece in pieces]), tables=batch.tables[order].contiguous(),
        starts=torch.tensor([0, *[requests[number][1] for number in order]]).cumsum(0).int().to(DEVICE),
        lengths=batch.lengths[order],
    ).run(splits=splits)  # fmt: skip
    assert torch.equal(turned, torch.cat([together[piece] for piece in pieces]))
    pairs = [(0, 1), (2, 3)]  # a single request has another tile
    for first, last in pairs:
        alone = replace(
            batch, query=batch.query[starts[first] : starts[last + 1]], tables=batch.tables[first : last + 1],
            starts=batch.starts[first : last + 2] - starts[first], lengths=batch.lengths[first : last + 1],
        ).run(splits=splits, max_query=longest)  # fmt: skip
        assert torch.equal(alone, together[starts[first] : starts[last + 1]])


def test_attention_does_not_depend_on_the_width_of_the_tables():
    """Wider tables, as of a graph made for longer requests, change no bit at the same number of splits."""
    batch = _batch(RAGGED, group=3)
    wider = torch.full((len(RAGGED), 50), NOWHERE, dtype=torch.int32)
    wider[:, : batch.tables.shape[1]] = batch.tables.cpu()
    assert torch.equal(batch.run(splits=2), replace(batch, tables=wider.to(DEVICE)).run(splits=2))


def test_attention_spreads_no_nan_between_requests():
    """A request whose own cache holds NaN spoils itself only."""
    clean = _batch(RAGGED, group=3).run()
    batch = _batch(RAGGED, group=3)
    batch.keys[int(batch.tables[0, 0]), 1] = torch.nan
    spoiled = batch.run()
    assert torch.isnan(spoiled[:5]).all()
    assert torch.equal(spoiled[5:], clean[5:])


# -- launches --------------------------------------------------------------------------------


def test_attention_without_work_is_zero():
    """No tokens, or no requests: nothing is launched and the shape is right."""
    batch = _batch([(0, 0)], padding=2)
    assert torch.equal(
        replace(
            batch, tables=batch.tables[:0], starts=batch.starts[:1], lengths=batch.lengths[:0]
        ).run(),
        torch.zeros_like(batch.query),
    )  # fmt: skip
    assert replace(batch, query=batch.query[:0]).run().shape == (0, 1, 16)


def test_attention_plan_fills_the_machine():
    """Few requests are split, many are not, no split is shorter than 256 tokens, and long tables keep some splits."""

    def splits(requests, span, kv_heads=8):
        (launch,) = plan(requests, requests, 4, kv_heads, span, 1)
        return launch.splits

    assert splits(1, 32768) == 32
    assert splits(4, 8192) == 8
    assert splits(4, 1024) == 4
    assert splits(64, 2048) == splits(1, 100) == splits(256, 32768) == 1
    assert splits(64, 32768) == 4


@pytest.mark.parametrize(("group", "max_query", "rows"), [(1, 1, 16), (3, 5, 16), (3, 6, 32), (7, 9, 64), (8, 9, 128)])
def test_attention_packs_all_queries_of_a_round_into_one_tile(group, max_query, rows):
    """Verify rows times group heads share one tile, so that the cache is read once for each key head."""
    (launch,) = plan(1000, 8, group, 2, 4096, max_query)
    assert (launch.rows, launch.tiles, launch.tiled) == (rows, 8, False)


def test_attention_refuses_what_does_not_fit():
    """Each wrong shape, dtype or number is named with what it is."""
    batch = _batch([(20, 2)], group=2, kv_heads=2)
    for changed, message in (
        ({"query": batch.query[:, :3]}, "a multiple of 2"),
        ({"query": batch.query.half()}, "must be the same"),
        ({"values": batch.values[:1]}, "keys and values have the shapes"),
        ({"starts": batch.starts[:1]}, "tables, starts and lengths"),
        ({"query": batch.query.transpose(0, 1).contiguous().transpose(0, 1)}, "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(batch, **changed).run()
    with pytest.raises(ValueError, match="max_query is 0"):
        batch.run(max_query=0)
    with pytest.raises(ValueError, match="splits is 33"):
        batch.run(splits=33)
    with pytest.raises(ValueError, match="dim is 256"):
        _batch([(3, 1)], dim=256).run()


def test_attention_compiles_without_spills():
    """The kernels of an 8B model with four drafts fit a Hopper GPU: no spills, at most 200 KB of shared memory."""
    code = (
        "from kernels.gpu import aot, attention\n"
        "cases = [case for case in attention.cases() if '32/8' in case.name and 'split=False' not in case.name]\n"
        "for case in cases:\n"
        "    found = aot.compile_case(case)\n"
        "    assert not found.spilled_bytes and found.shared_bytes < 200_000, (case.name, found)\n"
        "assert len(cases) == 12\n"
    )
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=plain)
