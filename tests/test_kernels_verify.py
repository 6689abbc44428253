"""Verification keeps the target's law: emitted tokens pass a chi-square test under both couplings.

Noise is a function of (seed, position), so drawing with n seeds is drawing n independent times.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chisquare

from kernels import verify
from kernels.noise import Purpose
from kernels.sampling import RowParams, draw, shape_logits
from kernels.verify import verify_gumbel, verify_maximal

VOCAB = 10
N = 50_000
P_BOUND = 0.01
CASES = [  # temperature, top_p, top_k, gamma
    (1.0, 1.0, 0, 1),
    (0.6, 1.0, 0, 2),
    (1.3, 0.8, 0, 1),
    (1.0, 0.9, 5, 2),
    (0.8, 1.0, 3, 1),
]


def _laws(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Target and draft logits at three consecutive positions, [3, VOCAB] each; fixed seed."""
    generator = torch.Generator().manual_seed(17)
    p = 1.2 * torch.randn(3, VOCAB, generator=generator)
    q = 1.2 * torch.randn(3, VOCAB, generator=generator)
    if kind == "same":
        q = p.clone()
    elif kind == "disjoint":
        p[:, VOCAB // 2 :] = -torch.inf
        q[:, : VOCAB // 2] = -torch.inf
    elif kind == "certain":  # a draft that proposes one token only
        q = torch.full_like(q, -torch.inf)
        q[:, 4] = 0.0
    return p, q


def _params(positions: torch.Tensor, seeds: torch.Tensor, temperature: float, top_p: float, top_k: int) -> RowParams:
    rows = len(positions)
    return RowParams(
        torch.full((rows,), temperature), torch.full((rows,), top_p), torch.full((rows,), top_k), seeds, positions
    )


def _emit(coupling: str, kind: str, case: tuple[float, float, int, int], seed: int, n: int) -> list[list[int]]:
    """Run n independent rounds; return the tokens each one emits."""
    temperature, top_p, top_k, gamma = case
    p, q = _laws(kind)
    seeds = torch.arange(n) + seed * n
    drafted, q_scaled = [], []
    for j in range(gamma):
        params = _params(torch.full((n,), 100 + j), seeds, temperature, top_p, top_k)
        scaled = shape_logits(q[j : j + 1], params.rows(torch.tensor([0]))).expand(n, -1)
        drafted.append(draw(scaled, params, Purpose.DRAFT if coupling == "maximal" else Purpose.SAMPLE))
        q_scaled.append(scaled[0])
    drafts = torch.stack(drafted, 1).tolist()
    laws = torch.stack(q_scaled)
    one = _params(torch.arange(100, 101 + gamma), torch.zeros(gamma + 1, dtype=torch.long), temperature, top_p, top_k)
    target = shape_logits(p[: gamma + 1], one)
    positions = (100 + torch.arange(gamma + 1)).repeat(n)
    params = _params(positions, seeds.repeat_interleave(gamma + 1), temperature, top_p, top_k)
    scaled = target.repeat(n, 1)
    if coupling == "gumbel":
        verdicts = verify_gumbel(scaled, params, drafts)
    else:
        verdicts = verify_maximal(scaled, params, drafts, [laws] * n)
    return [[*tokens[:kept], following] for tokens, (kept, following) in zip(drafts, verdicts, strict=True)]


def _p_value(emitted: list[list[int]], kind: str, case: tuple[float, float, int, int], index: int) -> float:
    """Chi-square of the index-th emitted token, among rounds that got that far, against the target's law.

    The laws here depend on the position alone, so what was emitted before does not matter.
    """
    temperature, top_p, top_k, _ = case
    p, _ = _laws(kind)
    params = _params(torch.tensor([0]), torch.tensor([0]), temperature, top_p, top_k)
    law = torch.softmax(shape_logits(p[index : index + 1], params).double(), -1)[0]
    tokens = torch.tensor([tokens[index] for tokens in emitted if len(tokens) > index])
    observed = torch.bincount(tokens, minlength=VOCAB)
    possible = law > 0
    assert int(observed[~possible].sum()) == 0, "a token outside the target's law was emitted"
    if int(possible.sum()) == 1:
        return 1.0
    return float(chisquare(observed[possible].numpy(), (law[possible] * len(tokens)).numpy()).pvalue)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["different", "same"])
def test_gumbel_emits_the_targets_law(kind, case):
    """First tokens of 50,000 rounds follow the target's law (chi-square, p > 0.01)."""
    assert _p_value(_emit("gumbel", kind, case, 1, N), kind, case, 0) > P_BOUND


@pytest.mark.parametrize(
    ("kind", "case"),
    [("different", case) for case in CASES] + [(kind, CASES[0]) for kind in ("same", "disjoint", "certain")],
)  # fmt: skip
def test_kernels_d1_d3_d6_maximal_emits_the_targets_law(kind, case):
    """First tokens of 50,000 rounds, and second ones of the rounds that got there, follow the target's law."""
    emitted = _emit("maximal", kind, case, 3, N)
    assert _p_value(emitted, kind, case, 0) > P_BOUND
    if sum(len(tokens) > 1 for tokens in emitted) > 5000:
        assert _p_value(emitted, kind, case, 1) > P_BOUND


def test_maximal_acceptance_is_the_overlap():
    """The share of accepted first tokens is sum(min(p, q)), within four standard errors of 50,000 rounds."""
    case = CASES[0]
    p, q = (torch.softmax(item[0].double(), -1) for item in _laws("different"))
    overlap = float(torch.minimum(p, q).sum())
    emitted = _emit("maximal", "different", case, 3, N)
    share = sum(len(tokens) > 1 for tokens in emitted) / N
    assert abs(share - overlap) < 4 * math.sqrt(overlap * (1 - overlap) / N)


def _always_accept(p, q, params, drafts, said):
    """A wrong rule: every drafted token is kept."""
    return [True] * sum(map(len, drafts))


def _recover_from_target(results, recover, p, q, params):
    """A wrong rule: after a rejection the whole law is drawn from instead of the residual."""
    REAL_RECOVER(results, recover, p, torch.zeros_like(q), params)


REAL_RECOVER = verify._recover


@pytest.mark.parametrize(("part", "wrong"), [("_kept", _always_accept), ("_recover", _recover_from_target)])
def test_the_test_can_fail(monkeypatch, part, wrong):
    """Two classical mistakes in the rule fail the same chi-square test by far."""
    monkeypatch.setattr(verify, part, wrong)
    emitted = _emit("maximal", "different", CASES[0], 3, N)
    assert _p_value(emitted, "different", CASES[0], 0) < 1e-6


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["different", "same", "disjoint", "certain"])
def test_gumbel_tokens_do_not_depend_on_the_draft(kind, case):
    """What 5,000 rounds emit is what plain sampling draws at the same (seed, position), for any draft."""
    n, gamma = 5000, case[3]
    p, _ = _laws(kind)
    seeds = torch.arange(n) + 4 * n
    plain = []
    for j in range(gamma + 1):
        params = _params(torch.full((n,), 100 + j), seeds, *case[:3])
        plain.append(draw(shape_logits(p[j : j + 1], params.rows(torch.tensor([0]))).expand(n, -1), params))
    expected = torch.stack(plain, 1).tolist()
    for tokens, said in zip(_emit("gumbel", kind, case, 4, n), expected, strict=True):
        assert tokens == said[: len(tokens)]


def test_gumbel_accepts_everything_of_the_same_law():
    """A draft with the target's law is never rejected."""
    emitted = _emit("gumbel", "same", CASES[3], 5, 2000)
    assert {len(tokens) for tokens in emitted} == {CASES[3][3] + 1}


def test_kernels_d2_d5_maximal_accepts_everything_of_the_same_law():
    """With p = q the ratio is one and no token is rejected, rounding included (D5)."""
    emitted = _emit("maximal", "same", CASES[3], 5, 2000)
    assert {len(tokens) for tokens in emitted} == {CASES[3][3] + 1}


@pytest.mark.parametrize("rule", ["gumbel", "maximal"])
def test_kernels_d4_rows_of_a_mixed_batch_are_judged_alone(rule):
    """Greedy and sampled requests with 0 to 3 drafted tokens in one call get what each gets alone (D4, K3)."""
    generator = torch.Generator().manual_seed(3)
    sizes = [0, 3, 1, 2, 0, 3]
    temperatures = [0.0, 0.0, 1.0, 0.7, 1.0, 1.2]
    drafts, laws, blocks, rows = [], [], [], []
    for i, (size, temperature) in enumerate(zip(sizes, temperatures, strict=True)):
        logits = torch.randn(size + 1, VOCAB, generator=generator)
        params = _params(torch.arange(size + 1) + 7 * i, torch.full((size + 1,), i), temperature, 1.0, 0)
        q = torch.randn(size, VOCAB, generator=generator)
        likely = logits[:size].argmax(-1).tolist()
        drafts.append([token if j != 1 else int(q[j].argmax()) for j, token in enumerate(likely)])
        laws.append(q)
        blocks.append(shape_logits(logits, params))
        rows.append(params)
    whole = RowParams(
        *(torch.cat([getattr(item, name) for item in rows]) for name in
          ("temperature", "top_p", "top_k", "seeds", "positions"))
    )  # fmt: skip

    def judge(scaled, params, drafted, law):
        if rule == "gumbel":
            return verify_gumbel(scaled, params, drafted)
        return verify_maximal(scaled, params, drafted, law)

    together = judge(torch.cat(blocks), whole, drafts, laws)
    alone = [
        judge(block, row, [drafted], [law])[0]
        for block, row, drafted, law in zip(blocks, rows, drafts, laws, strict=True)
    ]
    assert together == alone
    for (kept, following), drafted, block, temperature in zip(together, drafts, blocks, temperatures, strict=True):
        if temperature == 0:
            best = block.argmax(-1).tolist()
            assert kept == next((j for j, token in enumerate(drafted) if token != best[j]), len(drafted))
            assert following == best[kept]


def test_kernels_w6_a_broken_draft_law_still_emits_the_targets_law():
    """A draft of NaN is rejected and recovered from the target's own law (chi-square, 50,000 rounds; W6)."""
    p, _ = _laws("different")
    broken = torch.full((1, VOCAB), torch.nan)
    params = _params(torch.arange(100, 102).repeat(N), torch.arange(N).repeat_interleave(2), 1.0, 1.0, 0)
    verdicts = verify_maximal(p[:2].repeat(N, 1), params, [[3]] * N, [broken] * N)
    assert {kept for kept, _ in verdicts} == {0}
    assert _p_value([[token] for _, token in verdicts], "different", CASES[0], 0) > P_BOUND
