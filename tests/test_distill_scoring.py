"""Acceptance of positions: at the request's temperature, cuts and vocabulary, as serving would draw."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from distill_tiny import VOCAB, block_of, make_blocks, make_pair

from adapter.contracts import Sampling
from adapter.models import load_draft
from distill.batches import collate, judged_states
from distill.scoring import position_acceptance, score_blocks, target_law, weighted_mean
from kernels.acceptance import gumbel_acceptance, maximal_acceptance
from kernels.sampling import RowParams, shape_logits

CUTS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.4},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.set_num_threads(1)
    return make_pair(tmp_path_factory.mktemp("pair"))


def params(count: int, **asked: float) -> RowParams:
    zeros = torch.zeros(count, dtype=torch.int64)
    return RowParams(
        torch.full((count,), asked.get("temperature", 1.0)), torch.full((count,), asked.get("top_p", 1.0)),
        zeros + int(asked.get("top_k", 0)), zeros, zeros, torch.full((count,), asked.get("min_p", 0.0)),
    )  # fmt: skip


def whole_log(pair, logits: torch.Tensor, **asked: float):
    """One block that logged `logits` [n, VOCAB] in full, and what to score it with: states and a head."""
    logprobs, ids = torch.log_softmax(logits, -1).sort(-1, descending=True)
    tokens = np.arange(len(logits) + 4) % VOCAB
    block = block_of(pair, "r", tokens, ids.numpy(), logprobs.numpy(), 4)
    return replace(block, sampling=Sampling(**asked))


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
@pytest.mark.parametrize("asked", CUTS)
@pytest.mark.parametrize("trimmed", [False, True])
def test_both_laws_are_what_serving_draws_from(pair, asked, coupling, trimmed):
    """With the whole vocabulary logged the acceptance is that of both shaped laws, within what float16 rounds."""
    draw = torch.Generator().manual_seed(0)
    target, draft = (2 * torch.randn(200, VOCAB, generator=draw) for _ in range(2))
    draft = target + 0.5 * draft
    allowed = torch.arange(0, VOCAB, 2) if trimmed else None
    block = whole_log(pair, target, **asked)
    found = position_acceptance(draft, torch.eye(VOCAB), collate([block]), coupling, allowed)
    rows = params(200, **asked)
    if trimmed:
        scored = torch.full_like(draft, -torch.inf)
        scored[:, allowed] = shape_logits(draft[:, allowed], rows)
    else:
        scored = shape_logits(draft, rows)
    closed_form = gumbel_acceptance if coupling == "gumbel" else maximal_acceptance
    truth = closed_form(torch.softmax(shape_logits(target, rows), -1).double(), torch.softmax(scored, -1).double())
    wrong = (found - truth).abs()
    assert float(wrong.median()) < 1e-3
    assert float((wrong > 5e-3).double().mean()) < 0.02  # a border that float16 moved across a token


def test_greedy_requests_are_judged_by_their_winner(pair):
    """Cuts and temperature do not matter to them; a trimmed draft says the best of what it can say."""
    target = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(1))
    batch = collate([whole_log(pair, target, temperature=0.0, top_k=3, top_p=0.5)])
    assert bool(position_acceptance(target, torch.eye(VOCAB), batch, "gumbel").all())
    allowed = torch.arange(10, VOCAB)
    found = position_acceptance(target, torch.eye(VOCAB), batch, "gumbel", allowed)
    assert found.tolist() == (target.argmax(-1) >= 10).double().tolist()


@pytest.mark.parametrize(
    ("asked", "tail"),
    [({}, 0.1), ({"top_k": 3}, 0.0), ({"top_k": 50}, 0.1), ({"top_p": 0.6}, 0.0), ({"top_p": 0.95}, 0.05 / 0.95),
     ({"min_p": 0.5}, 0.0), ({"min_p": 0.1}, 0.1)],
)  # fmt: skip
def test_what_lies_outside_the_logged_top_k(asked, tail):
    """Laws of 0.4, 0.3, 0.2 and 0.1 elsewhere: a cut inside the log leaves nothing outside; a nucleus beyond it
    takes of the rest what its mass lacks; a cut that cannot be seen takes all of it."""
    law = target_law(torch.tensor([[0.4, 0.3, 0.2]]).log(), params(1, **asked))
    assert float(law.sum()) == pytest.approx(1.0)
    assert float(law[0, -1]) == pytest.approx(tail, abs=1e-6)


def test_a_nucleus_is_that_of_what_top_k_left():
    """0.5, 0.3, 0.2 after top-k 2 is 0.625, 0.375: a nucleus of 0.6 keeps one token, not two."""
    law = target_law(torch.tensor([[0.5, 0.3, 0.15]]).log(), params(1, top_k=2, top_p=0.6))
    assert law[0].tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0])


def test_the_target_itself_is_always_accepted(pair):
    """Scored as a draft, the target agrees with its own log, sampled and greedy, under both couplings."""
    blocks = make_blocks(pair, 12, seed=5) + make_blocks(pair, 12, seed=6, temperature=0.0, name="g")
    cut = [replace(b, sampling=replace(b.sampling, top_k=8, top_p=0.9)) for b in make_blocks(pair, 6, name="c")]
    target = type(load_draft(pair, torch.float32)).from_pretrained(pair.target_path).eval()
    head = target.get_output_embeddings().weight.detach()
    for coupling in ("gumbel", "maximal"):
        scores = np.concatenate(score_blocks(target, head, [*blocks, *cut], coupling))
        assert scores.mean() > 0.99


def test_scores_stay_with_their_blocks(pair):
    """Blocks of several requests in any order, or one by one, score the same."""
    blocks = make_blocks(pair, 5, seed=2) + make_blocks(pair, 3, seed=3, answer=40, name="long")
    model = load_draft(pair, torch.float32)
    head = model.get_output_embeddings().weight.detach()
    together = score_blocks(model, head, blocks[::-1], "gumbel")[::-1]
    for block, scores in zip(blocks, together, strict=True):
        np.testing.assert_allclose(scores, score_blocks(model, head, [block], "gumbel")[0], atol=1e-4)
    states = judged_states(model, collate(blocks[:1]))
    alone = position_acceptance(states, head, collate(blocks[:1]), "gumbel").detach().numpy()
    np.testing.assert_allclose(together[0], alone, atol=1e-4)


def test_logits_that_are_no_numbers_score_no_number(pair):
    """They are neither accepted nor refused; the gate decides about them."""
    block = whole_log(pair, torch.randn(4, VOCAB), temperature=1.0)
    draft = torch.randn(4, VOCAB)
    draft[2] = torch.nan
    found = position_acceptance(draft, torch.eye(VOCAB), collate([block]), "gumbel")
    assert found.isnan().tolist() == [False, False, True, False]


def test_a_draft_without_any_allowed_token_is_an_error(pair):
    """A vocabulary that lies beyond the draft's own cannot be scored."""
    model = load_draft(pair, torch.float32)
    head = model.get_output_embeddings().weight.detach()
    with pytest.raises(ValueError, match="none of the 2 allowed tokens"):
        score_blocks(model, head, [], "gumbel", torch.tensor([VOCAB, VOCAB + 1]))


def test_means_count_what_records_stand_for(pair):
    """Of 24 records 8 are rejected and kept for sure; the 16 others stand for four each."""
    [block] = make_blocks(pair, 1)
    thin = replace(block, keep_probability=0.25)
    rejected = np.arange(24) % 3 == 0
    assert weighted_mean([thin], [np.where(rejected, 0.0, 1.0)]) == pytest.approx(64 / 72)
    assert weighted_mean([], []) is None
