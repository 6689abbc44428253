"""Records on the wire: round trips for any content, named errors for anything else."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter import contracts
from adapter.contracts import (
    SCHEMA_VERSION,
    Counts,
    RequestOutcome,
    Sampling,
    Verdict,
    VerifiedBlock,
    VersionCounts,
    VersionSpan,
    WireError,
)
from adapter.wire import block_from_wire, outcome_from_wire, to_wire

counts = st.integers(0, 2**31)
seconds = st.floats(0, 1e9)
samplings = st.builds(
    Sampling, temperature=st.floats(0, 2), top_p=st.floats(0, 1), top_k=counts, seed=st.integers(0, 2**63 - 1)
)


@st.composite
def blocks(draw: st.DrawFn) -> VerifiedBlock:
    """A well-formed block of 0 to 6 records over 2 to 20 tokens."""
    tokens = draw(st.integers(2, 20))
    first = draw(st.integers(0, 1000))
    places = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=6)))
    n, k = len(places), draw(st.integers(1, 4))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    return VerifiedBlock(
        schema=SCHEMA_VERSION,
        request_id=draw(st.text(max_size=20)),
        segment=draw(st.text(max_size=20)),
        target_fingerprint="a" * 64,
        coupling=draw(st.sampled_from(["gumbel", "maximal"])),
        sampling=draw(samplings),
        prompt_tokens=draw(counts),
        first_position=first,
        versions=(VersionSpan(first, 0), VersionSpan(first + 3, 2)),
        top_k=k,
        token_ids=generator.integers(0, 2**32, tokens).astype("<u4").tobytes(),
        positions=(np.array(places, "<u4") + first).astype("<u4").tobytes(),
        verdicts=generator.integers(0, 3, n).astype("u1").tobytes(),
        draft_ids=generator.integers(0, 2**32, n).astype("<u4").tobytes(),
        draft_logprobs=generator.standard_normal(n).astype("<f4").tobytes(),
        topk_ids=generator.integers(0, 2**32, (n, k)).astype("<u4").tobytes(),
        topk_logprobs=generator.standard_normal((n, k)).astype("<f2").tobytes(),
        tail_mass=generator.random(n).astype("<f4").tobytes(),
        logged_at_s=draw(seconds),
        tenant=draw(st.text(max_size=20)),
        keep_probability=draw(st.floats(0, 1, exclude_min=True)),
    )


outcomes = st.builds(
    RequestOutcome,
    schema=st.just(SCHEMA_VERSION),
    request_id=st.text(max_size=20),
    segment=st.text(max_size=20),
    finish_reason=st.sampled_from(["stop", "length", "cancelled", "error"]),
    sampling=samplings,
    prompt_tokens=counts,
    delivered_tokens=counts,
    plain_rounds=counts,
    by_version=st.lists(
        st.builds(
            VersionCounts,
            version=counts,
            counts=st.builds(Counts, num_rounds=counts, num_drafted=counts, num_examined=counts, num_accepted=counts),
        ),
        max_size=3,
    ).map(tuple),
    accepted_by_position=st.lists(counts, max_size=4).map(tuple),
    queue_s=seconds,
    first_token_s=seconds,
    total_s=seconds,
    finished_at_s=seconds,
)


@given(blocks())
def test_a_block_survives_the_wire(block: VerifiedBlock) -> None:
    """from_wire(to_wire(x)) == x, with arrays shaped as the docstring says."""
    read = block_from_wire(to_wire(block))
    assert block == read
    n = read.num_records
    assert (n, read.top_k) == read.array("topk_logprobs").shape == read.array("topk_ids").shape
    for name in ("positions", "verdicts", "draft_ids", "draft_logprobs", "tail_mass"):
        assert (n,) == read.array(name).shape


@given(outcomes)
def test_an_outcome_survives_the_wire(outcome: RequestOutcome) -> None:
    """from_wire(to_wire(x)) == x, and totals are the sums over versions."""
    read = outcome_from_wire(to_wire(outcome))
    assert outcome == read
    assert sum(item.counts.num_accepted for item in outcome.by_version) == read.counts.num_accepted


@given(st.binary(max_size=300))
def test_garbage_is_a_wire_error(data: bytes) -> None:
    """Random bytes never pass and never raise anything else."""
    for read in (block_from_wire, outcome_from_wire):
        with pytest.raises(WireError):
            read(data)


@given(blocks(), st.data())
def test_a_cut_block_is_a_wire_error(block: VerifiedBlock, data: st.DataObject) -> None:
    """A block cut anywhere is refused."""
    wire = to_wire(block)
    with pytest.raises(WireError):
        block_from_wire(wire[: data.draw(st.integers(0, len(wire) - 1))])


@given(
    blocks(), st.sampled_from(["positions", "draft_ids", "draft_logprobs", "topk_ids", "topk_logprobs", "tail_mass"])
)
def test_arrays_must_agree_in_length(block: VerifiedBlock, field: str) -> None:
    """One array that is longer or shorter than the others is named."""
    changed = dataclasses.replace(block, **{field: getattr(block, field) + b"\0\0\0\0"})
    with pytest.raises(WireError, match=field):
        block_from_wire(to_wire(changed))


def good_block() -> VerifiedBlock:
    return VerifiedBlock(
        schema=SCHEMA_VERSION, request_id="r", segment="s", target_fingerprint="a" * 64, coupling="gumbel",
        sampling=Sampling(), prompt_tokens=3, first_position=10, versions=(VersionSpan(10, 0),), top_k=1,
        token_ids=np.arange(4, dtype="<u4").tobytes(), positions=np.array([12], "<u4").tobytes(), verdicts=b"\1",
        draft_ids=b"\0" * 4, draft_logprobs=b"\0" * 4, topk_ids=b"\0" * 4, topk_logprobs=b"\0" * 2,
        tail_mass=b"\0" * 4, logged_at_s=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("position", [0, 10, 14, 2**32 - 1])
def test_positions_stay_inside_the_tokens(position: int) -> None:
    """A record before the second token or past the last one has nothing to be judged on."""
    bad = dataclasses.replace(good_block(), positions=np.array([position], "<u4").tobytes())
    with pytest.raises(WireError, match="positions point outside its 4 tokens"):
        block_from_wire(to_wire(bad))


@pytest.mark.parametrize(
    "change",
    [
        {"coupling": "other"},
        {"top_k": 0},
        {"top_k": -1},
        {"verdicts": b"\3"},
        {"token_ids": b"\0" * 15},
        {"schema": SCHEMA_VERSION + 1},
        {"first_position": -1},
    ],
    ids=str,
)
def test_values_without_a_meaning_are_refused(change: dict[str, Any]) -> None:
    """Unknown couplings, verdicts and schemas, and impossible sizes, are wire errors."""
    block_from_wire(to_wire(good_block()))
    with pytest.raises(WireError):
        block_from_wire(to_wire(dataclasses.replace(good_block(), **change)))


def test_a_newer_schema_is_refused_by_number() -> None:
    """A reader says which schema it met and which one it reads."""
    newer = dataclasses.replace(good_block(), schema=7)
    with pytest.raises(WireError, match=f"has schema 7; this build reads 1 and {SCHEMA_VERSION}"):
        block_from_wire(to_wire(newer))


def test_what_was_written_before_sampling_stands_for_itself() -> None:
    """A block of schema 1 has neither tenant nor chance: every record of it was kept and weighs 1."""
    old = msgspec.msgpack.decode(to_wire(dataclasses.replace(good_block(), schema=1)))
    del old["tenant"], old["keep_probability"]
    read = block_from_wire(msgspec.msgpack.encode(old))
    assert (read.tenant, read.keep_probability, read.row_weights().tolist()) == ("", 1.0, [1.0])


@pytest.mark.parametrize("chance", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_a_chance_that_is_none_is_refused(chance: float) -> None:
    """What is not above 0 and at most 1 is named."""
    with pytest.raises(WireError, match="keep_probability is .*; expected above 0, at most 1"):
        block_from_wire(to_wire(dataclasses.replace(good_block(), keep_probability=chance)))


@pytest.mark.parametrize("places", [[12, 12], [13, 12], [2**32 - 1, 12]])
def test_positions_rise_strictly(places: list[int]) -> None:
    """A position that comes twice or goes back is refused, whatever the difference overflows to."""
    two = {name: getattr(good_block(), name) * 2 for name in
           ("verdicts", "draft_ids", "draft_logprobs", "topk_ids", "topk_logprobs", "tail_mass")}  # fmt: skip
    bad = dataclasses.replace(good_block(), positions=np.array(places, "<u4").tobytes(), **two)
    with pytest.raises(WireError, match="positions do not rise"):
        block_from_wire(to_wire(bad))


def test_weighted_sums_are_those_of_everything() -> None:
    """What is kept by chance, weighted, counts as many positions as there were.

    n = 20,000 positions, a third of them rejected, chance 0.25, seed 5; the bound is five standard deviations of the
    weighted count, sqrt(n (1 - p) / p) over the positions that were not rejected.
    """
    generator = np.random.default_rng(5)
    verdicts = generator.integers(0, 3, 20_000)
    kept = verdicts[(verdicts == Verdict.REJECTED) | (generator.random(20_000) < 0.25)]
    block = dataclasses.replace(good_block(), verdicts=kept.astype("u1").tobytes(), keep_probability=0.25)
    weights = block.row_weights()
    assert set(weights[kept == Verdict.REJECTED]) == {1.0}
    for verdict in (Verdict.ACCEPTED, Verdict.UNDRAFTED):
        count = int((verdicts == verdict).sum())
        assert abs(weights[kept == verdict].sum() - count) < 5 * (count * 0.75 / 0.25) ** 0.5


def test_rates_come_from_counts() -> None:
    """Acceptance and tokens per round follow the glossary and are None where nothing ran."""
    counts = Counts(num_rounds=10, num_drafted=30, num_examined=20, num_accepted=12)
    assert (0.6, 2.2) == (counts.acceptance, counts.tokens_per_round)
    assert (None, None) == (Counts().acceptance, Counts().tokens_per_round)
    assert Counts(num_rounds=11, num_drafted=30, num_examined=20, num_accepted=12) == counts + Counts(num_rounds=1)


def test_every_error_is_ours() -> None:
    """Each named error descends from DraftsmithError and documents when it is raised."""
    errors = [item for item in vars(contracts).values() if isinstance(item, type) and issubclass(item, Exception)]
    assert len(errors) >= 6
    for error in errors:
        assert issubclass(error, contracts.DraftsmithError)
        assert error.__doc__
