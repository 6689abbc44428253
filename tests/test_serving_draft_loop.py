"""The compiled draft loop says what the draft model's forwards say stage by stage, to the last token and book entry."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_rig import request
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kernels.packed_linear import can_compile
from serving.engine import attention
from serving.engine.attention import KVPool
from serving.engine.control.measuring import host_timers
from serving.engine.proposers.base import Proposal
from serving.engine.proposers.draft import DraftProposer
from serving.engine.proposers.draft_loop import DraftLoop
from serving.engine.runner import Forwards, ModelRunner
from serving.engine.sequence import Sequence
from serving.engine.trimmed_head import TrimmedHead
from serving.engine.work import Work

pytestmark = pytest.mark.skipif(not can_compile(), reason="no C kernels here")

VOCAB = 1003  # neither whole vectors nor whole blocks of noise
BLOCK, BLOCKS = 4, 160
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "tie_word_embeddings": True,
}  # fmt: skip
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),  # biases
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=16)),  # normed heads
}
TEMPERATURES = (0.0, 0.7, 1.0, 0.3, 1.6)


@dataclass
class Drafter:
    """A draft model with its pool, drafting in one call or stage by stage."""

    proposer: DraftProposer

    @property
    def pool(self) -> KVPool:
        return self.proposer.runner.pool

    def propose(self, items: list[Sequence], gammas: list[int], *, at_once: bool) -> list[Proposal]:
        """Draft for copies of requests, which the originals then take their state from."""
        loop, self.proposer.loop = self.proposer.loop, self.proposer.loop if at_once else None
        try:
            return self.proposer.propose(items, gammas)
        finally:
            self.proposer.loop = loop

    def both(self, items: list[Sequence], gammas: list[int]) -> tuple[list[Proposal], list[Proposal]]:
        """Draft both ways from the same state; fail unless books and caches then agree bit for bit."""
        before = copy.deepcopy((self.pool.keys, self.pool.values))
        twins = copy.deepcopy(items)
        staged = self.propose(twins, gammas, at_once=False)
        expected, caches = self.books(twins), copy.deepcopy((self.pool.keys, self.pool.values))
        for now, then in zip((*self.pool.keys, *self.pool.values), (*before[0], *before[1]), strict=True):
            now.copy_(then)
        self.proposer.num_not_finite, self.proposer._poisoned = 0, set()
        forward, self.proposer._forward = self.proposer._forward, None  # must not be asked
        try:
            at_once = self.propose(items, gammas, at_once=True)
        finally:
            self.proposer._forward = forward
        assert self.books(items) == expected
        written = zip((*self.pool.keys, *self.pool.values), (*caches[0], *caches[1]), strict=True)
        assert all(torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0)) for now, then in written)
        return staged, at_once

    def books(self, items: list[Sequence]) -> tuple[Any, ...]:
        proposer = self.proposer
        return proposer.forwards, [item.num_draft_kv for item in items], proposer.num_not_finite, proposer._poisoned


def drafter(
    kind: str = "llama", dtype: torch.dtype = torch.bfloat16, *, trimmed: int = 0, width: int = VOCAB, seed: int = 0,
    budget: int = 512, keep_laws: bool = False, **forwards: Any,
) -> Drafter:  # fmt: skip
    """A random draft model behind its proposer; `trimmed` scores so many tokens only, spread unevenly."""
    attention.register()
    torch.manual_seed(seed)
    build, config = MODELS[kind]
    model = build(config).to(dtype).eval().requires_grad_(False)
    if kind == "qwen2":
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_()
    runner = ModelRunner(model, KVPool(config, BLOCKS, BLOCK, dtype), Forwards(**({"int8": True} | forwards)))
    vocabulary: Any = None
    if trimmed:
        ids = np.sort(np.random.default_rng(seed).choice(VOCAB, trimmed, replace=False)).astype(np.uint32)
        runner.head = TrimmedHead(model.lm_head, ids)
        vocabulary = SimpleNamespace(head=runner.head)
    proposer = DraftProposer(runner, keep_laws=keep_laws, vocab=width, catch_up_tokens=budget, vocabulary=vocabulary)
    return Drafter(proposer)


def requests(lengths: list[tuple[int, int]], temperatures: tuple[float, ...] = TEMPERATURES) -> list[Sequence]:
    """Requests of (tokens the draft has read, tokens it lacks), on blocks that lie in no order."""
    generator, blocks = torch.Generator().manual_seed(len(lengths)), list(range(1, BLOCKS))
    order = torch.randperm(len(blocks), generator=generator).tolist()
    made = []
    for i, (read, missing) in enumerate(lengths):
        tokens = torch.randint(0, VOCAB - 3, (read + missing,), generator=generator).tolist()
        sampling = {"temperature": temperatures[i % len(temperatures)], "seed": (i * 0x9E3779B97F4A7C15 + 5) % 2**64}
        item = request(str(i), tokens, arrived_s=float(i), **sampling)
        count = -(-(read + missing + 9) // BLOCK)
        item.block_table = [blocks[n] for n in order[:count]]
        order = order[count:]
        made.append(item)
    return made


def warm(made: Drafter, items: list[Sequence], lengths: list[tuple[int, int]]) -> None:
    """Let the draft read what it is to have read."""
    for item, (read, _) in zip(items, lengths, strict=True):
        if read:
            tokens, item.tokens = item.tokens, item.tokens[:read]
            made.propose([item], [1], at_once=False)
            item.tokens = tokens


def assert_same(staged: list[Proposal], at_once: list[Proposal]) -> None:
    """The same tokens, and log-probs to within float32's rounding of a sum."""
    assert [item.tokens for item in at_once] == [item.tokens for item in staged]
    for one, other in zip(at_once, staged, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
        assert (one.proposer, one.version, len(one.scaled)) == (other.proposer, other.version, len(other.scaled))


MIXED = [(7, 1), (14, 2), (0, 40), (31, 1), (3, 1), (12, 2)]
GAMMAS = [3, 1, 2, 5, 8, 0]


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trimmed", [0, 300, 37])
def test_ragged_batches_draft_the_same_tokens(kind: str, dtype: torch.dtype, trimmed: int) -> None:
    """Greedy and sampled, γ 0 to 8, backlogs of 1, 2 and 40, scattered blocks whose edges are crossed; three rounds."""
    made, items = drafter(kind, dtype, trimmed=trimmed), requests(MIXED)
    warm(made, items, MIXED)
    for _ in range(3):
        staged, at_once = made.both(items, GAMMAS)
        assert [len(proposal.tokens) for proposal in at_once] == GAMMAS
        assert_same(staged, at_once)
        for item, proposal in zip(items, at_once, strict=True):
            before, kept = len(item.tokens), proposal.tokens[:2]
            item.tokens = item.tokens + kept + [11]
            made.proposer.vocabulary, vocabulary = None, made.proposer.vocabulary
            made.proposer.committed(item, before, proposal, len(kept))
            made.proposer.vocabulary = vocabulary
            item.block_table = item.block_table + [0] * 3


@pytest.mark.parametrize("trimmed", [0, 517])
@pytest.mark.parametrize("spread", [0.02, 0.2, 2.0])
def test_draws_are_those_of_the_sampler(trimmed: int, spread: float) -> None:
    """Flat, usual and steep laws (n=5 temperatures, 24 seeds each, 4 tokens): the noise decides the same everywhere."""
    made = drafter(dtype=torch.float32, trimmed=trimmed)
    model = made.proposer.runner.model
    model.model.norm.weight.fill_(spread)
    made.proposer.runner.forwards.prepare(model)
    items = requests([(0, 5)] * 24)
    said = set()
    for temperature in TEMPERATURES:
        for item in items:
            object.__setattr__(item.sampling, "temperature", temperature)
            item.num_draft_kv = 0
        staged, at_once = made.both(items, [4] * len(items))
        assert_same(staged, at_once)
        said |= {token for proposal in at_once for token in proposal.tokens}
    assert len(said) > (100 if spread < 1 else 20)


def test_equal_logits_give_the_first_token_when_greedy_and_the_noisiest_when_sampled() -> None:
    """A model whose logits are all alike draws by noise alone; greedy ones take the first column."""
    made, lengths = drafter(dtype=torch.float32), [(0, 3)] * 10
    made.proposer.runner.model.model.norm.weight.zero_()
    made.proposer.runner.forwards.prepare(made.proposer.runner.model)
    items = requests(lengths)
    staged, at_once = made.both(items, [3] * 10)
    assert_same(staged, at_once)
    assert at_once[0].tokens == [0, 0, 0]
    assert len({tuple(proposal.tokens) for proposal in at_once}) == 9


def test_a_draft_of_another_width_stays_within_the_targets() -> None:
    """Padded models: no token from the target's width on, and ids the draft has no row for are read as its last."""
    made, items = drafter(width=500), requests([(0, 6), (0, 6)], (1.6, 0.0))
    staged, at_once = made.both(items, [6, 6])
    assert_same(staged, at_once)
    assert max(token for proposal in at_once for token in proposal.tokens) < 500
    runner, work = made.proposer.runner, [Work([1, 2, 3], 0, [4], 1)]
    sampling = [request("r", [4], temperature=9.0).sampling]
    wide = DraftLoop(runner, VOCAB).run(work, [8], sampling, runner.model)  # as when the draft is timed
    assert wide is not None
    assert max(wide[0].tokens) >= 500
    assert_same(*made.both(requests([(0, 6), (0, 6)], (1.6, 0.0)), [6, 6]))
    wider = drafter(width=VOCAB + 40)
    items = requests([(0, 6), (0, 6)], (1.6, 0.0))
    items[0].tokens[-1] = VOCAB + 30
    assert_same(*wider.both(items, [3, 3]))


def test_who_is_behind_reads_and_does_not_draft() -> None:
    """Backlogs beyond the budget are read in part beside rounds that draft; sizes of forwards say so."""
    made = drafter(budget=24)
    items = requests([(9, 1), (0, 40), (0, 10), (0, 10)])
    warm(made, items[:1], [(9, 1)])
    staged, at_once = made.both(items, [2, 3, 3, 3])
    assert_same(staged, at_once)
    assert [len(proposal.tokens) for proposal in at_once] == [2, 0, 0, 0]
    assert items[1].num_draft_kv == 24
    assert made.proposer.forwards == [25, 1]


def test_a_version_pinned_beside_the_live_one_drafts_its_own_tokens() -> None:
    """Two versions in one batch: each drafts at once with its own weights, and is named."""
    made, other = drafter(trimmed=300), drafter(seed=3)
    items = requests([(0, 5), (0, 5), (0, 5)])
    made.proposer._resident = lambda version: other.proposer.runner.model
    made.proposer.runner.forwards.of(other.proposer.runner.model)
    items[1].version = 4
    staged, at_once = made.both(items, [3, 3, 3])
    assert_same(staged, at_once)
    assert [proposal.version for proposal in at_once] == [0, 4, 0]
    assert made.proposer.forwards == [10, 2, 2, 5, 1, 1]
    alone = made.propose(requests([(0, 5), (0, 5), (0, 5)])[:2], [0, 3], at_once=True)
    assert alone[1].tokens != at_once[1].tokens


@pytest.mark.parametrize("where", ["cache", "layer", "head"])
def test_numbers_that_are_none_are_noticed(where: str) -> None:
    """NaN in one request's cache or in the weights: counted once a forward, its blocks named, mates untouched."""
    lengths = [(9, 1), (9, 2), (0, 30)]
    made, items = drafter(budget=20), requests(lengths)
    warm(made, items, lengths)
    items[2].num_draft_kv = 0
    model = made.proposer.runner.model
    if where == "cache":
        made.pool.values[1][items[1].block_table[0]] = float("nan")
    elif where == "layer":
        model.model.layers[1].mlp.down_proj.weight[3] = float("nan")
        made.proposer.runner.forwards.prepare(model)
    else:
        model.lm_head.weight.data = model.lm_head.weight.clone().index_fill_(0, torch.tensor([3]), float("inf"))
        made.proposer.runner.forwards.prepare(model)
    staged, at_once = made.both(items, [3, 2, 2])
    assert made.proposer.num_not_finite == (2 if where == "cache" else 4)
    broken = items[1:2] if where == "cache" else items
    assert made.proposer._poisoned == {block for item in broken for block in item.block_table}
    assert [len(proposal.tokens) for proposal in at_once] == [3, 2, 0]
    assert [proposal.tokens for proposal in at_once] == [proposal.tokens for proposal in staged]


def test_weights_written_in_place_are_the_ones_that_draft() -> None:
    """A slot whose weights change and are prepared again drafts with the new ones, embedding and head included."""
    made, items = drafter(), requests([(0, 6)], (0.0,))
    first = made.both(items, [5])[1]
    model = made.proposer.runner.model
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(-1)
    made.proposer.runner.forwards.prepare(model)
    items = requests([(0, 6)], (0.0,))
    staged, at_once = made.both(items, [5])
    assert_same(staged, at_once)
    assert at_once[0].tokens != first[0].tokens
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).contiguous(), requires_grad=False)
    made.proposer.runner.forwards.prepare(model)
    items = requests([(0, 6)], (0.0,))
    flipped = made.both(items, [1])[1]
    assert flipped[0].tokens == [VOCAB - 1 - at_once[0].tokens[0]]


def test_another_head_is_taken_with_the_next_round() -> None:
    """Vocabularies change between rounds, also back to all tokens."""
    made, other = drafter(trimmed=300), drafter(trimmed=200, seed=8)
    proposer = made.proposer
    heads = [proposer.runner.head, other.proposer.runner.head, None, proposer.runner.head]
    for head in heads:
        proposer.runner.head = proposer.vocabulary.head = head
        items = requests([(0, 6)] * 3)
        staged, at_once = made.both(items, [4] * 3)
        assert_same(staged, at_once)
        kept = set(range(VOCAB)) if head is None else set(head.token_ids.tolist())
        assert {token for proposal in at_once for token in proposal.tokens} <= kept


@pytest.mark.parametrize(
    ("sampling", "settings"),
    [
        ({"temperature": 0.8, "top_p": 0.9}, {}), ({"temperature": 0.8, "top_k": 5}, {}),
        ({"temperature": 0.8, "min_p": 0.1}, {}), ({"temperature": 0.8}, {"compiled": False}),
        ({"temperature": 0.8}, {"lean": False}), ({"temperature": 0.8}, {"keep_laws": True}),
        ({}, {"pack": False}),
    ],
)  # fmt: skip
def test_what_is_not_covered_goes_stage_by_stage(sampling: dict[str, Any], settings: dict[str, Any]) -> None:
    """Cuts, the maximal coupling's laws, and models that are not compiled draft as before, beside plain ones too."""
    made, items = drafter(dtype=torch.float32, **settings), requests([(0, 6), (0, 6)])
    for name, value in sampling.items():
        object.__setattr__(items[1].sampling, name, value)
    twins = copy.deepcopy(items)
    staged = made.propose(twins, [3, 3], at_once=False)
    asked, forward = [], made.proposer._forward
    made.proposer._forward = lambda work, model: asked.append(work) or forward(work, model)
    assert_same(staged, made.propose(items, [3, 3], at_once=True))
    assert len(asked) == 3


def test_cuts_of_greedy_requests_do_not_matter() -> None:
    """top-k, top-p and min-p say nothing at temperature 0, so such a request is drafted at once."""
    made, items = drafter(), requests([(0, 6)], (0.0,))
    for name, value in {"top_k": 3, "top_p": 0.5, "min_p": 0.2}.items():
        object.__setattr__(items[0].sampling, name, value)
    assert_same(*made.both(items, [3]))


def test_blocks_that_do_not_hold_what_is_read_are_refused() -> None:
    """Too few blocks, and blocks the pool does not have, are errors rather than memory of someone else's."""
    made = drafter()
    for table, message in (
        ([3, 5], "2 blocks do not hold 10"),
        ([3, 5, BLOCKS], f"the cache's {BLOCKS}"),
        ([3, -1, 5], "a block"),
    ):
        items = requests([(0, 6)])
        items[0].block_table = table
        with pytest.raises(IndexError, match=message):
            made.propose(items, [5], at_once=True)
    items = requests([(0, 6)])
    items[0].tokens[2] = VOCAB
    with pytest.raises(IndexError, match=f"one of the draft's {VOCAB}"):
        made.propose(items, [2], at_once=True)


def test_the_cost_table_times_the_rounds_that_are_drafted_at_once() -> None:
    """Timers of a draft under the gumbel coupling call the loop, two tokens deep; backlogs are read once."""
    made = drafter()
    runner, asked, times = made.proposer.runner, [], iter(float(second) for second in range(100))
    timers = host_timers(runner, runner, 4, lambda: next(times), at_once=True)
    assert timers.draft is not None
    assert timers.read is not None
    forward = runner.forward
    runner.forward = lambda work, model=None: asked.append(work) or forward(work, model)
    assert timers.draft(4, 0) == 0.5
    assert timers.read(30, 0) == 1.0
    assert asked == []
    assert timers.target(4, 0) == 1.0
    assert len(asked) == 1
    plain = host_timers(runner, runner, 4, lambda: next(times)).draft
    assert plain is not None
    assert plain(4, 8) == 1.0
    assert len(asked) == 3
