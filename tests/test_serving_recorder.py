"""What the engine logs is what happened: tokens, positions, verdicts and the target's law."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_rig import Changing, Rig, build_rig, counts_of, prompts, reference_models, request

from adapter.contracts import Verdict, VerifiedBlock
from adapter.sections import LogSettings
from serving.engine.control.fixed import FixedGamma

N = 50
TOP_K = 16


@pytest.fixture(scope="module")
def rig(folder):
    rig = build_rig(folder, folder / "data")
    yield rig
    rig.built.publisher.close()


@pytest.fixture(scope="module")
def target(rig):
    return reference_models(rig.pair)[0]


def _items(rig: Rig, count: int = 4) -> list:
    ids = prompts(rig.engine.target.model.config.vocab_size)[:count]
    return [
        request(str(i), prompt, N, temperature=[0.0, 0.8, 1.0, 1.2][i % 4], seed=i, top_p=[1.0, 0.9][i % 2])
        for i, prompt in enumerate(ids)
    ]


def _of(rig: Rig, name: str) -> list[VerifiedBlock]:
    return [block for block in rig.log.blocks if block.request_id == name]


@pytest.fixture(scope="module")
def logged(rig):
    """Four requests, draft lengths that change, and a swap in the middle."""
    rig.collect(LogSettings(top_k=TOP_K, flush_tokens=16, max_context_tokens=32))
    rig.engine.controller = Changing(2)
    items, base = _items(rig), rig.built.hotswap._slots.get(0)

    def swap(step: int) -> None:
        if step in (6, 12):
            rig.swap(step, base)

    rig.run(items, swap)
    rig.engine.controller = FixedGamma(3)
    return items, rig.log


def test_blocks_reconstruct_every_token(rig, logged):
    """Blocks of a request cover each generated position once, in order, with the committed token."""
    for item in logged[0]:
        positions: list[int] = []
        for block in _of(rig, item.request_id):
            tokens, first = block.array("token_ids"), block.first_position
            assert tokens.tolist() == item.tokens[first : first + len(tokens)]
            positions += block.array("positions").tolist()
        assert positions == list(range(item.prompt_tokens, len(item.tokens)))


def test_a_long_request_is_flushed_on_the_way(rig, logged):
    """No block holds much more than `flush_tokens` records or `max_context_tokens` of context (I5)."""
    for item in logged[0]:
        blocks = _of(rig, item.request_id)
        assert len(blocks) >= 3
        for block in blocks:
            assert block.num_records < 16 + 9
            assert len(block.array("token_ids")) - block.num_records <= 32


def test_verdicts_say_what_happened(rig, logged):
    """Accepted means that the draft said the committed token, rejected that it did not; counts add up (P1, N1)."""
    for item in logged[0]:
        tally = dict.fromkeys(Verdict, 0)
        for block in _of(rig, item.request_id):
            tokens = block.array("token_ids")[block.array("positions") - block.first_position]
            verdicts, drafted = block.array("verdicts"), block.array("draft_ids")
            assert bool((drafted[verdicts == Verdict.ACCEPTED] == tokens[verdicts == Verdict.ACCEPTED]).all())
            assert bool((drafted[verdicts == Verdict.REJECTED] != tokens[verdicts == Verdict.REJECTED]).all())
            said = block.array("draft_logprobs")[verdicts != Verdict.UNDRAFTED]
            assert np.isfinite(said).all()
            assert (said <= 0).all()
            for verdict in Verdict:
                tally[verdict] += int((verdicts == verdict).sum())
        counts = counts_of([item])
        assert tally[Verdict.ACCEPTED] == counts.num_accepted
        assert tally[Verdict.ACCEPTED] + tally[Verdict.REJECTED] == counts.num_examined
        assert sum(tally.values()) == item.num_generated


@torch.inference_mode()
def test_the_logged_law_is_the_targets(rig, target, logged):
    """Top-k ids, log-probs and tail mass equal a fresh forward's softmax at temperature 1, within float16."""
    for item in logged[0]:
        law = torch.log_softmax(target(input_ids=torch.tensor([item.tokens])).logits[0].float(), -1).numpy()
        for block in _of(rig, item.request_id):
            for row, position in enumerate(block.array("positions").tolist()):
                ids, logprobs = block.array("topk_ids")[row], block.array("topk_logprobs")[row].astype("f4")
                true = law[position - 1]
                np.testing.assert_allclose(logprobs, true[ids], atol=2e-2, rtol=2e-3)
                assert set(ids[:4].tolist()) <= set(np.argsort(-true)[:6].tolist())
                assert block.array("tail_mass")[row] == pytest.approx(1 - np.exp(true[ids]).sum(), abs=5e-3)


def test_every_round_carries_the_version_that_drafted_it(rig, logged):
    """Spans are in order and name the versions that were swapped in; outcomes count the same ones (I3)."""
    for item in logged[0]:
        spans = [span for block in _of(rig, item.request_id) for span in block.versions]
        assert [span.start for span in spans] == sorted(span.start for span in spans)
        assert {span.version for span in spans} == set(item.by_version) == {0, 6, 12}
    for outcome in logged[1].outcomes:
        assert {one.version for one in outcome.by_version} == {0, 6, 12}


def test_no_block_has_two_versions_from_one_position(rig, logged):
    """A span that begins where the block's records do is not said twice."""
    for block in logged[1].blocks:
        starts = [span.start for span in block.versions]
        assert len(set(starts)) == len(starts), block.versions


def test_one_outcome_a_request(rig, logged):
    """Each request leaves exactly one outcome with what the client got and how long it took."""
    items, log = logged
    assert sorted(outcome.request_id for outcome in log.outcomes) == [item.request_id for item in items]
    for outcome in log.outcomes:
        assert (outcome.delivered_tokens, outcome.finish_reason) == (N, "length")
        assert 0 <= outcome.queue_s <= outcome.first_token_s <= outcome.total_s


def test_an_end_inside_a_block_is_the_last_record(rig):
    """What verification accepted after the end token is neither delivered nor logged (S1, N3)."""
    rig.collect(LogSettings(top_k=TOP_K))
    free = _items(rig, 1)[0]
    rig.run([free])
    end = free.tokens[free.prompt_tokens + 9]
    item = request("e", free.tokens[: free.prompt_tokens], N, gamma=8, ends=[end])
    rig.run([item])
    blocks = _of(rig, "e")
    assert blocks[-1].array("token_ids")[-1] == end
    assert sum(block.num_records for block in blocks) == item.num_generated == rig.log.outcomes[-1].delivered_tokens


def test_a_cancelled_request_says_what_was_delivered(rig):
    """A client that left is logged as cancelled, with the tokens it had received."""
    rig.collect(LogSettings(top_k=TOP_K))
    item = _items(rig, 1)[0]
    rig.engine.submit(item)
    rig.engine.step()
    rig.engine.step()
    rig.engine.end(item.request_id, "cancelled", 3)
    assert [(one.finish_reason, one.delivered_tokens) for one in rig.log.outcomes] == [("cancelled", 3)]
    assert sum(block.num_records for block in _of(rig, item.request_id)) == item.num_generated
    assert not rig.engine.recorder._open


def test_a_request_that_never_ran_leaves_an_outcome_and_no_block(rig):
    """Cancelled while it waited: nothing was generated, and the log says so."""
    rig.collect(LogSettings(top_k=TOP_K))
    item = _items(rig, 1)[0]
    rig.engine.submit(item)
    rig.engine.end(item.request_id, "cancelled", 0)
    assert not rig.log.blocks
    assert [one.delivered_tokens for one in rig.log.outcomes] == [0]


def test_logging_can_be_switched_off(rig):
    """With `log.enabled = false` nothing is offered and the tokens are the same."""
    first, second = _items(rig), _items(rig)
    rig.collect(LogSettings(top_k=TOP_K))
    said = rig.run(first)
    rig.collect(LogSettings(enabled=False))
    assert rig.run(second) == said
    assert not rig.log.blocks
    assert not rig.log.outcomes


def test_rejections_are_all_logged_and_others_by_chance(rig, logged):
    """With a share of 0.3, what is logged is a subset of everything: all rejections, and of the rest as many as chance
    says; a flush elsewhere draws the same ones.

    n = about 150 positions that were not rejected, the requests' own seeds; the bound is four standard errors.
    """

    def run(flush_tokens: int, share: float) -> dict[tuple[str, int], int]:
        rig.collect(LogSettings(top_k=TOP_K, flush_tokens=flush_tokens, max_context_tokens=32, accepted_share=share))
        rig.run(_items(rig))
        found = {}
        for block in rig.log.blocks:
            assert block.keep_probability == share
            assert len(block.array("topk_ids")) == len(block.array("tail_mass")) == block.num_records > 0
            for position, verdict in zip(block.array("positions"), block.array("verdicts"), strict=True):
                found[block.request_id, int(position)] = int(verdict)
        return found

    whole, thin, again = run(16, 1.0), run(16, 0.3), run(64, 0.3)
    assert thin == again
    assert thin.items() <= whole.items()
    rejected = {key for key, verdict in whole.items() if verdict == Verdict.REJECTED}
    assert rejected
    assert rejected <= thin.keys()
    others, drawn = len(whole) - len(rejected), len(thin) - len(rejected)
    assert abs(drawn / others - 0.3) < 4 * (0.21 / others) ** 0.5


def test_who_opts_out_is_not_logged_but_still_counted(rig):
    """A request that must not be learned from leaves no block, and its outcome all the same; tenants are noted."""
    rig.collect(LogSettings(top_k=TOP_K, flush_tokens=16))
    first, second = _items(rig, 2)
    first.learn, second.tenant = False, "abc"
    rig.run([first, second])
    assert {block.request_id for block in rig.log.blocks} == {second.request_id}
    assert {block.tenant for block in rig.log.blocks} == {"abc"}
    assert {outcome.request_id: outcome.learn for outcome in rig.log.outcomes} == {
        first.request_id: False, second.request_id: True,
    }  # fmt: skip
