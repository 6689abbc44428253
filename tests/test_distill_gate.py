"""The offline gate: right numbers, whole requests resampled, and the artifact that serving would run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from distill_tiny import make_blocks, make_pair
from safetensors.torch import save_file

from adapter import artifacts
from adapter.models import load_draft
from adapter.pairs import Pair
from distill.batches import collate, judged_states, plan_batches
from distill.gate import GateRules, compare, judge, score_blocks, tempered_laws
from distill.tuning import attach, factors_of, initial_factors

RULES = GateRules(
    coupling="gumbel", min_gain=0.0, confidence=0.95, min_requests=10, segment_margin=0.02, max_norm_ratio=5.0, seed=0
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    torch.set_num_threads(1)
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def blocks(pair):
    return make_blocks(pair, 12, seed=5) + make_blocks(pair, 12, seed=6, temperature=0.0, segment="code", name="g")


def _store(pair: Pair, root: Path, factors: dict[str, torch.Tensor], rank: int = 4, scale: float = 1.0) -> str:
    path = root / "made.safetensors"
    root.mkdir(parents=True, exist_ok=True)
    save_file(factors, path)
    return artifacts.store(
        root, path, target_fingerprint=pair.target_fingerprint, base_fingerprint=pair.base_fingerprint,
        rank=rank, scale=scale, trained_on={}, created_at_s=0.0,
    ).sha256  # fmt: skip


def _repair(pair: Pair, rank: int = 24) -> dict[str, torch.Tensor]:
    """Factors that move the disturbed draft most of the way to its target: the truncated difference."""
    draft = load_draft(pair, torch.float32)
    target = type(draft).from_pretrained(pair.target_path)
    factors = {}
    for name in pair.lora_shapes:
        difference = target.get_submodule(name).weight - draft.get_submodule(name).weight
        u, s, v = torch.linalg.svd(difference.detach(), full_matrices=False)
        missing = max(0, rank - len(s))
        factors[f"{name}.lora_B"] = torch.nn.functional.pad(u[:, :rank] * s[:rank], (0, missing)).contiguous()
        factors[f"{name}.lora_A"] = torch.nn.functional.pad(v[:rank], (0, 0, 0, missing)).contiguous()
    return factors


def test_hidden_states_do_not_depend_on_padding_or_batch_mates(pair, blocks):
    """A block alone and among longer ones gives the same judged states."""
    model = load_draft(pair, torch.float32)
    long = make_blocks(pair, 1, seed=9, answer=40)
    alone = judged_states(model, collate(blocks[:1]))
    together = judged_states(model, collate([blocks[0], *long, blocks[1]]))
    torch.testing.assert_close(together[: len(alone)], alone, atol=1e-5, rtol=1e-4)


def test_batches_hold_every_block_once_within_the_token_budget():
    """Planning loses nothing; only a block longer than the budget stands alone."""
    lengths = [7, 300, 12, 45, 45, 90, 8, 1000, 33] * 20
    groups = plan_batches(lengths, 512, "seed")
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or max(lengths[i] for i in group) * len(group) <= 512 for group in groups)


def test_the_target_itself_is_always_accepted(pair, blocks):
    """Scored as a draft, the target agrees with its own log, sampled and greedy, under both couplings."""
    target = type(load_draft(pair, torch.float32)).from_pretrained(pair.target_path).eval()
    head = target.get_output_embeddings().weight.detach()
    for coupling in ("gumbel", "maximal"):
        scores = np.concatenate(score_blocks(target, head, blocks, coupling))
        assert scores.mean() > 0.995


def test_tempering_is_exact_when_nothing_lies_outside_the_top_k():
    """With the whole vocabulary logged both laws equal a plain softmax at that temperature."""
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(6).repeat(4, 1)
    logprobs = torch.log_softmax(logits, -1)
    heat = torch.tensor([0.3, 0.7, 1.0, 1.5])
    p, q = tempered_laws(logits, ids, logprobs, heat)
    truth = torch.softmax(logits / heat[:, None], -1).double()
    torch.testing.assert_close(p[:, :6], truth, atol=1e-4, rtol=0)
    torch.testing.assert_close(q[:, :6], truth, atol=1e-5, rtol=0)


def test_a_better_artifact_passes_and_the_sentence_carries_the_numbers(pair, blocks, tmp_path):
    """A candidate near the target is accepted more often than the base draft, in every segment."""
    sha256 = _store(pair, tmp_path / "a", _repair(pair), rank=24)
    result = judge(pair, tmp_path / "a", candidate=sha256, live=None, blocks=blocks, rules=RULES)
    assert result["passed"]
    assert result["requests"] == 24
    assert result["positions"] == 24 * 24
    low, high = result["interval"]
    assert 0 < low < result["difference"] < high
    assert set(result["by_segment"]) == {"chat", "code"}
    sentence = f"Passed: acceptance {result['live']:.3f} → {result['candidate']:.3f} ({result['difference']:+.3f} ["
    assert result["verdict"].startswith(sentence)
    assert result["verdict"].endswith("on 24 held-out requests, 576 positions.")


def test_a_candidate_equal_to_live_does_not_pass(pair, blocks, tmp_path):
    """Zero factors change nothing: difference and interval are zero and the answer is no."""
    sha256 = _store(pair, tmp_path / "a", initial_factors(pair.lora_shapes, 4, seed=0))
    result = judge(pair, tmp_path / "a", candidate=sha256, live=None, blocks=blocks, rules=RULES)
    assert not result["passed"]
    assert (result["difference"], result["interval"]) == (0.0, [0.0, 0.0])
    assert result["verdict"].startswith("Rejected, the gain is not certain")


def test_a_worse_candidate_than_live_is_rejected(pair, blocks, tmp_path):
    """Live is the artifact that is live, not the base draft."""
    root = tmp_path / "a"
    good, none = _store(pair, root, _repair(pair), rank=24), _store(pair, root, initial_factors(pair.lora_shapes, 4, 0))
    result = judge(pair, root, candidate=none, live=good, blocks=blocks, rules=RULES)
    assert not result["passed"]
    assert result["interval"][1] < 0


def test_the_merged_artifact_scores_as_the_trainer_saw_it_unmerged(pair, blocks, tmp_path):
    """Parity: adapter.lora.merge of the exported file and the live LoRA branch agree within 1e-4."""
    from adapter.settings import DistillSettings

    settings = DistillSettings(rank=4, alpha=8)
    factors = {name: 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
               for name, value in initial_factors(pair.lora_shapes, 4, 0).items()}  # fmt: skip
    model = load_draft(pair, torch.float32)
    tuned = attach(model, pair.lora_shapes, settings, factors)
    head = model.get_output_embeddings().weight.detach()
    score = float(np.concatenate(score_blocks(model, head, blocks, "gumbel")).mean())
    sha256 = _store(pair, tmp_path / "a", factors_of(tuned), scale=2.0)
    result = judge(pair, tmp_path / "a", candidate=sha256, live=None, blocks=blocks, rules=RULES, trainer_score=score)
    assert abs(result["parity"]) < 1e-4
    assert result["difference"] != 0


def test_an_artifact_that_must_not_be_loaded_fails_the_gate(pair, blocks, tmp_path):
    """NaN values and updates beyond the norm bound are a rejected verdict, not a crash."""
    root = tmp_path / "a"
    factors = initial_factors(pair.lora_shapes, 4, 0)
    name = next(iter(factors))
    broken = _store(pair, root, factors | {name: torch.full_like(factors[name], float("nan"))})
    huge = _store(pair, root, {key: torch.full_like(value, 9.0) for key, value in factors.items()})
    for sha256, word in ((broken, "NaN"), (huge, "norm")):
        result = judge(pair, root, candidate=sha256, live=None, blocks=blocks, rules=RULES)
        assert not result["passed"]
        assert word in result["verdict"]


def test_too_few_requests_are_undecided(pair, blocks):
    """A clear gain on fewer requests than the rule asks for does not pass."""
    old, new = [np.zeros(24)] * 5, [np.ones(24)] * 5
    result = compare(blocks[:5], old, new, RULES)
    assert not result["passed"]
    assert result["verdict"].startswith("Undecided, 10 held-out requests are needed")
    assert not compare([], [], [], RULES)["passed"]


def test_a_segment_that_certainly_loses_stops_an_overall_gain(blocks):
    """Forgetting one kind of traffic is not bought with a gain in another; the verdict names it."""
    old = [np.full(24, 0.5)] * 24
    new = [np.full(24, 0.9)] * 12 + [np.full(24, 0.4)] * 12
    result = compare(blocks, old, new, RULES)
    assert not result["passed"]
    assert "segment code loses 0.100" in result["verdict"]


def test_the_interval_covers_the_true_difference_when_tokens_of_a_request_hang_together(blocks):
    """200 seeded trials of 24 correlated requests: the 95 % interval holds the truth in at least 85 %
    (n = 200, bound 5 standard errors below the 92 % a percentile bootstrap of 24 reaches)."""
    draw = np.random.default_rng(11)
    covered = 0
    for _ in range(200):
        gains = draw.normal(0.05, 0.1, 24)
        result = compare(blocks, [np.zeros(24)] * 24, [np.full(24, gain) for gain in gains], RULES)
        covered += result["interval"][0] <= 0.05 <= result["interval"][1]
    assert covered >= 170
