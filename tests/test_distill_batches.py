"""Sequences laid end to end: states as if each were read alone, no token twice, weights by verdict and chance."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from distill_tiny import VOCAB, block_of, make_blocks, make_pair, tiny_model

from adapter.contracts import Verdict
from adapter.models import load_draft
from distill.batches import RowWeights, by_request, collate, judged_states, num_tokens, plan_batches
from distill.packing import use_packed_attention


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def alone(pair, block) -> torch.Tensor:
    """States of one block by a stock model with torch's attention, nothing packed."""
    model = load_draft(pair, torch.float32)
    tokens = torch.from_numpy(block.array("token_ids").astype(np.int64))[None]
    positions = torch.arange(tokens.shape[1])[None] + block.first_position
    states = model.model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state[0]
    return states[torch.from_numpy(block.array("positions").astype(np.int64)) - block.first_position - 1]


def cut(pair, block, first: int, last: int, context: int):
    """The records [first, last) of a block as a block of their own with some context tokens before them."""
    start = int(block.array("positions")[first])
    stop = int(block.array("positions")[last - 1]) + 1
    begin = max(0, start - context)
    return block_of(
        pair, block.request_id, block.array("token_ids")[begin:stop], block.array("topk_ids")[first:last],
        block.array("topk_logprobs")[first:last].astype(np.float32), start - begin, first_position=begin,
    )  # fmt: skip


def test_packed_sequences_do_not_see_each_other(pair):
    """Blocks of unequal lengths and first positions, in one row, give the states each has alone."""
    blocks = [
        *make_blocks(pair, 2, seed=1, prompt=3, answer=9, name="a"),
        *make_blocks(pair, 2, seed=2, prompt=20, answer=30, name="b"),
    ]
    late = dataclasses.replace(make_blocks(pair, 1, seed=3, name="c")[0])
    tokens, ids, laws = late.array("token_ids"), late.array("topk_ids"), late.array("topk_logprobs")
    blocks.append(block_of(pair, "late", tokens, ids, laws.astype(np.float32), 6, first_position=40))
    with torch.no_grad():
        found = judged_states(load_draft(pair, torch.float32), collate(blocks))
        wanted = torch.cat([alone(pair, block) for block in blocks])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_blocks_of_one_request_are_read_once(pair):
    """Three blocks that carry each other's tokens as context become one sequence, with the whole one's states."""
    whole = make_blocks(pair, 1, seed=4, prompt=5, answer=30)[0]
    parts = [cut(pair, whole, 0, 10, 99), cut(pair, whole, 10, 20, 99), cut(pair, whole, 20, 30, 8)]
    batch = collate([parts[2], parts[0], parts[1]])
    assert batch.lengths == [num_tokens([whole])] == [34]  # the last token of an answer is judged, never read
    with torch.no_grad():
        found = judged_states(load_draft(pair, torch.float32), batch)
        wanted = alone(pair, whole)
    torch.testing.assert_close(found, torch.cat([wanted[20:], wanted[:10], wanted[10:20]]), atol=1e-5, rtol=1e-4)


def test_a_gap_between_blocks_is_not_joined(pair):
    """Where tokens between two blocks are missing, each is a sequence of its own at its own positions."""
    whole = make_blocks(pair, 1, seed=5, prompt=5, answer=30)[0]
    parts = [cut(pair, whole, 0, 8, 99), cut(pair, whole, 20, 30, 4)]
    batch = collate(parts)
    assert len(batch.lengths) == 2
    with torch.no_grad():
        found = judged_states(load_draft(pair, torch.float32), batch)
    torch.testing.assert_close(found[8:], alone(pair, parts[1]), atol=1e-5, rtol=1e-4)


def test_gradients_reach_packed_sequences_alike(pair):
    """The gradient of a sum over states is the sum of what each block gives alone."""
    blocks = make_blocks(pair, 3, seed=6, answer=10)

    def gradient(groups):
        model = load_draft(pair, torch.float32)
        weight = model.model.layers[0].self_attn.v_proj.weight.requires_grad_()
        sum(judged_states(model, collate(group)).square().sum() for group in groups).backward()
        return weight.grad

    torch.testing.assert_close(gradient([blocks]), gradient([[block] for block in blocks]), atol=1e-3, rtol=1e-4)


def test_rows_count_by_verdict_and_by_the_chance_that_they_were_kept(pair):
    """A row kept with probability 1/4 stands for four, rejections for themselves; verdict weights multiply that."""
    block = dataclasses.replace(make_blocks(pair, 1, seed=7)[0], keep_probability=0.25)
    rejected = block.array("verdicts") == Verdict.REJECTED
    weights = collate([block], RowWeights(rejected=2.0, accepted=0.5)).weights.numpy()
    wanted = np.where(rejected, 2.0, 4.0 * 0.5)
    np.testing.assert_allclose(weights, wanted / wanted.sum(), rtol=1e-6)
    assert not collate([block], RowWeights(rejected=1.0, accepted=0.0)).weights.numpy()[~rejected].any()


@pytest.mark.parametrize("lengths", [[], [5], [600, 5, 5], [100] * 7, [511, 1, 1, 511, 512]])
def test_batches_hold_no_more_than_they_may(lengths):
    """Every item once; a group above the bound is a single item that is longer by itself."""
    groups = plan_batches(lengths, 512, "seed")
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= 512 or len(group) == 1 for group in groups)
    assert groups == plan_batches(lengths, 512, "seed")


def test_requests_stay_together(pair):
    """`by_request` keeps every block and puts a request's own in the order of their positions."""
    first, second = make_blocks(pair, 2, seed=8, answer=20)
    parts = [cut(pair, first, 10, 20, 5), second, cut(pair, first, 0, 10, 5)]
    groups = by_request(parts)
    assert [[block.request_id for block in group] for group in groups] == [["r0", "r0"], ["r1"]]
    assert groups[0][0].first_position < groups[0][1].first_position


def test_a_draft_with_a_window_is_refused_in_words():
    """Packed rows know no attention window, so such a draft is refused instead of trained wrongly."""
    model = tiny_model(0)
    model.config.sliding_window, model.config.use_sliding_window = 16, True
    with pytest.raises(ValueError, match="window of 16 tokens"):
        use_packed_attention(model)
    assert model.config.vocab_size == VOCAB
