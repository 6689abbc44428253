"""Rotation with cache write: transformers' own rotation and head norm, slots that write nothing, poisoned memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from kernels.gpu.rope_cache import rope_and_write
from kernels.reference.layers import rope_and_write as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMS = (reference, rope_and_write)
BLOCKS, BLOCK_TOKENS, POSITIONS, EPSILON = 5, 4, 40, 1e-6
# Scattered positions, one of them twice, and slots in no order; two tokens write nothing.
PLACES = [(7, 3), (8, 17), (0, -1), (39, 0), (7, 12), (1, 19), (20, -1)]


class Case:
    """Arguments of a call; the caches hold NaN."""

    def __init__(self, heads, kv_heads, dim, *, norms=False, dtype=torch.float32, places=PLACES) -> None:
        generator = torch.Generator().manual_seed(dim + heads)
        angle = torch.rand(POSITIONS, dim // 2, generator=generator) * 6
        plain = torch.cat((angle.sin(), angle.sin()), -1).to(dtype)
        self.plain_sin = plain.to(DEVICE)  # as transformers has it, without the sign
        self.cos = torch.cat((angle.cos(), angle.cos()), -1).to(DEVICE, dtype)
        self.sin = torch.cat((-plain[:, : dim // 2], plain[:, dim // 2 :]), -1).to(DEVICE)
        self.qkv = torch.randn(len(places), (heads + 2 * kv_heads) * dim, generator=generator).to(DEVICE, dtype)
        self.positions, self.slots = (torch.tensor(item, device=DEVICE) for item in zip(*places, strict=True))
        weights = 1 + torch.randn(2, dim, generator=generator).to(DEVICE, dtype)
        self.norms = (weights[0], weights[1], EPSILON) if norms else None
        self.heads, self.kv_heads, self.dim, self.dtype = heads, kv_heads, dim, dtype
        self.keys, self.values = self.caches()

    def caches(self) -> torch.Tensor:
        shape = (2, BLOCKS, BLOCK_TOKENS, self.kv_heads, self.dim)
        return torch.full(shape, torch.nan, dtype=self.dtype, device=DEVICE)

    def run(self, form=rope_and_write) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rotated queries and the caches, made anew."""
        keys, values = self.caches()
        query = form(
            self.qkv, self.cos, self.sin, self.positions, self.slots, keys, values, heads=self.heads, norms=self.norms
        )
        return query, keys.flatten(0, 1), values.flatten(0, 1)

    def theirs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [tokens, heads, dim] by transformers' functions, in float32."""
        parts = self.qkv.float().view(len(self.qkv), -1, self.dim)
        query, key, value = parts.split((self.heads, self.kv_heads, self.kv_heads), 1)
        if self.norms is not None:
            normed = []
            for part, weight in ((query, self.norms[0]), (key, self.norms[1])):
                module = Qwen3RMSNorm(self.dim, EPSILON).to(DEVICE, self.dtype)
                module.weight.data.copy_(weight)
                normed.append(module(part.to(self.dtype)).detach().float())
            query, key = normed
        cos, sin = (table[self.positions].float() for table in (self.cos, self.plain_sin))
        query, key = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=1)
        return query, key, value


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(9, 3, 64), (14, 2, 64), (32, 8, 128), (1, 1, 16), (5, 5, 80), (7, 1, 6)]
)
def test_rope_is_transformers_own(heads, kv_heads, dim, norms):
    """Queries, and keys and values at their slots, are what transformers' norm and rotation give, to 2e-6."""
    case = Case(heads, kv_heads, dim, norms=norms)
    query, key, value = case.theirs()
    written = case.slots >= 0
    for form in FORMS:
        got, keys, values = case.run(form)
        torch.testing.assert_close(got, query, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(keys[case.slots[written]], key[written], rtol=2e-6, atol=2e-6)
        assert torch.equal(values[case.slots[written]], value[written])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rope_rounds_the_rotation_once(dtype):
    """In 16 bit the head norm is rounded as transformers does, and the rotation in float32 is rounded at its end.

    At most 1 in 200 numbers may differ from that; the interpreter cuts bfloat16 off, which takes a few units.
    """
    case = Case(9, 3, 64, norms=True, dtype=dtype)
    query, key, value = (item.to(dtype) for item in case.theirs())
    written = case.slots >= 0
    for form in FORMS:
        got, keys, values = case.run(form)
        assert torch.equal(values[case.slots[written]], value[written])
        loose = DEVICE.type == "cpu" and form is rope_and_write and dtype == torch.bfloat16
        for ours, theirs in ((got, query), (keys[case.slots[written]], key[written])):
            if loose:
                assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) < 0.02
            else:
                assert float((ours != theirs).float().mean()) < 1 / 200
                torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("places", [PLACES, [(3, -1), (4, -1)], [(2, 0), (5, -1)], [(5, 19), (2, -1)]])
def test_rope_writes_its_slots_and_nothing_else(form, places):
    """Every slot without a token keeps its NaN, slot -1 writes none, and all queries are rotated all the same."""
    case = Case(6, 2, 16, places=places)
    query, keys, values = case.run(form)
    assert torch.isfinite(query).all()
    used = {slot for _, slot in places if slot >= 0}
    for cache in (keys, values):
        for slot, row in enumerate(cache):
            assert torch.isfinite(row).all() if slot in used else torch.isnan(row).all()


def test_rope_stays_inside_its_buffers(monkeypatch):
    """NaN around every input reaches no result, the new buffer is filled, and the margins keep their NaN."""
    case = Case(7, 1, 6, norms=True)
    wanted = case.run(reference)
    margin = 512
    frames = []

    def framed(item: torch.Tensor) -> torch.Tensor:
        frame = torch.full((item.numel() + 2 * margin,), torch.nan, device=DEVICE)
        frame[margin:-margin] = item.flatten()
        frames.append(frame)
        return frame[margin:-margin].view(item.shape)

    keys, values, out = framed(case.keys), framed(case.values), framed(torch.full_like(wanted[0], torch.nan))
    monkeypatch.setattr(torch, "empty", lambda *size, **_: out.view(size))
    assert case.norms is not None
    got = rope_and_write(
        framed(case.qkv), framed(case.cos), framed(case.sin), case.positions, case.slots, keys, values, heads=7,
        norms=(framed(case.norms[0]), framed(case.norms[1]), EPSILON),
    )  # fmt: skip
    torch.testing.assert_close(got, wanted[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(keys.flatten(0, 1), wanted[1], rtol=2e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(values.flatten(0, 1), wanted[2], rtol=0, atol=0, equal_nan=True)
    for frame in frames:
        assert torch.isnan(frame[:margin]).all()
        assert torch.isnan(frame[-margin:]).all()


@pytest.mark.parametrize("form", FORMS)
def test_rope_takes_the_nearest_row_beyond_the_tables(form):
    """Rows that pad a batch may hold any position: none of them is read outside the tables."""
    beyond = Case(3, 1, 16, places=[(POSITIONS + 10**6, -1), (-5, -1)])
    inside = Case(3, 1, 16, places=[(POSITIONS - 1, -1), (0, -1)])
    assert torch.equal(beyond.run(form)[0], inside.run(form)[0])


@pytest.mark.parametrize("form", FORMS)
def test_rope_takes_either_kind_of_integer(form):
    """Positions and slots may be int32 or int64."""
    case = Case(3, 1, 16)
    wanted = case.run(form)
    case.positions, case.slots = case.positions.int(), case.slots.int()
    for got, item in zip(case.run(form), wanted, strict=True):
        assert torch.equal(got.nan_to_num(), item.nan_to_num())


def test_rope_tokens_do_not_depend_on_each_other():
    """A token alone has the bits it has in a batch."""
    case = Case(9, 3, 64, norms=True)
    together = case.run()[0]
    every = case.qkv, case.positions, case.slots
    for token in range(len(together)):
        case.qkv, case.positions, case.slots = (item[token : token + 1] for item in every)
        assert torch.equal(case.run()[0][0], together[token])


def test_rope_reference_asks_the_device_nothing():
    """Over tensors without contents every operation of the reference knows its shape."""
    case = Case(3, 1, 16, norms=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name in ("qkv", "cos", "sin", "positions", "slots", "keys", "values"):
            setattr(case, name, mode.from_tensor(getattr(case, name)))
        query = case.run(reference)[0]
    assert query.shape == (len(PLACES), 3, 16)


def test_rope_of_no_tokens():
    """No tokens: nothing is launched or written and the shape is right."""
    for form in FORMS:
        case = Case(3, 1, 16)
        case.qkv, case.positions, case.slots = case.qkv[:0], case.positions[:0], case.slots[:0]
        query, keys, _ = case.run(form)
        assert query.shape == (0, 3, 16)
        assert torch.isnan(keys).all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qkv", lambda item: item[:, :-1], "qkv has the shape"), ("cos", lambda item: item[:, :8], "cos has the shape"),
        ("sin", lambda item: item[:5], "sin has the shape"), ("slots", lambda item: item[:2], "slots has the shape"),
        ("positions", lambda item: item.repeat_interleave(2)[::2], "positions has the strides"),
    ],
)  # fmt: skip
def test_rope_refuses_what_does_not_fit(name, change, message):
    """Each wrong shape is named with what it is."""
    case = Case(3, 1, 16)
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(ValueError, match=message):
        case.run()


def test_rope_compiles_without_spills():
    """Every case fits a Hopper GPU."""
    code = (
        "from kernels.gpu import aot, rope_cache\n"
        "for case in rope_cache.cases():\n"
        "    found = aot.compile_case(case)\n"
        "    assert not found.spilled_bytes and found.registers <= 128, (case.name, found)\n"
    )
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=plain)
