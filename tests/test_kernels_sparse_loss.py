"""The sparse-teacher loss against dense float64 autograd."""

from __future__ import annotations

import pytest
import torch

from distill.losses import sparse_teacher_loss
from kernels.sparse_loss import SparseTeacherLoss, dense_reference


def _case(rows: int, width: int, vocab: int, k: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    head = torch.randn(vocab, width, generator=generator)
    law = torch.log_softmax(2 * torch.randn(rows, vocab, generator=generator), -1)
    logprobs, ids = law.topk(k)
    weights = torch.rand(rows, generator=generator)
    return hidden, head, ids, logprobs, weights


def _gradients(case: tuple[torch.Tensor, ...], kl_share: float, chunk_rows: int) -> tuple[torch.Tensor, ...]:
    hidden, head, ids, logprobs, weights = case
    ours, truth = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    loss, _, _ = SparseTeacherLoss.apply(ours, head, ids, logprobs, weights, kl_share, chunk_rows)
    reference = dense_reference(truth, head, ids, logprobs, weights, kl_share)
    (loss * -2.5).backward()
    (reference * -2.5).backward()
    return loss.detach(), reference.detach(), ours.grad, truth.grad


@pytest.mark.parametrize("kl_share", [1.0, 0.0, 0.3])
@pytest.mark.parametrize(
    ("rows", "width", "vocab", "k", "chunk_rows"),
    [(7, 5, 33, 4, 3), (16, 8, 64, 9, 16), (1, 3, 11, 2, 256), (9, 17, 130, 1, 4)],
)
def test_loss_and_gradient_match_dense_float64_autograd(rows, width, vocab, k, chunk_rows, kl_share):
    """Odd shapes, chunk borders and a negative upstream gradient all give the dense gradient."""
    loss, reference, ours, truth = _gradients(_case(rows, width, vocab, k, seed=rows), kl_share, chunk_rows)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=5e-6)


def test_chunking_does_not_change_the_result():
    """The number of rows walked at once is invisible in the gradient."""
    case = _case(13, 8, 40, 5, seed=1)
    small, large = _gradients(case, 0.5, 1), _gradients(case, 0.5, 100)
    torch.testing.assert_close(small[2], large[2])


def test_a_row_of_weight_zero_neither_counts_nor_learns():
    """Weight zero removes a row from the loss, the statistics and the gradient."""
    hidden, head, ids, logprobs, weights = _case(6, 8, 40, 5, seed=2)
    weights[2] = 0
    state = hidden.clone().requires_grad_()
    loss, stats = sparse_teacher_loss(state, head, ids, logprobs, weights, kind="blend", blend=0.4)
    loss.backward()
    kept = [0, 1, 3, 4, 5]
    less, fewer = sparse_teacher_loss(
        hidden[kept], head, ids[kept], logprobs[kept], weights[kept], kind="blend", blend=0.4
    )
    assert torch.all(state.grad[2] == 0)
    torch.testing.assert_close(loss.detach(), less)
    assert stats == pytest.approx(fewer, rel=1e-5)


def test_a_draft_equal_to_its_target_has_no_loss_and_no_gradient():
    """KL is zero, acceptance one and the gradient vanishes when the logged law is the draft's own."""
    hidden, head, ids, _, weights = _case(5, 8, 40, 6, seed=3)
    logprobs, ids = torch.log_softmax(hidden @ head.t(), -1).topk(6)
    state = hidden.clone().requires_grad_()
    loss, stats = sparse_teacher_loss(state, head, ids, logprobs, weights)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert stats.acceptance == pytest.approx(1, abs=1e-5)
    assert float(state.grad.abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["kl", "nla"])
def test_extreme_laws_stay_finite(kind):
    """A certain draft that is wrong, a teacher without tail and log-probs of -inf give finite numbers."""
    head = 50 * torch.eye(8)
    hidden = (20 * torch.eye(8)[:3]).requires_grad_()
    logprobs = torch.tensor([[0.001, -20.0], [0.0, float("-inf")], [-0.7, -0.7]])
    loss, stats = sparse_teacher_loss(
        hidden, head, torch.tensor([[3, 4], [3, 4], [3, 4]]), logprobs, torch.ones(3), kind=kind
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()
    assert stats.acceptance < 0.01


def test_no_gradient_is_formed_when_none_is_wanted():
    """Scoring frozen states works and attaches nothing."""
    loss, _ = sparse_teacher_loss(*_case(4, 8, 40, 5, seed=4))
    assert not loss.requires_grad


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "tv"}, "loss kind 'tv'"),
        ({"topk_ids": torch.full((4, 5), 40)}, "another target"),
        ({"weights": torch.ones(3)}, "expected hidden"),
    ],
)
def test_wrong_input_is_refused_in_words(change, words):
    """An unknown kind, ids outside the vocabulary and shapes that do not fit are named."""
    names = ("hidden", "head_weight", "topk_ids", "topk_logprobs", "weights")
    arguments = dict(zip(names, _case(4, 8, 40, 5, seed=5), strict=True)) | change
    with pytest.raises(ValueError, match=words):
        sparse_teacher_loss(**arguments)
