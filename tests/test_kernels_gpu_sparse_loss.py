"""The chunk kernel of the sparse-teacher loss: dense float64 autograd, finite differences, and the path on the CPU."""

from __future__ import annotations

import pytest
import torch

from kernels.gpu.sparse_loss import loss_rows
from kernels.sparse_loss import dense_reference, walk_by_kernel, walk_by_torch

KINDS = [1.0, 0.0, 0.3]
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def case_of(rows: int, width: int, vocab: int, k: int, seed: int) -> Case:
    """Hidden states, head, the teacher's ids and log-probs, weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    head = torch.randn(vocab, width, generator=generator)
    law = torch.log_softmax(2 * torch.randn(rows, vocab, generator=generator), -1)
    logprobs, ids = law.topk(k)
    return hidden, head, ids, logprobs, torch.rand(rows, generator=generator)


def loss_of(figures: tuple[torch.Tensor, ...], weights: torch.Tensor, kl_share: float) -> torch.Tensor:
    kl, alpha = figures[0].double(), figures[1].double()
    return (weights.double() * (kl_share * kl - (1 - kl_share) * alpha.log())).sum()


def assert_dense(case: Case, kl_share: float) -> None:
    """Loss and gradient are those of dense float64 autograd."""
    figures = walk_by_kernel(*case, kl_share, 1, True)
    truth = case[0].double().requires_grad_()
    reference = dense_reference(truth, *case[1:], kl_share)
    reference.backward()
    torch.testing.assert_close(loss_of(figures, case[4], kl_share), reference.detach(), rtol=1e-5, atol=1e-6)
    assert figures[2] is not None
    assert truth.grad is not None
    torch.testing.assert_close(figures[2].double(), truth.grad, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("kl_share", KINDS)
@pytest.mark.parametrize(
    ("rows", "vocab", "k"), [(7, 13, 1), (7, 13, 13), (1, 130, 33), (7, 4096, 8), (7, 4099, 17)]
)  # fmt: skip
def test_loss_kernel_has_the_gradient_of_dense_autograd(rows: int, vocab: int, k: int, kl_share: float) -> None:
    """Odd vocabularies and k, one of them the whole vocabulary, agree with float64 within rounding."""
    assert_dense(case_of(rows, 6, vocab, k, seed=vocab + k), kl_share)


def test_loss_kernel_walks_more_rows_than_a_chunk() -> None:
    """600 rows are two chunks; no chunk disturbs another's rows."""
    assert_dense(case_of(600, 4, 21, 3, seed=1), 0.3)


@pytest.mark.parametrize("kl_share", KINDS)
def test_loss_kernel_agrees_with_finite_differences(kl_share: float) -> None:
    """Central differences of the float64 loss, one coordinate of the logits after another, give the written slopes."""
    _, _, ids, logprobs, weights = case_of(3, 5, 19, 4, seed=2)
    logits = torch.randn(3, 19, generator=torch.Generator().manual_seed(3))
    eye, step = torch.eye(19), 1e-5
    slopes = torch.empty(3, 19, dtype=torch.float64)
    for column in range(19):
        bump = step * eye[column].double()
        for row in range(3):
            part = slice(row, row + 1)
            law = (eye, ids[part], logprobs[part], weights[part], kl_share)
            ends = [dense_reference(logits[part].double() + sign * bump, *law) for sign in (1, -1)]
            slopes[row, column] = (ends[0] - ends[1]) / (2 * step)
    loss_rows(logits, ids, logprobs, weights, kl_share, torch.empty(3), torch.empty(3), with_gradient=True)
    torch.testing.assert_close(logits.double(), slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kl_share", KINDS)
def test_loss_kernel_says_what_the_torch_path_says(kl_share: float) -> None:
    """KL, α and gradient equal the CPU path's within float32 rounding, and weight zero gives exact zeros."""
    case = case_of(9, 8, 300, 12, seed=4)
    case[4][2] = 0
    ours, theirs = walk_by_kernel(*case, kl_share, 4, True), walk_by_torch(*case, kl_share, 4, True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)
    assert ours[2] is not None
    assert torch.all(ours[2][2] == 0)


@pytest.mark.parametrize("kl_share", KINDS)
def test_loss_kernel_stays_finite_on_extreme_laws(kl_share: float) -> None:
    """A certain draft that is wrong, a teacher with sums of one or above and log-probs of -inf give finite numbers."""
    head, hidden = 50 * torch.eye(8), 20 * torch.eye(8)[:3]
    logprobs = torch.tensor([[0.001, -20.0], [0.0, float("-inf")], [-0.6931472, -0.6931472]])
    case = (hidden, head, torch.tensor([[3, 4]] * 3), logprobs, torch.ones(3))
    for kl, other in zip(
        walk_by_kernel(*case, kl_share, 1, True), walk_by_torch(*case, kl_share, 3, True), strict=True
    ):
        assert torch.isfinite(kl).all()
        torch.testing.assert_close(kl, other, rtol=1e-4, atol=1e-5)


def test_loss_kernel_takes_no_rows_and_no_gradient() -> None:
    """Zero rows give empty figures; without a gradient the logits stay as they were."""
    kl, alpha, grad = walk_by_kernel(*case_of(0, 4, 21, 3, seed=5), 1.0, 8, True)
    assert kl.shape == alpha.shape == (0,)
    assert grad is not None
    assert grad.shape == (0, 4)
    assert walk_by_kernel(*case_of(2, 4, 21, 3, seed=5), 1.0, 8, False)[2] is None
    _, _, ids, logprobs, weights = case_of(2, 4, 21, 3, seed=6)
    logits = torch.randn(2, 21)
    before = logits.clone()
    loss_rows(logits, ids, logprobs, weights, 1.0, torch.empty(2), torch.empty(2), with_gradient=False)
    assert torch.equal(logits, before)


def test_loss_kernel_stays_inside_its_rows() -> None:
    """NaN before and after the chunk is neither read nor overwritten, and every output is written."""
    _, _, ids, logprobs, weights = case_of(3, 4, 4099, 5, seed=7)
    guarded = torch.full((5, 4099), float("nan"))
    logits = guarded[1:4].normal_(generator=torch.Generator().manual_seed(8))
    kl, alpha = torch.full((5,), float("nan")), torch.full((5,), float("nan"))
    loss_rows(logits, ids, logprobs, weights, 0.5, kl[1:4], alpha[1:4], with_gradient=True)
    for tensor in (guarded, kl, alpha):
        assert tensor[[0, 4]].isnan().all()
        assert torch.isfinite(tensor[1:4]).all()


def test_loss_kernel_keeps_statistics_in_float32_on_bf16_logits() -> None:
    """From bf16 logits KL and α equal those of the same numbers in float32; the slopes are rounded once."""
    _, _, ids, logprobs, weights = case_of(5, 4, 700, 9, seed=9)
    narrow = (3 * torch.randn(5, 700, generator=torch.Generator().manual_seed(10))).bfloat16()
    wide = narrow.float()
    figures = torch.empty(4, 5)
    loss_rows(narrow, ids, logprobs, weights, 0.5, figures[0], figures[1], with_gradient=True)
    loss_rows(wide, ids, logprobs, weights, 0.5, figures[2], figures[3], with_gradient=True)
    assert torch.equal(figures[:2], figures[2:])
    torch.testing.assert_close(narrow.float(), wide, rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: torch.zeros(2, 21).half()}, "float32 or bfloat16"),
        ({1: torch.zeros(2, 4, dtype=torch.long)}, "both must be"),
        ({1: torch.zeros(2, 3, dtype=torch.int32)}, "must be torch.int64"),
        ({3: torch.zeros(3)}, "weights is"),
        ({0: torch.zeros(2, 42)[:, ::2]}, "contiguous"),
        ({5: torch.zeros(2).double()}, "kl is"),
    ],
)
def test_loss_kernel_refuses_in_words(change: dict[int, torch.Tensor], words: str) -> None:
    """Shapes, dtypes and strides that do not fit are named."""
    _, _, ids, logprobs, weights = case_of(2, 4, 21, 3, seed=5)
    given = [torch.zeros(2, 21), ids, logprobs, weights, 1.0, torch.empty(2), torch.empty(2)]
    for place, tensor in change.items():
        given[place] = tensor
    with pytest.raises(ValueError, match=words):
        loss_rows(*given, with_gradient=True)  # type: ignore[arg-type]
