"""Noise and sampling: published Philox vectors, the naive definition, and transformers' own warpers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kernels import noise
from kernels.noise import MAX_GUMBEL, Purpose, gumbel, philox, to_uniform, uniform
from kernels.reference.rows import exact_topk, sparse_log_probs
from kernels.sampling import RowParams, draw, shape_logits

VOCABS = (8, 64, 67, 130, 1000, 4096)


def _params(rows: int, *, temperature=1.0, top_p=1.0, top_k=0, seed=0, position=0, min_p=None) -> RowParams:
    def column(value, dtype):
        return torch.as_tensor(value, dtype=dtype).expand(rows).clone()

    return RowParams(
        column(temperature, torch.float32), column(top_p, torch.float32), column(top_k, torch.long),
        column(seed, torch.long), column(position, torch.long),
        None if min_p is None else column(min_p, torch.float32),
    )  # fmt: skip


def _noise_of(params: RowParams, vocab: int, purpose: Purpose = Purpose.SAMPLE) -> torch.Tensor:
    """The Gumbel noise of every token of every row, one counter at a time."""
    tokens = torch.arange(-(-vocab // 4) * 4)
    rows = []
    for seed, position in zip(params.seeds, params.positions, strict=True):
        blocks = tokens[::4] // 4
        four = gumbel(seed.expand(len(blocks)), blocks, position.expand(len(blocks)), purpose)
        rows.append(four.flatten()[:vocab])
    return torch.stack(rows)


def _random_logits(rows: int, vocab: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


# -- noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(monkeypatch, key, counter, expected):
    """Ten rounds of Philox-4x32 give Random123's published vectors, whatever the four counter words are.

    Our counter fixes its last word at zero, so the test hands it in where the module makes that zero.
    """
    monkeypatch.setattr(torch, "zeros_like", lambda like: torch.full_like(like, counter[3]))
    seed = torch.tensor([(key[1] << 32 | key[0]) - (key[1] >> 31 << 64)])
    got = philox(seed, torch.tensor([counter[0]]), torch.tensor([counter[1]]), counter[2])
    assert [f"{word:08x}" for word in got[0].tolist()] == expected.split()


def test_counter_layout_is_fixed():
    """Key and counter words sit where the module says; moving one would change every text ever sampled."""
    words = torch.tensor
    plain = philox(words([7]), words([3]), words([5]), Purpose.SAMPLE)
    assert not torch.equal(plain, philox(words([7]), words([5]), words([3]), Purpose.SAMPLE))
    assert not torch.equal(plain, philox(words([7 << 32]), words([3]), words([5]), Purpose.SAMPLE))
    assert torch.equal(uniform(words([7]), words([5]), Purpose.ACCEPT)[0], to_uniform(
        philox(words([7]), words([0]), words([5]), Purpose.ACCEPT)
    )[0, 0])  # fmt: skip


def test_purposes_are_different_streams():
    """No two purposes share a number for the same seed, block and position."""
    every = [philox(torch.tensor([1]), torch.tensor([2]), torch.tensor([3]), purpose) for purpose in Purpose]
    assert len({tuple(item[0].tolist()) for item in every}) == len(Purpose)


def test_uniform_stays_inside_the_open_interval():
    """The smallest and largest 32-bit numbers give finite Gumbel noise below the stated maximum."""
    edge = to_uniform(torch.tensor([0, 0xFFFFFFFF]))
    assert 0 < edge[0] < edge[1] < 1
    assert float(-torch.log(-torch.log(edge[1]))) <= MAX_GUMBEL
    assert torch.isfinite(-torch.log(-torch.log(edge))).all()


def test_uniform_is_uniform():
    """100,000 numbers of one seed fall evenly into 50 bins (chi-square, p > 0.01)."""
    positions = torch.arange(100_000)
    numbers = uniform(torch.full_like(positions, 11), positions, Purpose.ACCEPT)
    assert chisquare(torch.histc(numbers.float(), 50, 0, 1).numpy()).pvalue > 0.01


# -- drawing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_draw_is_the_dense_gumbel_argmax(vocab, spread):
    """Skipping tokens that cannot win changes nothing: 64 rows equal argmax(logits + all the noise)."""
    logits = _random_logits(64, vocab, seed=vocab, spread=spread)
    params = _params(64, seed=torch.arange(64) * 7919, position=torch.arange(64))
    dense = (logits.double() + _noise_of(params, vocab)).argmax(-1)
    assert torch.equal(draw(logits, params), dense)


def test_draw_is_dense_argmax_on_cut_rows():
    """The same holds where top-k and top-p removed tokens."""
    logits = _random_logits(48, 333, seed=5)
    params = _params(48, temperature=0.8, top_p=0.9, top_k=20, seed=torch.arange(48), position=9)
    scaled = shape_logits(logits, params)
    assert torch.equal(draw(scaled, params), (scaled.double() + _noise_of(params, 333)).argmax(-1))


def test_draw_follows_the_softmax():
    """60,000 draws of a law over 11 tokens match it (chi-square over positions, seed 3, p > 0.01)."""
    logits = _random_logits(1, 11, seed=2, spread=1.0)
    count = 60_000
    params = _params(count, temperature=0.7, seed=3, position=torch.arange(count))
    scaled = shape_logits(logits.expand(count, -1), params)
    observed = torch.bincount(draw(scaled, params), minlength=11)
    expected = torch.softmax(logits[0].double() / 0.7, -1) * count
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 0.01


def test_neighbouring_seeds_and_positions_are_independent():
    """Draws at (seed, position) and (seed + 1, position), (seed, position + 1) agree as chance would."""
    logits = _random_logits(1, 4, seed=2, spread=0.0).expand(20_000, -1)
    index = torch.arange(20_000)
    here = draw(logits, _params(20_000, seed=index, position=0))
    for other in (_params(20_000, seed=index + 1, position=0), _params(20_000, seed=index, position=1)):
        share = float((here == draw(logits, other)).double().mean())
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 20_000) ** 0.5


def test_greedy_rows_ignore_noise():
    """Temperature 0 takes the argmax, beside rows that sample."""
    logits = _random_logits(6, 50, seed=1)
    params = _params(6, temperature=[0.0, 1.0, 0.0, 1.0, 0.0, 0.5], top_p=0.5, top_k=3, seed=4, position=2)
    drawn = draw(shape_logits(logits, params), params)
    assert torch.equal(drawn[::2], logits[::2].argmax(-1))
    assert torch.equal(shape_logits(logits, params)[::2], logits[::2])


def test_a_draw_does_not_depend_on_the_batch():
    """Any permutation and any subset of rows draws the same tokens (R1)."""
    rows = 40
    logits = _random_logits(rows, 203, seed=8)
    params = _params(
        rows, temperature=torch.linspace(0, 1.5, rows), top_p=torch.linspace(0.3, 1, rows),
        top_k=torch.arange(rows) % 9, seed=torch.arange(rows) * 31, position=torch.arange(rows) % 5,
        min_p=torch.arange(rows) % 3 * 0.1,
    )  # fmt: skip
    whole = draw(shape_logits(logits, params), params)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    for index in (order, order[:1], order[:13]):
        part = params.rows(index)
        assert torch.equal(draw(shape_logits(logits[index], part), part), whole[index])


def test_shape_logits_leaves_its_input_alone():
    """The engine records the raw logits after sampling, so they must not be changed in place."""
    logits = _random_logits(4, 100, seed=3)
    before = logits.clone()
    for temperature in ([0.0, 1.0, 1.0, 0.5], 1.0, 0.0):
        for cuts in ({"top_p": 0.4, "top_k": 7, "min_p": 0.2}, {"min_p": [0.0, 0.5, 0.0, 0.5]}, {"top_k": 3}, {}):
            shape_logits(logits, _params(4, temperature=temperature, **cuts))
            assert torch.equal(logits, before)


def test_rows_that_need_nothing_are_not_copied():
    """Greedy rows, and rows at temperature 1 without cuts, come back as the very tensor that went in."""
    logits = _random_logits(4, 100, seed=3)
    greedy = _params(4, temperature=0.0, top_p=0.3, top_k=5, min_p=0.5)
    for params in (greedy, _params(4), _params(4, temperature=[0.0, 1.0, 0.0, 1.0], min_p=0.0)):
        assert shape_logits(logits, params) is logits


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_still_give_a_token(bad):
    """A draft of NaN proposes some token of the vocabulary; it never crashes the batch (W6)."""
    logits = torch.full((4, 130), bad)
    for min_p in (None, [0.0, 0.1, 0.0, 0.3]):
        params = _params(
            4, temperature=[0.0, 1.0, 1.0, 1.0], top_p=[1.0, 1.0, 0.5, 1.0], top_k=[0, 0, 0, 4], seed=1, min_p=min_p
        )
        drawn = draw(shape_logits(logits, params), params)
        assert bool(((drawn >= 0) & (drawn < 130)).all())


# -- truncation ------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("k", [1, 3, 40, 2000])
def test_top_k_equals_transformers(vocab, k):
    """The kept set is the one TopKLogitsWarper keeps."""
    logits = _random_logits(9, vocab, seed=k)
    kept = TopKLogitsWarper(k)(None, logits.clone())
    assert torch.equal(shape_logits(logits, _params(9, top_k=k)), kept)


@pytest.mark.parametrize("vocab", [8, 67, 1000, 4096])
@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_top_p_equals_transformers(vocab, top_p, spread):
    """The kept set is the one TopPLogitsWarper keeps, for peaked laws and for nuclei past the fast path.

    A token whose cumulative mass equals top_p within float rounding may fall on either side.
    """
    logits = _random_logits(9, vocab, seed=vocab, spread=spread)
    ours = torch.isfinite(shape_logits(logits, _params(9, top_p=top_p)))
    theirs = torch.isfinite(TopPLogitsWarper(top_p)(None, logits.clone()))
    mass = torch.softmax(logits.double(), -1)
    assert float((mass * (ours ^ theirs)).sum(-1).max()) < 2e-3 / vocab + 1e-4 * float(mass.max())
    assert int((ours ^ theirs).sum(-1).max()) <= 1
    assert bool(ours.any(-1).all())


def test_top_p_cuts_what_top_k_left():
    """top-k comes first, then the nucleus of the renormalised rest, as transformers orders its warpers."""
    logits = _random_logits(20, 100, seed=6, spread=2.0)
    theirs = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(10)(None, logits / 0.9))
    ours = shape_logits(logits, _params(20, temperature=0.9, top_p=0.8, top_k=10))
    assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))


@pytest.mark.parametrize("vocab", VOCABS)
def test_each_row_has_its_own_top_k(vocab):
    """Many different k in one batch, beside greedy rows and rows without a cut, keep what each keeps alone."""
    kinds = [0, 1, 2, 5, 40, 600, 5000, 5, 0]
    logits = _random_logits(len(kinds), vocab, seed=11)
    temperatures = [1.0, 0.5, 1.0, 0.0, 2.0, 1.0, 1.0, 1.0, 0.7]
    shaped = shape_logits(logits, _params(len(kinds), top_k=kinds, temperature=temperatures))
    for row, (k, temperature) in enumerate(zip(kinds, temperatures, strict=True)):
        scaled = logits[row : row + 1] / (temperature or 1.0)
        kept = TopKLogitsWarper(k)(None, scaled) if k and temperature else scaled
        assert torch.equal(shaped[row : row + 1], kept)


@pytest.mark.parametrize("vocab", [8, 67, 1000, 4096])
@pytest.mark.parametrize("min_p", [0.001, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.8])
def test_min_p_equals_transformers(vocab, min_p, temperature):
    """The kept set is the one MinPLogitsWarper keeps of the temperature-scaled law, up to rounding at the border."""
    logits = _random_logits(9, vocab, seed=vocab)
    ours = torch.isfinite(shape_logits(logits, _params(9, temperature=temperature, min_p=min_p)))
    theirs = torch.isfinite(MinPLogitsWarper(min_p)(None, logits / temperature))
    law = torch.softmax(logits.double() / temperature, -1)
    at_border = (law / law.amax(-1, keepdim=True) - min_p).abs() < 1e-5
    assert torch.equal(ours | at_border, theirs | at_border)
    assert bool(ours.any(-1).all())


def test_min_p_keeps_ties_with_the_likeliest():
    """min_p 1 keeps the likeliest token and those exactly as likely; min_p 0 cuts nothing, beside rows that cut."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [1.0, 3.0, 3.0, 2.0]])
    shaped = shape_logits(logits, _params(2, temperature=0.5, min_p=[1.0, 0.0]))
    assert torch.isfinite(shaped).tolist() == [[False, True, True, False], [True] * 4]


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_min_p_comes_after_the_nucleus(spread):
    """temperature, top-k, top-p, min-p: the order of transformers, in which the nucleus is of the uncut law."""
    logits = _random_logits(40, 100, seed=6, spread=spread)
    theirs = MinPLogitsWarper(0.3)(None, TopPLogitsWarper(0.8)(None, TopKLogitsWarper(60)(None, logits / 0.9)))
    params = _params(40, temperature=0.9, top_p=0.8, top_k=60, min_p=0.3)
    ours = shape_logits(logits, params)
    assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))
    other = TopPLogitsWarper(0.8)(None, MinPLogitsWarper(0.3)(None, TopKLogitsWarper(60)(None, logits / 0.9)))
    assert not torch.equal(torch.isfinite(other), torch.isfinite(theirs))


@given(
    rows=st.integers(1, 4), vocab=st.integers(1, 700), k=st.integers(1, 80), seed=st.integers(0, 99),
    levels=st.integers(2, 50),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_exact_topk_equals_torch(rows, vocab, k, seed, levels):
    """Values equal torch.topk's even with many ties, and every index points at its value, once."""
    values = torch.randint(levels, (rows, vocab), generator=torch.Generator().manual_seed(seed)).float()
    top, index = exact_topk(values, k)
    assert torch.equal(top, torch.topk(values, min(k, vocab), -1).values)
    assert torch.equal(values.gather(1, index), top)
    assert all(len(set(row)) == len(row) for row in index.tolist())


def test_sparse_log_probs_are_the_log_softmax():
    """The logged law is log-softmax at the k likeliest tokens."""
    logits = _random_logits(5, 256, seed=1)
    ids, logprobs = sparse_log_probs(logits, 32)
    assert torch.allclose(logprobs, torch.log_softmax(logits, -1).gather(1, ids), atol=1e-6)


def test_max_gumbel_bounds_the_noise():
    """Block skipping is exact only while no noise exceeds the bound; the largest possible one does not."""
    assert float(-torch.log(-torch.log(to_uniform(torch.tensor([noise._LOW]))))) < MAX_GUMBEL
