"""Statistics of rows of logits: the compiled forms say what plain torch says, whatever is in a row."""

from __future__ import annotations

import pytest
import torch

from kernels import dispatch
from kernels.cpu import library
from kernels.cpu import rows as compiled_rows
from kernels.packed_linear import can_compile
from kernels.reference.rows import sparse_log_probs as reference_log_probs

needs_kernels = pytest.mark.skipif(not can_compile(), reason=f"no C kernels here: {library.unavailable()}")

WIDTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 1000, 1024, 1025, 4097, 49152)
NAN, INF = float("nan"), float("inf")


def logits_of(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * 4


@needs_kernels
@pytest.mark.parametrize("width", WIDTHS)
def test_the_largest_is_found_wherever_it_is(width: int) -> None:
    """First of equal ones, every place of short rows and many of long ones."""
    places = torch.arange(0, width, max(1, width // 97))
    x = logits_of(len(places), width)
    x.clamp_(max=9.0)
    x[torch.arange(len(places)), places] = 10.0
    assert torch.equal(compiled_rows.largest(x)[1], places)
    x[:, -1] = 10.0
    assert torch.equal(compiled_rows.largest(x)[1], places)
    assert torch.equal(compiled_rows.largest(torch.zeros(3, width))[1], torch.zeros(3, dtype=torch.long))


@needs_kernels
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("odd", [NAN, INF, -INF])
def test_numbers_that_are_none_are_seen_as_torch_sees_them(width: int, odd: float) -> None:
    """The first NaN wins, +inf wins, -inf never does unless there is nothing else."""
    x = logits_of(4, width)
    x[0, width // 2] = x[0, -1] = odd
    x[1, 0] = odd
    x[2] = odd
    values, places = compiled_rows.largest(x)
    assert torch.equal(places, x.argmax(-1))
    assert torch.equal(values.nan_to_num(7.0), x.amax(-1).nan_to_num(7.0))


@needs_kernels
@pytest.mark.parametrize("width", WIDTHS)
def test_the_likeliest_and_their_log_probs(width: int) -> None:
    """Ids exactly, log-probs within 4 units of float32's last place at the size of the logits; n=5 rows."""
    x = logits_of(5, width)
    exact = torch.log_softmax(x.double(), dim=-1)
    for k in {1, min(2, width), min(32, width), min(100, width), width if width < 2000 else 300}:
        ids, log_probs = compiled_rows.top_log_probs(x, k)
        wanted = torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(ids, wanted)
        torch.testing.assert_close(log_probs.double(), exact.gather(1, ids), rtol=0, atol=1e-5)
        again, near = reference_log_probs(x, k)
        assert torch.equal(ids, again)
        torch.testing.assert_close(log_probs, near, rtol=0, atol=1e-5)


@needs_kernels
def test_ties_and_cut_tokens_among_the_likeliest() -> None:
    """Of equal ones the first come first, and a row with fewer tokens that can be said than asked for has the rest."""
    ids, log_probs = compiled_rows.top_log_probs(torch.zeros(1, 300), 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]]
    torch.testing.assert_close(log_probs, torch.full((1, 5), 1 / 300).log())
    row = torch.full((1, 300), -INF)
    row[0, 200], row[0, 7] = 1.0, 1.0
    ids, log_probs = compiled_rows.top_log_probs(row, 4)
    assert ids[0, :2].tolist() == [7, 200]
    torch.testing.assert_close(log_probs[0, :2].exp(), torch.tensor([0.5, 0.5]))
    assert log_probs[0, 2:].tolist() == [-INF, -INF]
    assert len(set(ids[0].tolist())) == 4
    ids, log_probs = compiled_rows.top_log_probs(torch.tensor([[NAN, 1.0, NAN, 2.0, NAN]]), 4)
    assert ids[0, :2].tolist() == [3, 1]
    assert sorted(ids[0].tolist()) in ([0, 1, 2, 3], [0, 1, 3, 4], [1, 2, 3, 4])
    assert torch.isnan(log_probs).all()


@needs_kernels
def test_a_row_is_the_same_bits_whatever_comes_along() -> None:
    """Neither batch mates nor the number of threads move a log-prob."""
    x = logits_of(33, 5003)
    ids, log_probs = compiled_rows.top_log_probs(x, 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for row in range(33):
            one_id, one = compiled_rows.top_log_probs(x[row : row + 1], 32)
            assert torch.equal(one_id[0], ids[row])
            assert torch.equal(one[0], log_probs[row])
    finally:
        torch.set_num_threads(before)


def test_the_door_takes_every_tensor() -> None:
    """Other dtypes, parts of larger tensors, and no rows at all have the reference's answers."""
    x = logits_of(4, 130)
    for given in (x, x.double(), x[:, ::2], x[:, 3:], x[:0]):
        values, places = dispatch.largest(given)
        assert torch.equal(values, given.amax(-1))
        assert torch.equal(places, given.argmax(-1) if len(given) else places[:0])
        ids, log_probs = dispatch.sparse_log_probs(given, 7)
        wanted, near = reference_log_probs(given, 7)
        assert torch.equal(ids, wanted)
        torch.testing.assert_close(log_probs, near, rtol=0, atol=1e-5)


def test_a_process_that_may_not_compile_does_not() -> None:
    """With the setting off nothing is compiled or loaded, in the first step least of all."""
    library._load.cache_clear()
    dispatch.allow_compiled(False)
    try:
        assert dispatch.largest(logits_of(3, 200))[1].shape == (3,)
        assert library._load.cache_info().currsize == 0
    finally:
        dispatch.allow_compiled(True)
