"""A trimmed head: laws over it are those over the full head with the missing tokens in the tail."""

from __future__ import annotations

import pytest
import torch

from distill.vocabulary import Vocabulary
from kernels.sparse_loss import SparseTeacherLoss, dense_reference


def teacher(rows: int, vocab: int, k: int, generator: torch.Generator):
    law = torch.log_softmax(2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64), -1)
    top = law.topk(k)
    return top.indices, top.values


def test_no_trim_changes_nothing():
    """Without a choice of tokens, places are ids."""
    ids, logprobs = teacher(4, 30, 5, torch.Generator().manual_seed(0))
    places, same = Vocabulary(None, 30).translate(ids, logprobs)
    assert torch.equal(places, ids)
    assert torch.equal(same, logprobs)


@pytest.mark.parametrize("size", [10, 11, 37, 59])
def test_missing_tokens_become_others_without_a_chance(size):
    """Places stay distinct in every row, known tokens keep place and log-prob, missing ones get one of nearly zero."""
    generator = torch.Generator().manual_seed(size)
    allowed = torch.randperm(60, generator=generator)[:size].sort().values
    ids, logprobs = teacher(200, 60, 5, generator)
    places, changed = Vocabulary(allowed, 60).translate(ids, logprobs)
    known = torch.isin(ids, allowed)
    assert ((places >= 0) & (places < size)).all()
    assert all(len(set(row.tolist())) == 5 for row in places)
    assert torch.equal(allowed[places][known], ids[known])
    assert torch.equal(changed[known], logprobs[known])
    assert (changed[~known].exp() < 1e-15).all()


def test_the_loss_on_a_trimmed_head_is_the_loss_with_missing_tokens_in_the_tail():
    """Against a dense law over the trimmed tokens where the teacher's missing ones joined the tail, in float64."""
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    allowed = torch.arange(0, 60, 2)
    vocabulary = Vocabulary(allowed, 60)
    hidden = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    ids = torch.tensor([[4, 7, 10, 13]])
    logprobs = torch.tensor([[0.4, 0.3, 0.1, 0.1]], dtype=torch.float64).log()
    places, changed = vocabulary.translate(ids, logprobs)
    one = torch.ones(1, dtype=torch.float64)
    found, _, _ = SparseTeacherLoss.apply(hidden, vocabulary.head_of(head), places, changed, one, 1.0, 16)
    wanted = dense_reference(
        hidden, head[allowed], torch.tensor([[2, 5]]), torch.tensor([[0.4, 0.1]], dtype=torch.float64).log(), one, 1.0
    )
    # the fillers are taken out of the draft's tail, so the two differ by their share of it
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.05)


def test_a_head_is_cut_to_the_tokens_in_order():
    """Row i of the trimmed head is the head's row of the i-th allowed token."""
    head = torch.arange(12.0).view(6, 2)
    assert torch.equal(Vocabulary(torch.tensor([1, 4]), 6).head_of(head), head[[1, 4]])
