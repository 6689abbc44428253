"""The fused sampler: token for token what the plain-torch reference says, whatever the batch looks like.

The statistics are those of `kernels.reference.verify`, which is vectorised; the kernels give the same tokens.
"""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from scipy.stats import chisquare

from kernels.noise import Purpose
from kernels.reference import verify as reference
from kernels.sampling import RowParams, shape_logits
from kernels.verdicts import Verdicts
from kernels.verify import verify_gumbel, verify_maximal

pytestmark = pytest.mark.slow  # in the interpreter: half a minute of CPU

sampler = pytest.importorskip("kernels.gpu.sampler")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
COUPLINGS = ("gumbel", "maximal")
POISON = float("nan")


def _params(rows: int, seed: int, greedy: float = 0.3) -> RowParams:
    """Random parameters of rows; a share of them is greedy."""
    generator = torch.Generator().manual_seed(seed)
    temperature = 0.3 + 1.2 * torch.rand(rows, generator=generator)
    temperature[torch.rand(rows, generator=generator) < greedy] = 0.0
    return RowParams(
        temperature, torch.ones(rows), torch.zeros(rows, dtype=torch.long),
        torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        torch.randint(0, 2**33, (rows,), generator=generator),
    )  # fmt: skip


def _round(vocab: int, gammas: list[int], coupling: str, seed: int, dtype=torch.float32, spread: float = 0.7):
    """One round of requests; a gamma of -1 is a request without rows.  The draft's law is near the target's.

    Returns the arguments of `verify` by name, with borders that cut some tokens of every other row.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *(gamma + 1 for gamma in gammas)]).cumsum(0).int()
    rows = int(starts[-1])
    target = 2.0 * torch.randn(rows, vocab, generator=generator)
    logits = target.to(dtype)
    draft_logits = (target + spread * torch.randn(rows, vocab, generator=generator)).to(dtype)
    borders, draft_borders = (item.float().amax(-1) - 5.0 for item in (logits, draft_logits))
    borders[::2] = draft_borders[::2] = -torch.inf
    params = _params(rows, seed)
    purpose = Purpose.DRAFT if coupling == "maximal" else Purpose.SAMPLE
    drafted = reference.draw(draft_logits, params, purpose, borders=draft_borders).tokens.int()
    drafted[[int(end) - 1 for end, gamma in zip(starts[1:], gammas, strict=True) if gamma >= 0]] = -1
    return {
        "logits": logits, "params": params, "starts": starts, "drafted": drafted, "coupling": coupling,
        "borders": borders, "draft_logits": draft_logits, "draft_borders": draft_borders, "top_k": min(vocab, 6),
    }  # fmt: skip


def _to(value, device: str):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, RowParams | Verdicts):
        return type(value)(*(_to(getattr(value, field.name), device) for field in fields(value)))
    return value


def _verify(arguments, device: str = "cpu") -> Verdicts:
    return _to(sampler.verify(**{name: _to(value, device) for name, value in arguments.items()}), "cpu")


def _examined(starts: torch.Tensor, verdicts: Verdicts) -> torch.Tensor:
    """Name the rows up to the first rejection of each request, whose records count."""
    edges, accepted = pairwise(starts.tolist()), verdicts.accepted.tolist()
    rows = [range(first, min(end, first + kept + 1)) for (first, end), kept in zip(edges, accepted, strict=True)]
    return torch.tensor([row for part in rows for row in part], dtype=torch.long)


def _assert_same(ours: Verdicts, true: Verdicts, starts: torch.Tensor) -> None:
    """Tokens and ids are equal, records equal within float rounding."""
    for name in ("accepted", "tokens", "finite", "said", "topk_ids"):
        assert torch.equal(getattr(ours, name), getattr(true, name)), name
    assert torch.allclose(ours.logprobs, true.logprobs, atol=2e-5, rtol=0)
    assert torch.allclose(ours.topk_logprobs.float(), true.topk_logprobs.float(), atol=1e-3, rtol=1e-3)
    assert torch.allclose(ours.tail, true.tail, atol=1e-5, rtol=0)
    assert (ours.residual is None) == (true.residual is None)
    if ours.residual is not None and true.residual is not None:
        rows = _examined(starts, true)
        assert torch.allclose(ours.residual[rows], true.residual[rows], atol=2e-5, rtol=0)


# -- token for token -------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(
    ("vocab", "gammas", "dtype"),
    [
        (13, [0, 18, -1, 3], torch.float32), (64, [-1, 2, 0, 4], torch.bfloat16), (257, [5, -1, 1], torch.float32),
        (1000, [2, 0, 3], torch.float16), (4099, [1, 3, -1], torch.bfloat16), (4099, [2, 0], torch.float32),
    ],
)  # fmt: skip
def test_sampler_says_what_the_reference_says(device, coupling, vocab, gammas, dtype):
    """Verdicts and records equal the reference's: ragged and empty requests, greedy rows beside sampled, borders."""
    arguments = _round(vocab, gammas, coupling, seed=vocab + len(gammas), dtype=dtype)
    _assert_same(_verify(arguments, device), reference.verify(**arguments), arguments["starts"])


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_reference_says_what_the_host_form_says(coupling):
    """600 requests of 0 to 8 drafted tokens over seven vocabularies: the tensor form equals `kernels.verify`."""
    for vocab in (2, 13, 64, 257, 1000, 4099):
        gammas = torch.randint(0, 9, (100,), generator=torch.Generator().manual_seed(vocab)).tolist()
        arguments = _round(vocab, gammas, coupling, seed=vocab)
        arguments |= {"borders": None, "draft_borders": None}
        params, starts = arguments["params"], arguments["starts"].tolist()
        purpose = Purpose.DRAFT if coupling == "maximal" else Purpose.SAMPLE
        tokens = reference.draw(arguments["draft_logits"], params, purpose).tokens.int()
        arguments["drafted"] = torch.where(arguments["drafted"] < 0, -1, tokens)
        drafts = [arguments["drafted"][first : end - 1].tolist() for first, end in pairwise(starts)]
        scaled = shape_logits(arguments["logits"], params)
        if coupling == "gumbel":
            expected = verify_gumbel(scaled, params, drafts)
        else:
            ours = shape_logits(arguments["draft_logits"], params)
            ours = [ours[first : end - 1] for first, end in pairwise(starts)]
            expected = verify_maximal(scaled, params, drafts, ours)
        found = reference.verify(**arguments)
        assert list(zip(found.accepted.tolist(), found.tokens.tolist(), strict=True)) == expected
        noise = reference.dense_noise(params, vocab, Purpose.SAMPLE)
        scores = torch.where((params.temperature > 0)[:, None], scaled.double() + noise, scaled.double())
        assert torch.equal(found.said, scores.argmax(-1)), "the form without a CPU's shortcut"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("purpose", [Purpose.SAMPLE, Purpose.DRAFT])
def test_sampler_draws_what_the_reference_draws(device, purpose):
    """Draws of whole rows, and of rows that hold every third token, equal the reference's and each other's."""
    logits = 2.0 * torch.randn(5, 1500, generator=torch.Generator().manual_seed(4))
    params = _params(5, seed=4)
    some = torch.arange(1, 1500, 3)
    holes = torch.full_like(logits, -torch.inf)
    holes[:, some] = logits[:, some]
    for row, borders, token_ids in (
        (logits, None, None), (logits.bfloat16(), logits.amax(-1) - 4.0, None), (holes, None, None),
        (logits[:, some].contiguous(), None, some),
    ):  # fmt: skip
        given = [None if item is None else item.to(device) for item in (borders, token_ids)]
        ours = sampler.draw(row.to(device), _to(params, device), purpose, borders=given[0], token_ids=given[1])
        true = reference.draw(row, params, purpose, borders=borders, token_ids=token_ids)
        assert torch.equal(ours.tokens.cpu(), true.tokens)
        assert torch.equal(ours.columns.cpu(), true.columns)
        assert torch.equal(ours.finite.cpu(), true.finite)
        assert torch.allclose(ours.logprobs.cpu(), true.logprobs, atol=2e-5, rtol=0)
        if row is holes:
            of_holes = true.tokens
    assert torch.equal(true.tokens, of_holes), "noise belongs to tokens, not to columns"


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_sampler_gives_a_row_the_same_however_it_is_cut(coupling, monkeypatch):
    """Ranges of one block, of several, or one for the whole row: the same tokens, ids and records."""
    arguments = _round(2500, [1, 0], coupling, seed=3)
    whole = _verify(arguments)
    monkeypatch.setattr(sampler, "_BLOCK_BYTES", 2048)
    for programs in (1, 7):
        monkeypatch.setattr(sampler, "_PROGRAMS", programs)
        assert sampler.ranges(3, 2500, 512)[1] > 1
        _assert_same(_verify(arguments), whole, arguments["starts"])


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_sampler_does_not_look_at_the_rest_of_the_batch(coupling):
    """Requests in another order, with rows of no request behind them, get the verdicts they got."""
    arguments = _round(130, [2, 1, 0, -1], coupling, seed=9)
    starts, before = arguments["starts"].tolist(), _verify(arguments)
    order = [3, 1, 0, 2]
    index = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order] + [torch.tensor([0, 5, 1])])
    moved = dict(arguments)
    for name in ("logits", "drafted", "borders", "draft_logits", "draft_borders"):
        moved[name] = arguments[name][index].clone()
    moved["params"] = arguments["params"].rows(index)
    moved["starts"] = torch.tensor([0, *(starts[i + 1] - starts[i] for i in order)]).cumsum(0).int()
    moved["logits"][-3:] = POISON
    after = _verify(moved)
    for name in ("accepted", "tokens", "finite"):
        assert torch.equal(getattr(after, name), getattr(before, name)[order])
    rows = index[:-3]
    for name in ("said", "topk_ids", "logprobs", "topk_logprobs", "tail"):
        assert torch.equal(getattr(after, name)[:-3], getattr(before, name)[rows])
    assert after.said[-3:].tolist() == [-1] * 3
    assert after.logprobs[-3:].tolist() == after.residual[-3:].tolist() == [0.0] * 3


def test_sampler_says_the_same_at_any_gamma():
    """Under gumbel what a request emits is what its first rows say, however many tokens were drafted."""
    long = _round(64, [6], "gumbel", seed=2, spread=0.3)
    said = _verify(long).said
    for gamma in (0, 3):
        short = {name: value[: gamma + 1] if name != "starts" else value for name, value in long.items()
                 if isinstance(value, torch.Tensor)}  # fmt: skip
        short |= {"params": long["params"].rows(torch.arange(gamma + 1)), "coupling": "gumbel", "top_k": 6}
        short["starts"] = torch.tensor([0, gamma + 1], dtype=torch.int32)
        short["drafted"] = short["drafted"].clone()
        short["drafted"][-1] = -1
        assert torch.equal(_verify(short).said, said[: gamma + 1])


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_sampler_is_the_argmax_chain_where_greedy(coupling):
    """At temperature 0 drafted tokens are kept while they are the target's argmax, ties to the lowest id."""
    logits = torch.randint(0, 3, (6, 40), generator=torch.Generator().manual_seed(1)).float()
    best = torch.stack([torch.nonzero(row == row.max())[0, 0] for row in logits])
    drafted = best.int()
    drafted[4] = (best[4] + 1) % 40
    drafted[2] = drafted[5] = -1
    params = RowParams(torch.zeros(6), torch.ones(6), *(torch.zeros(6, dtype=torch.long) for _ in range(3)))
    starts = torch.tensor([0, 3, 6], dtype=torch.int32)
    found = sampler.verify(logits, params, starts, drafted, coupling=coupling, draft_logits=logits)
    assert found.accepted.tolist() == [2, 1]
    assert torch.equal(found.tokens, best[[2, 4]])
    assert torch.equal(found.said, best)
    assert found.residual.tolist() == [0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_sampler_settles_near_ties_as_float64_does(device):
    """Two tokens whose scores differ by less than float32 can tell: the better one is drawn, 12 rows out of 12.

    They lie in one block or in two, of one range or of two; the rest of the row cannot win.
    """
    rows, vocab = 12, 2500
    params = _params(rows, seed=21, greedy=0.0)
    params = RowParams(torch.ones(rows), *(getattr(params, field.name) for field in fields(RowParams)[1:]))
    noise = reference.dense_noise(params, vocab, Purpose.SAMPLE)
    logits = torch.full((rows, vocab), -40.0)
    pairs = [(5, 900), (5, 2400), (1020, 1030), (2499, 3)] * 3
    for row, (one, other) in enumerate(pairs):
        logits[row, one] = 16.0
        logits[row, other] = float(16.0 + noise[row, one] - noise[row, other])
    scores = logits.double() + noise
    best = scores.topk(2).values
    assert float((best[:, 0] - best[:, 1]).max()) < 2e-6
    assert torch.equal(sampler.draw(logits.to(device), _to(params, device)).tokens.cpu(), scores.argmax(-1))


@pytest.mark.parametrize("device", DEVICES)
def test_sampler_gives_ties_to_the_lowest_id_over_ranges(device):
    """A greedy row whose largest logit occurs in several blocks says the first of them."""
    logits = torch.randint(0, 3, (2, 2600), generator=torch.Generator().manual_seed(1)).float()
    logits[0, :1500] = 0.0
    params = RowParams(torch.zeros(2), torch.ones(2), *(torch.zeros(2, dtype=torch.long) for _ in range(3)))
    first = [int(torch.nonzero(row == 2.0)[0, 0]) for row in logits]
    assert sampler.draw(logits.to(device), _to(params, device)).tokens.tolist() == first


# -- the law ---------------------------------------------------------------------------------


def test_sampler_keeps_everything_where_the_laws_are_equal_and_nothing_where_they_are_disjoint():
    """q = p accepts every drafted token at residual 0; laws without a common token reject at once, at residual 1."""
    same = _round(100, [2, 3], "maximal", seed=5, spread=0.0)
    same["params"] = _params(7, seed=5, greedy=0.0)
    same |= {"draft_logits": same["logits"], "borders": None, "draft_borders": None}
    tokens = reference.draw(same["logits"], same["params"], Purpose.DRAFT).tokens.int()
    same["drafted"] = torch.where(same["drafted"] < 0, -1, tokens)
    found = _verify(same)
    assert found.accepted.tolist() == [2, 3]
    assert float(found.residual.max()) < 1e-5
    apart = dict(same, logits=same["logits"].clone(), draft_logits=same["logits"].clone())
    apart["logits"][:, 50:] = -torch.inf
    apart["draft_logits"][:, :50] = -torch.inf
    tokens = reference.draw(apart["draft_logits"], same["params"], Purpose.DRAFT).tokens.int()
    apart["drafted"] = torch.where(same["drafted"] < 0, -1, tokens)
    found = _verify(apart)
    assert found.accepted.tolist() == [0, 0]
    assert bool((found.tokens < 50).all())
    assert found.residual[[0, 3]].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("coupling", "vocab"), [("gumbel", 40), ("maximal", 13)])
def test_sampler_reference_emits_the_targets_law(coupling, vocab):
    """First tokens of 200,000 rounds follow the target's law (seed 3, chi-square, p > 0.01), with a border on both."""
    n = 200_000
    generator = torch.Generator().manual_seed(17)
    p, q = (torch.randn(1, vocab, generator=generator) for _ in range(2))
    border, draft_border = p.median(), q.quantile(0.3)
    index = torch.arange(n)
    params = RowParams(
        torch.full((n,), 0.8), torch.ones(n), torch.zeros(n, dtype=torch.long), index + 3 * n, torch.full((n,), 50)
    )
    purpose = Purpose.DRAFT if coupling == "maximal" else Purpose.SAMPLE
    drafted = reference.draw(q.expand(n, -1), params, purpose, borders=draft_border.expand(n)).tokens.int()
    rows = params.rows(index.repeat_interleave(2))
    rows = RowParams(rows.temperature, rows.top_p, rows.top_k, rows.seeds, rows.positions + torch.arange(2).repeat(n))
    found = reference.verify(
        p.expand(2 * n, -1), rows, 2 * torch.arange(n + 1, dtype=torch.int32),
        torch.stack((drafted, torch.full_like(drafted, -1)), 1).flatten(), coupling=coupling,
        borders=border.expand(2 * n), draft_logits=q.expand(2 * n, -1), draft_borders=draft_border.expand(2 * n),
        with_residual=False,
    )  # fmt: skip
    emitted = torch.where(found.accepted > 0, drafted.long(), found.tokens)
    law = torch.softmax((p[0].double() / 0.8).masked_fill(p[0] < border, -torch.inf), -1)
    counts = torch.bincount(emitted, minlength=vocab)
    assert int(counts[law == 0].sum()) == 0
    assert chisquare(counts[law > 0].numpy(), (law[law > 0] * n).numpy()).pvalue > 0.01


def test_sampler_draws_from_what_is_left_over():
    """After a rejection the token is the reference's draw from the residual, three blocks wide, in 5 rows out of 5."""
    arguments = _round(2500, [0] * 5, "maximal", seed=11, spread=0.5)
    params, rows = _params(5, seed=11, greedy=0.0), 5
    shaped = [reference.processed(arguments[name], params, None) for name in ("logits", "draft_logits")]
    laws = reference._Laws.of(shaped[0], shaped[1], torch.ones(rows, dtype=torch.bool))
    verdicts = sampler._empty_verdicts(arguments["logits"], rows, 0, False)
    sampler._look_again(
        arguments["logits"], arguments["draft_logits"], params, None, None, arguments["starts"], verdicts,
        torch.stack(laws.totals, 1), torch.arange(rows, dtype=torch.int32), torch.ones(rows, dtype=torch.int32),
    )  # fmt: skip
    assert torch.equal(verdicts.tokens, laws.recover(torch.arange(rows), params))
    assert not torch.equal(verdicts.tokens, laws.shaped[0].argmax(-1))


# -- golden vectors --------------------------------------------------------------------------

GOLDEN = {  # (seed, position, vocab): tokens drawn at temperatures 0, 0.7 and 1, of x_v = ((v * 7919) % 1009) / 100
    (0, 0, 13): [7, 1, 1],
    (7, 5, 257): [33, 40, 40],
    (-3, 2147483648, 1000): [765, 396, 806],
    (4611686018427400249, 99, 4099): [765, 1385, 1385],
    (123456789, 4096, 4099): [765, 3311, 3311],
}


def _golden_logits(vocab: int) -> torch.Tensor:
    return ((torch.arange(vocab) * 7919) % 1009).float() / 100


@pytest.mark.parametrize("device", DEVICES)
def test_sampler_golden_tokens(device):
    """A table of draws stays as it is, on every machine: texts of a seed are promised to be reproducible."""
    for (seed, position, vocab), tokens in GOLDEN.items():
        params = RowParams(
            torch.tensor([0.0, 0.7, 1.0]), torch.ones(3), torch.zeros(3, dtype=torch.long), torch.full((3,), seed),
            torch.full((3,), position),
        )  # fmt: skip
        logits = _golden_logits(vocab).expand(3, -1).contiguous()
        assert sampler.draw(logits.to(device), _to(params, device)).tokens.tolist() == tokens
        assert reference.draw(logits, params).tokens.tolist() == tokens


# -- records ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("vocab", "k", "levels"), [(13, 13, 4), (4500, 32, 0), (1000, 5, 3)])
def test_sampler_records_the_likeliest(device, vocab, k, levels):
    """The recorded tokens are the k largest logits, the lowest id first among equals, at their float64 log-probs."""
    generator = torch.Generator().manual_seed(vocab)
    logits = 3.0 * torch.randn(3, vocab, generator=generator)
    if levels:
        logits = torch.randint(0, levels, (3, vocab), generator=generator).float() - 1.0
        logits[logits == 0.0] *= torch.where(torch.rand(3, vocab, generator=generator) < 0.5, 1.0, -1.0)[logits == 0.0]
    starts = torch.tensor([0, 3], dtype=torch.int32)
    drafted = torch.tensor([3, 4, -1], dtype=torch.int32)
    arguments = {"logits": logits, "params": _params(3, seed=1), "starts": starts, "drafted": drafted}
    found = _verify(arguments | {"coupling": "gumbel", "top_k": k}, device)
    law = torch.log_softmax(logits.double(), -1)
    order = torch.sort(logits + 0.0, dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(found.topk_ids.long(), order)
    assert torch.allclose(found.topk_logprobs.double(), law.gather(1, order), atol=1e-3, rtol=1e-3)
    assert torch.allclose(found.tail.double(), 1 - law.gather(1, order).exp().sum(-1), atol=1e-5)
    named = torch.tensor([3, 4, int(found.said[2])])
    assert torch.allclose(found.logprobs.double(), law.gather(1, named[:, None]).squeeze(1), atol=2e-5)
    assert found.residual is None


@pytest.mark.filterwarnings("ignore:invalid value|All-NaN|overflow:RuntimeWarning")
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_sampler_flags_broken_rows_and_spares_their_neighbours(coupling):
    """NaN, +inf and nothing but -inf in a row is flagged, says token 0, and changes no other request."""
    arguments = _round(300, [1, 1, 0], coupling, seed=6)
    good = _verify(arguments)
    for value, columns in ((POISON, [7]), (torch.inf, [299]), (-torch.inf, list(range(300)))):
        broken = dict(arguments, logits=arguments["logits"].clone())
        broken["logits"][2, columns] = value
        found = _verify(broken)
        assert found.finite.tolist() == [True, False, True]
        assert int(found.said[2]) == 0
        assert float(found.logprobs[2]) == -torch.inf
        others = torch.tensor([0, 2])
        assert torch.equal(found.accepted[others], good.accepted[others])
        assert torch.equal(found.tokens[others], good.tokens[others])
        assert torch.equal(found.tokens, reference.verify(**broken).tokens)


@pytest.mark.filterwarnings("ignore:invalid value|All-NaN|overflow:RuntimeWarning")
def test_sampler_takes_the_targets_law_where_the_draft_is_broken():
    """A draft of NaN is rejected at once and what follows is drawn from the target, as the reference does it."""
    arguments = _round(300, [2, 2], "maximal", seed=8)
    arguments["params"] = _params(6, seed=8, greedy=0.0)
    arguments["draft_logits"] = arguments["draft_logits"].clone()
    arguments["draft_logits"][0, 5] = POISON
    arguments["draft_logits"][3] = POISON
    found = _verify(arguments)
    assert found.accepted.tolist() == [0, 0]
    assert found.finite.tolist() == [True, True]
    assert found.residual[[0, 3]].tolist() == [1.0, 1.0]
    assert torch.equal(found.tokens, reference.verify(**arguments).tokens)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_sampler_reads_nothing_beside_the_rows(coupling):
    """NaN beyond the vocabulary of every row, in rows behind, and in the draft's bonus rows, changes nothing."""
    arguments = _round(130, [2, 0], coupling, seed=12)
    before = _verify(arguments)
    for name in ("logits", "draft_logits"):
        wide = torch.full((6, 150), POISON)
        wide[:4, :130] = arguments[name]
        arguments[name] = wide[:4, :130]
    arguments["draft_logits"][[2, 3]] = POISON
    after = _verify(arguments)
    for field in fields(Verdicts):
        assert torch.equal(getattr(after, field.name), getattr(before, field.name)), field.name


def test_sampler_writes_nothing_beside_its_results(monkeypatch):
    """Every tensor the sampler makes has a wall of canaries behind it, and poison in it, and the walls stand."""
    arguments, made, real = _round(257, [2, -1, 0], "maximal", seed=1), [], torch.Tensor.new_empty
    before = _verify(arguments)

    def walled(like, *shape, dtype=None, **device):
        if device:  # the interpreter's own
            return real(like, *shape, dtype=dtype, **device)
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        count = int(torch.tensor(sizes).prod())
        store = real(like, count + 64, dtype=dtype)
        store.view(torch.uint8)[:] = 0x5B
        made.append((store.view(torch.uint8), count * store.element_size()))
        return store[:count].view(sizes)

    monkeypatch.setattr(torch.Tensor, "new_empty", walled)
    found = sampler.verify(**arguments)
    assert len(made) > 10
    assert all(bool((store[size:] == 0x5B).all()) for store, size in made)
    for field in fields(Verdicts):
        assert torch.equal(getattr(found, field.name), getattr(before, field.name)), field.name


def test_sampler_with_no_rows_or_no_requests():
    """No rows give empty results, requests without rows keep nothing, rows without requests say nothing."""
    params, drafted = _params(2, seed=0), torch.full((2,), -1, dtype=torch.int32)
    none = params.rows(torch.arange(0))
    for starts, rows in ((torch.zeros(3, dtype=torch.int32), 0), (torch.zeros(1, dtype=torch.int32), 2)):
        found = sampler.verify(
            torch.zeros(rows, 20), params if rows else none, starts, drafted[:rows], coupling="gumbel", top_k=3
        )
        assert found.tokens.tolist() == [-1] * (len(starts) - 1)
        assert found.said.tolist() == [-1] * rows
        assert list(found.topk_ids.shape) == [rows, 3]
    assert sampler.draw(torch.zeros(0, 20), none).tokens.tolist() == []


def test_sampler_refuses_what_it_cannot_do():
    """Each refusal names the argument and what it may be."""
    good = _round(20, [1], "maximal", seed=0)
    for change, words in (
        ({"coupling": "none"}, "gumbel"), ({"draft_logits": None}, "draft_logits"), ({"top_k": 21}, "20 tokens"),
        ({"logits": good["logits"].double()}, "float64"), ({"logits": good["logits"].t()}, "draft_logits|contiguous"),
        ({"drafted": good["drafted"].long()}, "drafted"), ({"borders": good["borders"][:1]}, "borders"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            sampler.verify(**(good | change))


def test_sampler_fills_the_machine():
    """Few rows are cut into many ranges, many into few, and no range is empty."""
    for rows in (1, 5, 40, 320, 2000):
        for vocab in (20, 49152, 151936, 262144):
            splits, per_split = sampler.ranges(rows, vocab, 2048)
            blocks = -(-vocab // 2048)
            assert 1 <= splits <= 64
            assert (splits - 1) * per_split < blocks <= splits * per_split
            assert rows * splits >= min(264, rows * min(blocks, 64) // 2)
