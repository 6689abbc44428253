"""Ways to draft inside the engine: none of them changes a text, a law, or what is counted of another."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_rig import (
    Changing,
    Rig,
    build_rig,
    plain,
    plain_each,
    prompts,
    reference_models,
    request,
    requests_for,
    shared_rigs,
)
from scipy.stats import chisquare
from tiny_pair import END, write_draft, write_target

from adapter.contracts import Counts, Sampling, SettingsError, Verdict
from adapter.sections import LogSettings
from adapter.settings import load_settings
from kernels.sampling import shape_logits
from monitors.acceptance import observations_of
from serving.engine.control.base import StepReport
from serving.engine.control.fixed import FixedGamma
from serving.engine.parameters import row_params
from serving.engine.proposers.base import Offer, Proposal
from serving.engine.proposers.past import PastOutputs
from serving.engine.runner import ModelRunner
from serving.engine.sequence import Sequence
from serving.engine.work import Work

N = 32
SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 0.2, "seed": 1},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.8, "seed": 2},
    {"temperature": 0.4, "seed": 3},
    {"temperature": 1.0, "top_k": 3, "seed": 4},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair whose target hardly looks back, and so goes round in circles."""
    folder = tmp_path_factory.mktemp("pair")
    model = write_target(folder / "tiny-target")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 0.02
    model.model.norm.weight *= 3  # and is sure of what it says
    model.save_pretrained(folder / "tiny-target")
    write_draft(folder / "tiny-draft", folder / "tiny-target", model)
    return folder


@pytest.fixture(scope="module")
def rig_for(folder, tmp_path_factory) -> Iterator[Callable[..., Rig]]:
    """Return `rig_for(**engine settings)`; one engine a combination, with nothing remembered."""
    with shared_rigs(folder, tmp_path_factory) as shared:

        def get(**engine: Any) -> Rig:
            rig = shared(**engine)
            members = rig.engine.proposers.members
            for name in members.keys() - {"draft", "ngram", "past"}:
                del members[name]
            if "past" in members:
                members["past"] = PastOutputs(max_tokens=4096, vocab=members["past"]._vocab)
            return rig

        yield get


@pytest.fixture(scope="module")
def target(rig_for):
    return reference_models(rig_for().pair)[0]


@pytest.fixture(scope="module")
def ids(target) -> list[list[int]]:
    """Prompts that end with what the target says greedily after their first tokens."""
    greedy = Sampling(temperature=0.0)
    return [start + plain(target, start, 26, greedy) for start in prompts(target.config.vocab_size, (5, 9, 3, 7, 4, 6))]


@pytest.fixture(scope="module")
def said(target, ids) -> list[list[int]]:
    """What each prompt is answered, by the definition."""
    return plain_each(target, ids, SAMPLINGS, N)


def _items(ids: list[list[int]], round_: int = 0) -> list[Sequence]:
    return requests_for(ids, SAMPLINGS, N, prefix=f"{round_}-")


class Watching(Changing):
    """Chooses at random and keeps what became of the rounds of each proposer."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.drafted: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()

    def observe(self, report: StepReport) -> None:
        for item in report.rounds:
            if item.proposer is not None:
                self.drafted[item.proposer] += item.num_drafted
                self.accepted[item.proposer] += item.num_accepted


# -- inside the engine -----------------------------------------------------------------------


@pytest.mark.parametrize("kv_tokens", [256, 2048])
@pytest.mark.parametrize("seed", [1, 2])
def test_mixing_proposers_changes_no_text(rig_for, ids, said, kv_tokens, seed):
    """Each request gets another proposer and length in every round, preempted or not; all three are right at times."""
    rig = rig_for(kv_tokens=kv_tokens)
    rig.engine.controller = watching = Watching(seed)
    for round_ in range(3):  # from the second time on the past knows the answers
        assert rig.run(_items(ids, round_)) == said
    assert watching.accepted.keys() == {"draft", "ngram", "past"}
    assert all(watching.accepted[name] > 20 for name in ("ngram", "past"))


def test_what_was_said_before_is_nearly_always_right(rig_for, ids, said):
    """The second time around, greedy answers come out of the past with hardly a rejection."""
    rig = rig_for()
    greedy = [i for i, sampling in enumerate(SAMPLINGS) if not sampling["temperature"]]
    rig.engine.controller = FixedGamma(4, ("past",))
    for round_ in range(2):
        items = [_items(ids, round_)[i] for i in greedy]
        assert rig.run(items) == [said[i] for i in greedy]
    counts = sum((item.unversioned for item in items), Counts())
    assert counts.num_accepted >= 0.9 * counts.num_drafted > 0


def test_swaps_and_matching_together(rig_for, ids, said):
    """Random and NaN drafts swapped in every third step, and other proposers in between, change nothing."""
    rig = rig_for()
    rig.engine.controller = Changing(7)
    base = rig.built.hotswap._slots.get(0)
    drafts = [rig.model(lambda weight: weight.fill_(float("nan"))), rig.model(lambda weight: weight.normal_()), base]
    try:
        assert (
            rig.run(_items(ids), lambda step: None if step % 3 else rig.swap(step % 3, drafts[step // 3 % 3])) == said
        )
    finally:
        rig.swap(0, base)
        rig.engine.step()


def test_serving_s4_a_matched_end_token_ends_nothing(rig_for, target, ids):
    """An end token that is only matched, not said by the target, ends no answer."""
    prompts = [[*prompt, END, *prompt, END, *prompt] for prompt in ids]
    rig = rig_for()
    rig.engine.controller = watching = Watching(3)
    items = [request(str(i), prompt, N, ends=[END]) for i, prompt in enumerate(prompts)]
    expected = []
    for prompt in prompts:
        tokens = plain(target, prompt, N, Sampling(temperature=0.0))
        expected.append(tokens[: tokens.index(END) + 1] if END in tokens else tokens)
    assert rig.run(items) == expected
    assert watching.drafted["ngram"]


@pytest.mark.parametrize("without", [{"draft": "none"}, {"proposers": ("ngram", "past")}])
def test_matching_needs_no_draft_model(folder, tmp_path, ids, said, without):
    """With no draft model, or with the draft not among the proposers, matching drafts; the fixed controller uses it."""
    rig = build_rig(folder, tmp_path, controller="fixed", **without)
    assert set(rig.engine.proposers.members) == {"ngram", "past"}
    items = _items(ids)
    assert rig.run(items) == said
    assert sum((item.unversioned for item in items), Counts()).num_accepted > 0
    rig.built.publisher.close()


def test_an_unknown_proposer_is_refused(monkeypatch):
    """A name nobody has is refused by name, with those that exist."""
    monkeypatch.setenv("DRAFTSMITH_ENGINE__PROPOSERS", '["draft", "medusa"]')
    with pytest.raises(SettingsError, match="'medusa': expected 'draft', 'ngram' or 'past'"):
        load_settings()


# -- counting --------------------------------------------------------------------------------


def test_matches_are_counted_apart_from_drafts(rig_for, ids):
    """Matched rounds fill `unversioned` alone: no version, no record of a verdict, nothing a drift monitor hears of."""
    rig = rig_for()
    rig.engine.controller = FixedGamma(3, ("ngram", "past"))
    rig.collect(rig.engine.recorder._settings)
    items = _items(ids)
    rig.run(items)
    counted = sum((item.unversioned for item in items), Counts())
    assert counted.num_accepted > 0
    assert sum((outcome.unversioned for outcome in rig.log.outcomes), Counts()) == counted
    for item in items:
        assert item.num_generated == item.unversioned.num_accepted + item.unversioned.num_rounds + item.plain_rounds
        assert not item.by_version
        assert not item.accepted_by_position
    for outcome in rig.log.outcomes:
        assert not outcome.by_version
        assert not observations_of(outcome)
    for block in rig.log.blocks:
        assert set(block.verdicts) == {Verdict.UNDRAFTED}
        assert not block.versions


def test_both_kinds_of_rounds_in_one_request(rig_for, ids):
    """Where draft and matching take turns, both counts and plain rounds add up to what was generated."""
    rig = rig_for()
    rig.engine.controller = Changing(11)
    items = _items(ids)
    rig.run(items)
    assert any(item.by_version and item.unversioned.num_rounds for item in items)
    for item in items:
        all_counts = sum(item.by_version.values(), item.unversioned)
        assert item.num_generated == all_counts.num_accepted + all_counts.num_rounds + item.plain_rounds


# -- maximal coupling ------------------------------------------------------------------------


@torch.inference_mode()
def _laws(target: Any, prompt: list[int], sampling: Sampling) -> list[torch.Tensor]:
    """The laws of the first and of the second token after a prompt, the second over all first ones."""

    def law(rows: list[list[int]]) -> torch.Tensor:
        logits = target(input_ids=torch.tensor(rows), use_cache=False).logits[:, -1].float()
        return torch.softmax(shape_logits(logits, row_params([sampling] * len(rows), [0] * len(rows))).double(), -1)

    first = law([prompt])[0]
    second = law([[*prompt, token] for token in range(len(first))])
    return [first, first @ second]


def _p_value(tokens: list[int], law: torch.Tensor) -> float:
    """χ² of drawn tokens against their law, tokens expected fewer than five times taken together."""
    expected = law * len(tokens)
    seen = torch.bincount(torch.tensor(tokens), minlength=len(law)).double()
    often = expected >= 5
    observed = [*seen[often].tolist(), float(seen[~often].sum())]
    wanted = [*expected[often].tolist(), float(expected[~often].sum())]
    if wanted[-1] < 1:
        assert observed[-1] <= 5
        observed, wanted = observed[:-1], wanted[:-1]
        wanted = [item * sum(observed) / sum(wanted) for item in wanted]
    return float(chisquare(observed, wanted).pvalue)


def test_serving_d1_one_hot_proposals_keep_the_law(rig_for, target, ids):
    """Under the maximal coupling, matched proposals of two tokens leave the law of both as it is.

    χ² with n = 1500 requests of seeds 0 to 1499, temperature 1; each p-value above 0.001.
    """
    rig = rig_for(coupling="maximal", max_batch=64, kv_tokens=8192)
    rig.collect(LogSettings(enabled=False))
    rig.engine.controller = FixedGamma(2, ("ngram",))
    sampling = Sampling(temperature=1.0)
    items = [request(str(i), ids[3], 3, temperature=1.0, seed=i) for i in range(1500)]
    drawn = rig.run(items)
    counts = sum((item.unversioned for item in items), Counts())
    assert counts.num_drafted >= 2 * len(items)
    assert 0.1 < counts.num_accepted / counts.num_examined < 0.9
    for position, law in enumerate(_laws(target, ids[3], sampling)):
        assert _p_value([tokens[position] for tokens in drawn], law) > 0.001


def test_a_seed_used_again_keeps_the_law(rig_for, target, ids):
    """Under the maximal coupling, repeating a request with its seed does not bend the law, whatever is remembered.

    An answer proposed from the past was drawn with the noise that would judge it; so sampled
    requests are proposed none.  χ² of the second answer, n = 480 seeds, p-value above 0.001.
    """
    rig = rig_for(coupling="maximal", max_batch=64, kv_tokens=8192)
    rig.collect(LogSettings(enabled=False))
    rig.engine.controller = FixedGamma(2, ("past", "ngram"))
    drawn: dict[int, list[list[int]]] = defaultdict(list)
    for start in range(0, 480, 60):
        for turn in range(2):
            items = [request(f"{turn}-{i}", ids[2], 3, temperature=1.0, seed=i) for i in range(start, start + 60)]
            for item in items:
                item.segment = str(item.sampling.seed)
            drawn[turn] += rig.run(items)
    law = _laws(target, ids[2], Sampling(temperature=1.0))[0]
    assert _p_value([tokens[0] for tokens in drawn[1]], law) > 0.001


# -- ways to draft that are not here yet -----------------------------------------------------


class LayerSkip:
    """A toy that drafts with the target's own first layers, on the target's own keys and values."""

    name = "skip"

    def __init__(self, runner: Any, num_layers: int) -> None:
        model, inner = copy.copy(runner.model), copy.copy(runner.model.model)
        model._modules, inner._modules = dict(runner.model._modules), dict(runner.model.model._modules)
        model.model, inner.layers = inner, runner.model.model.layers[:num_layers]
        inner.config = model.config = copy.copy(runner.model.config)
        inner.config.num_hidden_layers = num_layers
        self._runner = ModelRunner(model, runner.pool)

    def offer(self, request: Sequence, limit: int) -> Offer:
        return Offer(limit if len(request.tokens) - request.num_target_kv == 1 else 0)

    def propose(self, requests: list[Sequence], gammas: list[int]) -> list[Proposal]:
        proposals = [Proposal(proposer=self.name) for _ in requests]
        for step in range(max(gammas)):
            active = [i for i, gamma in enumerate(gammas) if gamma > step]
            work = [
                Work(
                    requests[i].block_table, len(requests[i].tokens) - 1 + step,
                    [proposals[i].tokens[-1] if step else requests[i].tokens[-1]], 1,
                )
                for i in active
            ]  # fmt: skip
            for i, token in zip(active, self._runner.forward(work).argmax(-1).tolist(), strict=True):
                proposals[i].tokens.append(token)
        return proposals

    def committed(self, request: Sequence, before: int, proposal: Proposal, num_accepted: int) -> None:
        return None

    def ended(self, request: Sequence) -> None:
        return None


def _add(rig: Rig, member: Any) -> None:
    rig.engine.proposers.members[member.name] = member


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_layer_skipping_needs_no_change_of_the_engine(rig_for, ids, said, num_layers):
    """The target's first layers draft on its own cache, which verification rewrites; all of them are always right."""
    rig = rig_for()
    _add(rig, LayerSkip(rig.engine.target, num_layers))
    rig.engine.controller = watching = Watching(num_layers)
    assert rig.run(_items(ids)) == said
    assert watching.drafted["skip"] > 0
    if num_layers == 3:
        rig.engine.controller = only = Watching(3)
        only._pick = FixedGamma(3, ("skip",))._one
        greedy = [item for item in _items(ids, 1) if not item.sampling.temperature]
        rig.run(greedy)
        assert only.accepted["skip"] == only.drafted["skip"] > 0
