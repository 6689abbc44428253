"""The offline gate on a real tiny pair: artifacts loaded as serving loads them, and compared with what is live."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from distill_tiny import TOP_K, VOCAB, make_blocks, make_pair
from safetensors.torch import save_file

from adapter import artifacts
from adapter.contracts import VerifiedBlock
from adapter.hotswap import DraftSlots
from adapter.models import load_draft
from adapter.pairs import Pair
from adapter.sections import DistillSettings
from distill.batches import collate, judged_states, plan_batches
from distill.factors import Factors, attach, factors_of, initial_factors
from distill.gate import judge
from distill.goodput import Costs
from distill.scoring import score_blocks, weighted_mean
from distill.tuning import Material, train
from distill.verdict import GateRules

RULES = GateRules(
    coupling="gumbel", min_gain=0.0, confidence=0.95, min_requests=10, segment_margin=0.02, max_norm_ratio=5.0, seed=0
)
BASE = {"live": None, "floor": None}
COSTS = Costs(
    target_rows=(1, 8), target_s=(0.010, 0.017), draft_rows=(1, 8), draft_s=(0.002, 0.002), overhead_s=0.0,
    batches=(1,), gamma_max=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    torch.set_num_threads(1)
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def blocks(pair) -> list[VerifiedBlock]:
    return make_blocks(pair, 12, seed=5) + make_blocks(pair, 12, seed=6, temperature=0.0, segment="code", name="g")


def stored(pair: Pair, root: Path, factors: Factors, rank: int = 4, scale: float = 1.0) -> str:
    path = root / "made.safetensors"
    root.mkdir(parents=True, exist_ok=True)
    save_file(factors, path)
    return artifacts.store(
        root, path, target_fingerprint=pair.target_fingerprint, base_fingerprint=pair.base_fingerprint,
        rank=rank, scale=scale, trained_on={}, created_at_s=0.0,
    ).sha256  # fmt: skip


def repair(pair: Pair, rank: int = 24) -> Factors:
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


def noise(pair: Pair, seed: int, size: float, rank: int = 4) -> Factors:
    """Random factors."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(value.shape, generator=draw)
        for name, value in initial_factors(pair.lora_shapes, rank, 0).items()
    }


def test_hidden_states_do_not_depend_on_batch_mates(pair, blocks):
    """A block alone and among longer ones gives the same judged states."""
    model = load_draft(pair, torch.float32)
    long = make_blocks(pair, 1, seed=9, answer=40, name="long")
    alone = judged_states(model, collate(blocks[:1]))
    together = judged_states(model, collate([blocks[0], *long, blocks[1]]))
    torch.testing.assert_close(together[: len(alone)], alone, atol=1e-5, rtol=1e-4)


def test_batches_hold_every_block_once_within_the_token_budget():
    """Planning loses nothing; only a block longer than the budget stands alone."""
    lengths = [7, 300, 12, 45, 45, 90, 8, 1000, 33] * 20
    groups = plan_batches(lengths, 512, "seed")
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or sum(lengths[i] for i in group) <= 512 for group in groups)


def test_a_better_artifact_passes_and_the_sentence_carries_the_numbers(pair, blocks, tmp_path):
    """A candidate near the target is accepted more often than the base draft, in every segment and on the anchor."""
    sha256 = stored(pair, tmp_path, repair(pair), rank=24)
    anchor = make_blocks(pair, 10, seed=7, name="anchor")
    result = judge(
        pair, tmp_path, candidate=sha256, references=BASE, blocks=blocks, anchor=anchor, rules=RULES, costs=COSTS
    )
    assert result["passed"]
    assert result["requests"] == 24
    assert result["positions"] == 24 * 24
    low, high = result["interval"]
    assert 0 < low < result["difference"] < high
    assert set(result["by_segment"]) == {"chat", "code"}
    assert result["anchor"]["difference"] > 0
    assert result["goodput"]["change"] > 0
    sentence = f"Passed: acceptance {result['live']:.3f} → {result['candidate']:.3f} ({result['difference']:+.3f} ["
    assert result["verdict"].startswith(sentence)
    assert "on 24 held-out requests, 576 positions; predicted goodput +" in result["verdict"]
    assert result["sha256"] == {"candidate": sha256, "live": None, "floor": None}


def test_a_candidate_equal_to_live_does_not_pass(pair, blocks, tmp_path):
    """Zero factors change nothing: difference and interval are zero and the answer is no."""
    sha256 = stored(pair, tmp_path, initial_factors(pair.lora_shapes, 4, seed=0))
    result = judge(pair, tmp_path, candidate=sha256, references=BASE, blocks=blocks, rules=RULES)
    assert not result["passed"]
    assert (result["difference"], result["interval"]) == (0.0, [0.0, 0.0])
    assert result["verdict"].startswith("Rejected, the gain is not certain")


def test_live_floor_and_champion_are_the_drafts_they_name(pair, blocks, tmp_path):
    """Live is the artifact that is live, not the base draft; each scores as it would alone."""
    good, none = stored(pair, tmp_path, repair(pair), rank=24), stored(pair, tmp_path, noise(pair, 1, 0.0))
    bad = stored(pair, tmp_path, noise(pair, 2, 0.6))
    references = {"live": bad, "floor": None, "champion:code": good}
    result = judge(pair, tmp_path, candidate=none, references=references, blocks=blocks, rules=RULES)
    alone = judge(pair, tmp_path, candidate=good, references={"live": bad}, blocks=blocks, rules=RULES)
    assert result["live"] == alone["live"]
    assert result["floor"]["difference"] == 0.0
    assert result["champions"]["code"]["champion"] == pytest.approx(alone["by_segment"]["code"]["candidate"], abs=1e-6)
    assert result["champions"]["code"]["requests"] == 12
    assert any("against the champion of code" in reason for reason in result["reasons"])
    worse = judge(pair, tmp_path, candidate=bad, references=BASE | {"live": good}, blocks=blocks, rules=RULES)
    assert worse["interval"][1] < 0
    assert worse["floor"]["difference"] == pytest.approx(-result["difference"])


def test_the_merged_artifact_scores_as_the_trainer_saw_it_unmerged(pair, blocks, tmp_path):
    """Parity: the exported file, merged, and the live LoRA branch agree within 1e-4 on average."""
    model = load_draft(pair, torch.float32)
    tuned = attach(model, pair.lora_shapes, rank=4, alpha=8, seed=0, start=noise(pair, 1, 0.1))
    scores = score_blocks(model, model.get_output_embeddings().weight.detach(), blocks, "gumbel")
    sha256 = stored(pair, tmp_path, factors_of(tuned), scale=2.0)
    result = judge(
        pair, tmp_path, candidate=sha256, references=BASE, blocks=blocks, rules=RULES, trainer_scores=scores
    )  # fmt: skip
    assert abs(result["parity"]["difference"]) < 1e-4
    assert result["difference"] != 0
    assert result["parity"]["trainer"] == pytest.approx(weighted_mean(blocks, scores))


@pytest.mark.parametrize("defect", ["half_of_the_scale_lost", "factors_of_other_layers", "negative"])
def test_a_broken_export_is_refused_by_parity(pair, blocks, tmp_path, defect):
    """What is stored is sound by every other check, but not what was trained; the sentence names both numbers."""
    trained = repair(pair)
    model = load_draft(pair, torch.float32)
    attach(model, pair.lora_shapes, rank=24, alpha=24, seed=0, start=trained)
    scores = score_blocks(model, model.get_output_embeddings().weight.detach(), blocks, "gumbel")
    names = sorted(trained)
    swapped = {name: trained[name.replace("layers.0", "X").replace("layers.1", "layers.0").replace("X", "layers.1")]
               for name in names}  # fmt: skip
    files = {
        "half_of_the_scale_lost": (trained, 0.1), "factors_of_other_layers": (swapped, 1.0), "negative": (trained, -1.0)
    }  # fmt: skip
    factors, scale = files[defect]
    sha256 = stored(pair, tmp_path, {name: value.clone() for name, value in factors.items()}, rank=24, scale=scale)
    result = judge(
        pair, tmp_path, candidate=sha256, references=BASE, blocks=blocks, rules=RULES, trainer_scores=scores
    )  # fmt: skip
    said, served = weighted_mean(blocks, scores), result["candidate"]
    assert said is not None
    assert said - served > 0.1
    text = f"Rejected, the stored file scores {served:.3f} where the trainer measured {said:.3f}"
    assert result["verdict"].startswith(text)


def test_the_gate_loads_what_the_hot_swap_serves(pair, blocks, tmp_path):
    """The model in a served slot scores, position by position, what the gate says of its artifact."""
    sha256 = stored(pair, tmp_path, noise(pair, 3, 0.2), scale=1.5)
    slot = DraftSlots(load_draft(pair, torch.float32), pair, 5.0).load(1, sha256, tmp_path)
    served = score_blocks(slot, slot.get_output_embeddings().weight.detach(), blocks, "gumbel")
    result = judge(
        pair, tmp_path, candidate=sha256, references=BASE, blocks=blocks, rules=RULES, trainer_scores=served
    )  # fmt: skip
    assert result["parity"]["difference"] == 0.0
    assert result["parity"]["interval"] == [0.0, 0.0]


def test_a_rounded_pair_is_scored_with_rounded_weights(pair, blocks, tmp_path):
    """In bfloat16 serving the file scores a little else than the trainer's float32, which parity tolerates."""
    rounded = msgspec.structs.replace(pair, dtype="bfloat16")
    model = load_draft(pair, torch.float32)
    attach(model, pair.lora_shapes, rank=24, alpha=24, seed=0, start=repair(pair))
    scores = score_blocks(model, model.get_output_embeddings().weight.detach(), blocks, "gumbel")
    sha256 = stored(pair, tmp_path, repair(pair), rank=24)
    result = judge(
        rounded, tmp_path, candidate=sha256, references=BASE, blocks=blocks, rules=RULES, trainer_scores=scores
    )  # fmt: skip
    assert result["passed"]
    assert 0 < abs(result["parity"]["difference"]) < 0.02


def test_a_trimmed_vocabulary_is_what_drafts_are_compared_under(pair, blocks, tmp_path):
    """Tokens the draft cannot say are never accepted, for the candidate and for live."""
    good, fair = stored(pair, tmp_path, repair(pair), rank=24), stored(pair, tmp_path, repair(pair, 20), rank=20)
    whole, trimmed = (
        judge(pair, tmp_path, candidate=good, references={"live": fair}, blocks=blocks, rules=RULES, allowed=allowed)
        for allowed in (None, torch.arange(0, VOCAB, 2))
    )
    for side in ("candidate", "live"):
        assert 0.1 < trimmed[side] < whole[side] - 0.1


def test_an_artifact_that_must_not_be_loaded_fails_the_gate(pair, blocks, tmp_path):
    """NaN values, updates beyond the norm bound and a file that is not there are a verdict, not a crash."""
    factors = initial_factors(pair.lora_shapes, 4, 0)
    name = next(iter(factors))
    broken = stored(pair, tmp_path, factors | {name: torch.full_like(factors[name], float("nan"))})
    huge = stored(pair, tmp_path, {key: torch.full_like(value, 9.0) for key, value in factors.items()})
    for sha256, word in ((broken, "NaN"), (huge, "norm"), ("0" * 64, "no manifest")):
        result = judge(pair, tmp_path, candidate=sha256, references=BASE, blocks=blocks, rules=RULES)
        assert (result["passed"], result["outcome"]) == (False, "rejected")
        assert word in result["verdict"]


def test_references_that_cannot_be_loaded(pair, blocks, tmp_path):
    """Without its champion a segment is not judged against it; without live there is no comparison."""
    good = stored(pair, tmp_path, repair(pair), rank=24)
    result = judge(
        pair, tmp_path, candidate=good, references=BASE | {"champion:code": "0" * 64}, blocks=blocks, rules=RULES
    )  # fmt: skip
    assert result["passed"]
    assert result["champions"] == {}
    result = judge(pair, tmp_path, candidate=good, references={"live": "0" * 64}, blocks=blocks, rules=RULES)
    assert (result["passed"], result["outcome"]) == (False, "undecided")
    assert result["verdict"].startswith("Undecided: what is live cannot be loaded, so there is nothing to beat: ")


def test_random_small_changes_are_not_promoted_unless_they_are_true_gains(pair, tmp_path):
    """20 random LoRAs (seeds 0 to 19) judged on 24 requests; the truth is measured on 300 others.  Of those that
    do not truly gain at most one passes (level 2.5 %, so 0.5 expected if all 20 were nothing)."""
    blocks, others = make_blocks(pair, 24, seed=31), make_blocks(pair, 300, seed=32, name="other")
    rules = replace(RULES, min_requests=20)
    falsely = 0
    for seed in range(20):
        sha256 = stored(pair, tmp_path, noise(pair, seed, 0.08))
        result = judge(pair, tmp_path, candidate=sha256, references=BASE, blocks=blocks, rules=rules)
        if result["passed"]:
            truth = judge(pair, tmp_path, candidate=sha256, references=BASE, blocks=others, rules=rules)
            falsely += truth["difference"] <= 0
    assert falsely <= 1


def mislabelled(blocks: list[VerifiedBlock], share: float, seed: int) -> list[VerifiedBlock]:
    """Blocks in which a share of the records carries a random top-k, its log-probs in place."""
    draw, made = np.random.default_rng(seed), []
    for block in blocks:
        ids = block.array("topk_ids").copy()
        for row in np.flatnonzero(draw.random(len(ids)) < share):
            ids[row] = draw.permutation(VOCAB)[:TOP_K]
        made.append(replace(block, topk_ids=ids.astype("<u4").tobytes()))
    return made


def test_a_candidate_trained_on_random_labels_is_refused(pair, tmp_path):
    """A training on clean labels makes the base draft better, and passes.  With 30 % of the labels random the same
    training gives less than that, and a retraining of a good live version spoils it: the gate says no to both."""
    learned, held_out = make_blocks(pair, 80, seed=41), make_blocks(pair, 40, seed=42, name="held")
    spoilt = mislabelled(learned, 0.3, seed=1)
    settings = DistillSettings(epochs=8, batch_tokens=512, rank=8, alpha=8, learning_rates=(1e-2,))

    def trained(blocks: list[VerifiedBlock], start: Factors | None = None) -> str:
        model, rank = load_draft(pair, torch.float32), 24 if start else 8
        fitting = settings.model_copy(update={"rank": rank, "alpha": rank})
        material = Material(fresh=blocks, replay=[], validation=[])
        factors = train(model, pair.lora_shapes, material, fitting, start=start).factors
        return stored(pair, tmp_path, factors, rank=rank)

    clean, good = trained(learned), stored(pair, tmp_path, repair(pair), rank=24)
    result = judge(pair, tmp_path, candidate=clean, references=BASE, blocks=held_out, rules=RULES)
    assert result["passed"], result["verdict"]
    for live, candidate in ((clean, trained(spoilt)), (good, trained(spoilt, repair(pair)))):
        references = {"live": live, "floor": None}
        result = judge(pair, tmp_path, candidate=candidate, references=references, blocks=held_out, rules=RULES)
        assert result["outcome"] == "rejected"
        assert result["interval"][1] < 0, result["verdict"]
