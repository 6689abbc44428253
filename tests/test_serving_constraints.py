"""Every sampling parameter under speculation: the same tokens as a naive definition that knows no drafts.

The definition below recomputes everything for each token from the text so far: Python loops for
bias, penalties and bans, transformers' own warpers for the cuts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_rig import Changing, Rig, counts_of, prompts, reference_models, request, shared_rigs
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tiny_pair import END
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from adapter.contracts import Sampling
from kernels.sampling import draw
from serving import ipc
from serving.engine.admission import Admission, Refusal
from serving.engine.constraints import constraints_for
from serving.engine.parameters import row_params
from serving.engine.sequence import Sequence

N = 32
RULES: list[dict[str, Any]] = [
    {"temperature": 0.0, "logit_bias": ((5, 4.0), (40, -100.0), (77, 2.5))},
    {"temperature": 0.0, "presence_penalty": 1.2},
    {"temperature": 0.0, "frequency_penalty": 0.6},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"temperature": 0.0, "min_tokens": 11},
    {"temperature": 0.9, "seed": 1, "min_p": 0.15},
    {"temperature": 1.1, "seed": 2, "min_p": 0.05, "top_p": 0.9, "top_k": 30},
    {"temperature": 0.8, "seed": 3, "presence_penalty": -1.0, "frequency_penalty": 0.9},
    {"temperature": 1.0, "seed": 4, "repetition_penalty": 0.8, "min_tokens": 7},
    {"temperature": 1.2, "seed": 5, "logit_bias": ((9, 3.0),), "repetition_penalty": 1.3, "top_k": 12},
    {"temperature": 0.0, "logit_bias": ((9, 3.0),), "presence_penalty": 0.5, "frequency_penalty": 0.4,
     "repetition_penalty": 1.2, "min_tokens": 5},
    {"temperature": 0.7, "seed": 6, "logit_bias": ((9, 3.0), (END, 6.0)), "presence_penalty": 0.5,
     "frequency_penalty": 0.4, "repetition_penalty": 1.2, "min_tokens": 9, "min_p": 0.1, "top_p": 0.95, "top_k": 40},
]  # fmt: skip


def naive_logits(raw: list[float], sampling: Sampling, prompt: list[int], said: list[int], ends: set[int]) -> list[Any]:
    """Bias, repetition, frequency, presence, minimum length, in this order, one token of the vocabulary at a time."""
    bias, changed = dict(sampling.logit_bias), []
    for token, logit in enumerate(raw):
        logit += bias.get(token, 0.0)
        if token in prompt or token in said:
            logit = logit / sampling.repetition_penalty if logit > 0 else logit * sampling.repetition_penalty
        logit -= said.count(token) * sampling.frequency_penalty
        logit -= sampling.presence_penalty if token in said else 0.0
        changed.append(-math.inf if token in ends and len(said) < sampling.min_tokens else logit)
    return changed


def warp(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Temperature and cuts as transformers does them, in its order."""
    if sampling.temperature == 0:
        return logits
    logits = TemperatureLogitsWarper(float(sampling.temperature))(None, logits)
    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    return MinPLogitsWarper(sampling.min_p)(None, logits) if sampling.min_p else logits


@torch.inference_mode()
def defined(
    model: Any, prompt: list[int], sampling: Sampling, ends: set[int], max_tokens: int = N,
    raw_rows: list[torch.Tensor] | None = None,
) -> list[int]:  # fmt: skip
    """What a request says by definition: a fresh forward of everything for each token."""
    said: list[int] = []
    while len(said) < max_tokens and not (said and said[-1] in ends):
        raw = model(input_ids=torch.tensor([prompt + said]), use_cache=False).logits[0, -1].float()
        if raw_rows is not None:
            raw_rows.append(raw)
        logits = torch.tensor([naive_logits(raw.tolist(), sampling, prompt, said, ends)])
        params = row_params([sampling], [len(prompt) + len(said)])
        said.append(int(draw(warp(logits, sampling), params)[0]))
    return said


@pytest.fixture(scope="module")
def rig_for(folder, tmp_path_factory) -> Iterator[Callable[..., Rig]]:
    with shared_rigs(folder, tmp_path_factory) as rig_for:
        yield rig_for


@pytest.fixture(scope="module")
def models(rig_for):
    return reference_models(rig_for().pair)


@pytest.fixture(scope="module")
def vocab(models) -> int:
    return int(models[0].config.vocab_size)


@pytest.fixture(scope="module")
def ids(vocab) -> list[list[int]]:
    return prompts(vocab, (5, 17, 40, 3, 60, 9, 21, 33, 12, 8, 25, 6), seed=1)


@pytest.fixture(scope="module")
def truth(models, ids) -> list[list[int]]:
    return [defined(models[0], ids[i], Sampling(**rule), ends_of(rule)) for i, rule in enumerate(RULES)]


def ends_of(rule: dict[str, Any]) -> set[int]:
    """Many end tokens where a minimum length is asked for, so that it has something to hold back."""
    return {END, *range(20, 60)} if rule.get("min_tokens") else set()


def ruled(name: str, prompt: list[int], rule: dict[str, Any], vocab: int, **more: Any) -> Sequence:
    """A request with its constraints, as admission builds it."""
    ends = more.pop("ends", ends_of(rule))
    item = request(name, prompt, more.pop("max_tokens", N), ends=sorted(ends), **more, **rule)
    item.constraints = constraints_for(item.sampling, prompt, item.end_tokens, vocab)
    return item


def batch(ids: list[list[int]], vocab: int, gamma: int | None = None) -> list[Sequence]:
    return [ruled(str(i), ids[i], rule, vocab, gamma=gamma, arrived_s=float(i)) for i, rule in enumerate(RULES)]


# -- the same tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, 1, 3, 8])
def test_every_rule_equals_its_definition(rig_for, ids, vocab, truth, gamma):
    """Twelve requests with twelve sets of rules, greedy and seeded, say what the definition says at every gamma."""
    requests = batch(ids, vocab, gamma)
    assert rig_for().run(requests) == truth
    assert bool(counts_of(requests).num_accepted) == bool(gamma)


def test_rules_do_something(rig_for, ids, truth):
    """Each set of rules changes what its request says, or the equalities above would prove nothing."""
    for i, rule in enumerate(RULES):
        plain = {name: rule[name] for name in ("temperature", "seed") if name in rule}
        assert rig_for().run([request("p", ids[i], N, ends=sorted(ends_of(rule)), **plain)]) != [truth[i]]


def test_changing_gamma_changes_nothing(rig_for, ids, vocab, truth):
    """Another draft length for every request in every round, zero included (N4)."""
    rig = rig_for()
    rig.engine.controller = Changing(2)
    assert rig.run(batch(ids, vocab)) == truth


@pytest.mark.parametrize("gamma", [0, 5])
def test_preemption_does_not_disturb_counts(rig_for, ids, vocab, truth, gamma):
    """Requests that give their blocks back and start over keep what they had counted (A1)."""
    rig = rig_for(kv_tokens=208)
    before = rig.engine.scheduler.num_preempted
    assert rig.run(batch(ids, vocab, gamma)) == truth
    assert rig.engine.scheduler.num_preempted > before


def test_swaps_do_not_disturb_counts(rig_for, ids, vocab, truth):
    """Random, zero and NaN drafts swapped in while penalties count change nothing (I1, W7)."""
    rig = rig_for()
    base = rig.built.hotswap._slots.get(0)
    generator = torch.Generator().manual_seed(0)
    drafts = [
        rig.model(lambda weight: weight.copy_(torch.randn(weight.shape, generator=generator))),
        rig.model(lambda weight: weight.fill_(float("nan"))), base, rig.model(lambda weight: weight.fill_(0)),
    ]  # fmt: skip
    try:
        assert rig.run(
            batch(ids, vocab, 4), lambda step: rig.swap(1 + step % 4, drafts[step % 4]) if step % 2 else None
        ) == truth  # fmt: skip
    finally:
        rig.swap(0, base)
        rig.engine.step()


def test_serving_r1_rules_and_batch_mates(rig_for, ids, vocab, truth):
    """Alone and beside others that come late or leave early, a request with rules says the same (R1)."""
    rig = rig_for()
    for i in (2, 8, 11):
        assert rig.run([ruled("alone", ids[i], RULES[i], vocab, gamma=3)]) == [truth[i]]
    requests = batch(ids, vocab, 2)
    leaving = [ruled(f"gone{i}", ids[i], RULES[i], vocab, gamma=5) for i in range(3)]
    for item in leaving:
        rig.engine.submit(item)

    def leave(step: int) -> None:
        if step < len(leaving):
            rig.engine.end(leaving[step].request_id, "cancelled")

    assert rig.run(requests, leave) == truth


def test_nothing_asked_costs_nothing(vocab):
    """Plain parameters, and a minimum length without any end token, have no constraints at all."""
    plain = Sampling(temperature=0.7, top_p=0.5, top_k=4, min_p=0.1, seed=3)
    assert constraints_for(plain, [3, 4], frozenset([END]), vocab) is None
    assert constraints_for(Sampling(min_tokens=5), [3, 4], frozenset([vocab + 1]), vocab) is None
    assert constraints_for(Sampling(min_tokens=5), [3, 4], frozenset([END]), vocab) is not None


# -- hazards ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def same(folder, rig_for) -> Rig:
    """An engine whose draft is the target itself: every drafted token is accepted."""
    return rig_for(exact=True, draft=str(folder / "tiny-target"))


def disturbed(rig: Rig, change: Callable[[list[int]], list[int]]) -> Callable[[], None]:
    """Change what the draft proposes; return how to undo it."""
    real = rig.engine.proposers.draft.propose

    def propose(requests, gammas):
        proposals = real(requests, gammas)
        for proposal in proposals:
            proposal.tokens = change(proposal.tokens)
        return proposals

    rig.engine.proposers.draft.propose = propose
    return lambda: setattr(rig.engine.proposers.draft, "propose", real)


@pytest.mark.parametrize("min_tokens", range(1, 12))
def test_serving_s5_min_tokens_inside_block(same, models, ids, vocab, min_tokens):
    """The minimum falls at every offset of wholly accepted blocks of six; the answer ends no sooner, no later (S5)."""
    rule = {"temperature": 0.0, "min_tokens": min_tokens}
    ends = set(range(3, vocab, 2))  # half of the vocabulary ends the answer
    said = defined(models[0], ids[1], Sampling(**rule), ends)
    item = ruled("s5", ids[1], rule, vocab, gamma=5, ends=ends)
    assert same.run([item]) == [said]
    assert min_tokens <= len(said) - 1 < N
    assert item.finish_reason == "stop"
    assert counts_of([item]).num_accepted == counts_of([item]).num_examined


def test_serving_s5_a_drafted_end_before_the_minimum(rig_for, models, ids, vocab):
    """A draft that proposes the end everywhere ends nothing early (S4, S5)."""
    rig, rule = rig_for(), {"temperature": 0.0, "min_tokens": 9, "logit_bias": ((END, 50.0),)}
    said = defined(models[0], ids[1], Sampling(**rule), {END})
    undo = disturbed(rig, lambda tokens: [END for _ in tokens])
    try:
        assert rig.run([ruled("e", ids[1], rule, vocab, gamma=4, ends={END})]) == [said]
    finally:
        undo()
    assert len(said) == 10
    assert said[-1] == END


PENALTY: dict[str, Any] = {  # a few tokens take turns, by how often each was said
    "temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 1.0, "repetition_penalty": 1.1,
    "logit_bias": ((7, 14.0), (8, 13.5), (9, 13.0)),
}  # fmt: skip


@pytest.mark.parametrize("gamma", [1, 4, 8])
def test_serving_p1_accepted_tokens_count_inside_the_block(same, models, ids, vocab, gamma):
    """Blocks that are accepted whole: each row's penalty has counted the drafted tokens before it (P1)."""
    rule = PENALTY
    said = defined(models[0], ids[3], Sampling(**rule), set())
    item = ruled("p1", ids[3], rule, vocab, gamma=gamma)
    assert same.run([item]) == [said]
    counts = counts_of([item])
    assert counts.num_accepted == counts.num_drafted > 0
    assert max(said.count(token) for token in said) > 2


def test_serving_p1_rejected_tokens_never_count(rig_for, models, ids, vocab):
    """A draft that is always wrong leaves no trace in the counts, whichever tokens it names (P1)."""
    rig, rule = rig_for(), PENALTY
    said = defined(models[0], ids[3], Sampling(**rule), set())
    undo = disturbed(rig, lambda tokens: [(token + 1) % 3 + 7 for token in tokens])
    try:
        item = ruled("p1", ids[3], rule, vocab, gamma=5)
        assert rig.run([item]) == [said]
    finally:
        undo()
    assert 0 < counts_of([item]).num_examined - counts_of([item]).num_accepted


@pytest.mark.parametrize("gamma", [0, 1, 5])
@pytest.mark.parametrize("num_top", [0, 4])
def test_serving_l1_logprobs_are_raw_and_complete(rig_for, models, ids, vocab, truth, gamma, num_top):
    """One log-prob a token, of the raw logits, equal to those of plain decoding, with every rule in force (L1)."""
    rig, index = rig_for(), len(RULES) - 1
    item = ruled("l1", ids[index], RULES[index], vocab, gamma=gamma)
    item.logprobs = num_top
    mates = [ruled(f"m{i}", ids[i], RULES[i], vocab, gamma=3) for i in range(4)]
    heard: list[Any] = []
    for one in [*mates, item]:
        rig.engine.submit(one)
    while rig.engine.busy:
        heard += [one for one in rig.engine.step() if one.request_id == "l1"]
    assert all(len(one.logprobs) == len(one.token_ids) for one in heard)
    said = [token for one in heard for token in one.token_ids]
    entries = [entry for one in heard for entry in one.logprobs]
    raw: list[torch.Tensor] = []
    defined(models[0], ids[index], item.sampling, ends_of(RULES[index]), raw_rows=raw)
    assert said == truth[index]
    for token, entry, row in zip(said, entries, raw, strict=True):
        law = torch.log_softmax(row.double(), -1)
        assert entry.logprob == pytest.approx(float(law[token]), abs=1e-4)
        assert len(entry.top_ids) == len(entry.top_logprobs) == num_top
        for top, value in zip(entry.top_ids, entry.top_logprobs, strict=True):
            assert value == pytest.approx(float(law[top]), abs=1e-4)
    assert all(entry.logprob < 0 for entry in entries)


# -- the state itself ------------------------------------------------------------------------


@given(data=st.data(), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_applying_is_a_function_of_the_tokens(data, seed):
    """Any order of looking ahead along any drafts, and committing, gives the definition's logits at every row."""
    width = 24
    sampling = Sampling(
        presence_penalty=0.7, frequency_penalty=-0.4, repetition_penalty=1.5, min_tokens=data.draw(st.integers(0, 6)),
        logit_bias=((3, 2.0), (8, -1.0)),
    )  # fmt: skip
    tokens = st.lists(st.integers(0, width - 1), max_size=5)
    prompt, said = data.draw(tokens), []
    rules = constraints_for(sampling, prompt, frozenset([1, 2]), width)
    raw = torch.randn(6, width, generator=torch.Generator().manual_seed(seed))
    for _ in range(data.draw(st.integers(1, 5))):
        for drafted in data.draw(st.lists(tokens, max_size=3)):
            first = data.draw(st.integers(0, len(drafted)))
            logits = raw[: len(drafted) + 1 - first].clone()
            rules.apply(logits, drafted, first)
            for j, row in enumerate(logits):
                before = said + drafted[: first + j]
                naive = naive_logits(raw[j].tolist(), sampling, prompt, before, {1, 2})
                torch.testing.assert_close(row, torch.tensor(naive), atol=1e-5, rtol=1e-5)
        kept = data.draw(tokens)
        rules.commit(kept)
        said += kept


# -- the other coupling ----------------------------------------------------------------------


def test_maximal_coupling_keeps_a_constrained_law(rig_for, models, ids, vocab):
    """The first three tokens of 4,000 answers follow the constrained target's joint law.

    Chi-square over all triples expected at least five times, the others together; seeds 0 to 3,999,
    p > 0.01.  Penalties make the later tokens' laws depend on those before, inside a drafted block.
    """
    n, rig = 4000, rig_for(coupling="maximal", max_batch=64, kv_tokens=4096)
    rule = {"temperature": 1.2, "top_k": 3, "presence_penalty": 2.0, "frequency_penalty": 1.0, "min_p": 0.02}
    requests = [ruled(str(i), ids[3], rule | {"seed": i}, vocab, gamma=2, max_tokens=3) for i in range(n)]
    said = [tuple(tokens) for tokens in rig.run(requests)]
    assert 0 < counts_of(requests).num_accepted < counts_of(requests).num_examined

    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for before, mass in law.items():
            with torch.inference_mode():
                raw = models[0](input_ids=torch.tensor([ids[3] + list(before)])).logits[0, -1]
            logits = torch.tensor([naive_logits(raw.tolist(), requests[0].sampling, ids[3], list(before), set())])
            chances = torch.softmax(warp(logits, requests[0].sampling)[0].double(), -1)
            for token in torch.nonzero(chances).flatten().tolist():
                longer[(*before, token)] = mass * float(chances[token])
        law = longer
    assert set(said) <= set(law)
    common = [triple for triple, mass in law.items() if mass * n >= 5]
    rest = sum(law.values()) - sum(law[triple] for triple in common)
    observed = [said.count(triple) for triple in common] + [sum(triple not in common for triple in said)]
    expected = [law[triple] * n for triple in common] + [rest * n]
    if rest * n < 1e-6:
        observed, expected = observed[:-1], expected[:-1]
    scale = sum(observed) / sum(expected)
    assert len(common) > 8
    assert chisquare(observed, [value * scale for value in expected]).pvalue > 0.01


def test_maximal_coupling_keeps_greedy_rules_exact(rig_for, ids, vocab, truth):
    """Greedy requests with rules say what the definition says under the other coupling too."""
    rig = rig_for(coupling="maximal", max_batch=64, kv_tokens=4096)
    rig.engine.controller = Changing(4)
    said = rig.run(batch(ids, vocab))
    assert [said[i] for i, rule in enumerate(RULES) if not rule["temperature"]] == [
        truth[i] for i, rule in enumerate(RULES) if not rule["temperature"]
    ]


# -- admission -------------------------------------------------------------------------------


def submit(prompt: list[int], *, max_tokens: int = 8, ends: tuple[int, ...] = (END,), **sampling: Any) -> ipc.Submit:
    return ipc.Submit(
        request_id="a", token_ids=prompt, max_tokens=max_tokens, sampling=Sampling(**sampling), end_tokens=list(ends),
        segment="s", gamma=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        ({"logit_bias": ((4000, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((5, math.inf),)}, "logit_bias"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_p": 1.5}, "min_p"),
        ({"top_p": 0.0}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"temperature": math.nan}, "temperature"),
        ({"prompt": [5, 4000]}, "prompt"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(rig_for, bad, param):
    """Parameters outside their range are a 400 that names them, before anything runs."""
    admission = Admission(rig_for().built, 192)
    prompt = bad.pop("prompt", [5, 6, 7])
    with pytest.raises(Refusal, match=param) as refused:
        admission.to_sequence(submit(prompt, **bad), 0.0)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_admission_builds_the_rules(rig_for, models, ids):
    """A message with rules becomes a request that says what the definition says; one without has none."""
    rig = rig_for()
    admission = Admission(rig.built, 192)
    item = admission.to_sequence(submit(ids[0], max_tokens=N, ends=(), **RULES[9]), 0.0)
    assert rig.run([item]) == [defined(models[0], ids[0], item.sampling, set())]
    assert admission.to_sequence(submit(ids[0], temperature=0.5, min_p=0.1), 0.0).constraints is None
