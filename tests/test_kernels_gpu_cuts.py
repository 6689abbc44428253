"""The kernels that find where top-k, top-p and min-p cut a row, against the law that sampling follows."""

from __future__ import annotations

import pytest
import torch

from kernels.gpu import cuts
from kernels.reference import cuts as reference
from kernels.sampling import RowParams, shape_logits

pytestmark = pytest.mark.slow  # in the interpreter: half a minute of CPU

NAN, INF = float("nan"), float("inf")
MIXED = [  # temperature, top-k, top-p, min-p of each row
    (1.0, 5, 1.0, 0.0), (0.7, 0, 0.9, 0.0), (0.0, 3, 0.5, 0.1), (1.3, 7, 0.8, 0.05), (1.0, 0, 1.0, 0.2),
    (2.0, 50, 0.999, 0.0), (0.5, 0, 0.95, 0.01), (1.0, 0, 1.0, 0.0), (1.0, 0, 0.0, 0.0), (0.1, 200, 0.6, 0.3),
    (1.0, 1, 1.0, 1.0), (5.0, 100000, 0.99, 0.0),
]  # fmt: skip


def params_of(rows: list[tuple[float, int, float, float]], *, with_min_p: bool = True) -> RowParams:
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    k = torch.tensor(top_k)
    return RowParams(
        torch.tensor(temperature), torch.tensor(top_p), k, k, k, torch.tensor(min_p) if with_min_p else None
    )


def logits_of(rows: int, vocab: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def kept_by_law(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """What `shape_logits` keeps; greedy rows keep everything."""
    return shape_logits(logits.float(), params) > -INF


def assert_same_cut(logits: torch.Tensor, params: RowParams, borders: torch.Tensor) -> None:
    """The kept sets are equal, or differ in tokens whose cumulative mass is within 1e-5 of top-p."""
    kept, wanted = logits.float() >= borders[:, None], kept_by_law(logits, params)
    for row in torch.nonzero((kept != wanted).any(-1)).flatten().tolist():
        own = params.rows(torch.tensor([row]))
        only_k = RowParams(own.temperature, torch.ones(1), own.top_k, own.seeds, own.positions)
        scaled = shape_logits(logits[row : row + 1].float(), only_k).double()[0]
        mass = torch.softmax(scaled, -1)
        for token in torch.nonzero(kept[row] != wanted[row]).flatten().tolist():
            before = float(mass[scaled > scaled[token]].sum())
            assert abs(before - float(params.top_p[row])) < 1e-5, (row, token)


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(13, torch.float32), (4099, torch.float32), (1000, torch.bfloat16), (4099, torch.bfloat16), (1000, torch.float16)],
)
def test_cut_keeps_what_sampling_keeps(vocab: int, dtype: torch.dtype) -> None:
    """Every mix of temperature, top-k, top-p and min-p gives the law's own set, and its smallest logit."""
    logits, params = logits_of(len(MIXED), vocab, seed=vocab).to(dtype), params_of(MIXED)
    borders = cuts.cut_borders(logits, params)
    assert_same_cut(logits, params, borders)
    assert torch.equal(borders[[2, 7]], torch.tensor([-INF, -INF]))
    finite = borders > -INF
    assert (logits.float()[finite] == borders[finite, None]).any(-1).all()


@pytest.mark.parametrize("spread", [0.0, 0.02, 40.0])
def test_cut_of_flat_and_of_steep_rows(spread: float) -> None:
    """Rows whose tokens all tie, hardly differ (more of them than the buffer takes), or leave one, are cut alike."""
    logits, params = logits_of(3, 9001, 5, spread), params_of([MIXED[i] for i in (1, 3, 8)])
    assert_same_cut(logits, params, cuts.cut_borders(logits, params))


def test_cut_reads_the_row_where_the_buffer_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 64 tokens the borders are those with room for 8192."""
    logits, params = logits_of(4, 2100, 6, 1.0), params_of(MIXED[:4])
    wide = cuts.cut_borders(logits, params)
    monkeypatch.setattr(cuts, "_ROOM", 64)
    assert torch.equal(cuts.cut_borders(logits, params), wide)


def test_cut_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone (in many splits) and among others (in one), a row of 9001 tokens has the same border, to the bit."""
    logits, params = logits_of(3, 9001, 7), params_of([MIXED[i] for i in (1, 3, 5)])
    split = cuts.cut_borders(logits, params)
    monkeypatch.setattr(cuts, "_PROGRAMS", 1)
    assert torch.equal(cuts.cut_borders(logits, params), split)


def test_cut_keeps_ties_that_only_the_temperature_makes() -> None:
    """Neighbouring float32 logits that are equal after the division stay together, at every border."""
    start = torch.tensor(8.0)
    near = [start]
    for _ in range(15):
        near.append(torch.nextafter(near[-1], torch.tensor(0.0)))
    row = torch.cat((torch.stack(near), logits_of(1, 200, 8)[0].clamp(max=7.0)))
    rows = [(1.37, k, p, 0.0) for k in (1, 2, 5, 8) for p in (1.0, 0.2)]
    logits, params = row.expand(len(rows), -1).contiguous(), params_of(rows)
    assert torch.equal(logits >= cuts.cut_borders(logits, params)[:, None], kept_by_law(logits, params))


def test_cut_counts_forbidden_tokens_last() -> None:
    """Rows that constraints left 30 tokens, or one, or none, are cut among those."""
    rows = [MIXED[i] for i in (0, 3, 6)]
    logits = logits_of(9, 1000, 9)
    logits[:3, 30:], logits[3:6, 1:], logits[6:] = -INF, -INF, -INF
    params = params_of(rows * 3)
    borders = cuts.cut_borders(logits, params)
    finite = logits > -INF
    assert torch.equal((logits >= borders[:, None]) & finite, kept_by_law(logits, params) & finite)


def test_cut_survives_rows_that_are_no_law() -> None:
    """NaN among the logits counts as -inf; +inf and rows of NaN alone end, and other rows do not notice."""
    logits, params = logits_of(12, 1000, 10), params_of(MIXED)
    clean = cuts.cut_borders(logits, params)
    logits[0, 1::7], logits[1], logits[3, 5] = NAN, NAN, INF
    borders = cuts.cut_borders(logits, params)
    assert torch.equal(borders[4:], clean[4:])
    assert borders[0] == logits[0].nan_to_num(-INF).topk(5).values[-1]


def test_cut_touches_nothing_but_its_borders() -> None:
    """Rows of a wider tensor that lie between NaN stay as they are, and NaN beside a row never enters it."""
    guarded = torch.full((6, 1020), NAN)
    guarded[1:5, 10:-10] = logits_of(4, 1000, 11)
    logits, before, params = guarded[1:5, 10:-10], guarded.clone(), params_of(MIXED[:4])
    assert_same_cut(logits, params, cuts.cut_borders(logits, params))
    assert torch.equal(guarded.nan_to_num(7.5), before.nan_to_num(7.5))


def test_cut_reads_no_scratch_it_has_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """With scratch memory full of NaN and of large numbers the borders are the same."""
    rows = [MIXED[i] for i in (1, 2, 4)]
    logits, params = logits_of(3, 5000, 13).bfloat16(), params_of(rows)
    clean, empty = cuts.cut_borders(logits, params), torch.empty

    def dirty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made = empty(*shape, dtype=dtype, device=device)
        return made.fill_(NAN if made.is_floating_point() else 1 << 30)

    monkeypatch.setattr(cuts.torch, "empty", dirty)
    assert torch.equal(cuts.cut_borders(logits, params), clean)


def test_cut_takes_no_rows_and_no_min_p() -> None:
    """Zero rows give zero borders; min-p None is off for every row."""
    assert cuts.cut_borders(torch.empty(0, 40), params_of(MIXED).rows(torch.tensor([], dtype=torch.long))).shape == (0,)
    logits, params = logits_of(4, 300, 12), params_of(MIXED[:4], with_min_p=False)
    assert_same_cut(logits, params, cuts.cut_borders(logits, params))


@pytest.mark.parametrize("vocab", [13, 1000, 4099])
def test_reference_borders_are_those_of_the_sort(vocab: int) -> None:
    """What the CPU answers, a sort that asks nothing of the host answers too, and both keep what sampling keeps."""
    logits, params = logits_of(len(MIXED), vocab, seed=vocab), params_of(MIXED)
    assert torch.equal(reference.cut_borders(logits, params), reference.sorted_borders(logits, params))
    borders = reference.cut_borders(logits.bfloat16(), params)
    assert_same_cut(logits.bfloat16(), params, borders)
    assert torch.equal(borders[[2, 7]], torch.tensor([-INF, -INF]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, p: (x[0], p), "must be \\[rows, vocab\\]"),
        (lambda x, p: (x.double(), p), "bf16, fp16 or fp32"),
        (lambda x, p: (x[:, ::2], p), "contiguous"),
        (lambda x, p: (x[:5], p), "temperature is"),
    ],
)
def test_cut_refuses_in_words(change, words) -> None:  # type: ignore[no-untyped-def]
    """Shapes, dtypes and strides that do not fit are named."""
    logits, params = change(logits_of(12, 40, 1), params_of(MIXED))
    with pytest.raises(ValueError, match=words):
        cuts.cut_borders(logits, params)
