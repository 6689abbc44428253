"""A draft that scores part of the vocabulary: the same text under any part, at any time; drawing and following."""

from __future__ import annotations

import json
import random
import shutil
import sys
from typing import Any

import numpy as np
import pytest
import torch
from engine_rig import MIXED, Changing, Rig, build_rig, plain_each, prompts, reference_models, requests_for
from tiny_pair import END, SPECIAL

from adapter.contracts import FLOOR_VERSION, Sampling
from adapter.database import open_database
from adapter.draft_vocab import TOKENS, store_vocab
from adapter.pairs import SHIPPED
from adapter.registry import Registry
from adapter.token_counts import read_counts
from adapter.vocab_registry import Vocabularies
from adapter.vocab_selection import RANKING
from kernels.packed_linear import pack_linears, packing_works
from kernels.sampling import Columns, RowParams, draw, shape_logits
from serving import cli
from serving.engine.control.fixed import FixedGamma
from serving.engine.draft_vocab import DraftVocab
from serving.engine.parameters import row_params
from serving.engine.sequence import Sequence
from serving.engine.trimmed_head import TrimmedHead

N = 32
SAMPLINGS = [*MIXED[:5], {"temperature": 0.0}]


class Vocabulary:
    """One engine whose vocabularies are published and followed by hand."""

    def __init__(self, folder, data, **engine: Any) -> None:
        self.rig: Rig = build_rig(folder, data, **({"proposers": ("draft",)} | engine))
        self.data = data
        self.registry = Vocabularies(open_database(f"sqlite:///{data / 'draftsmith.db'}"))
        self.proposer = self.rig.engine.proposers.draft
        self.width = self.rig.engine.target.model.config.vocab_size
        assert self.rig.built.hotswap is not None

    @property
    def followed(self) -> DraftVocab:
        assert self.proposer.vocabulary is not None
        return self.proposer.vocabulary

    @property
    def folder(self):
        return self.data / "vocabularies"

    def publish(self, ids: list[int]) -> int:
        manifest = store_vocab(
            self.folder, np.array(ids), vocab_size=self.width, coverage=None, counted={}, created_at_s=0.0,
            target_fingerprint=self.rig.pair.target_fingerprint,
        )  # fmt: skip
        return self.registry.publish(manifest, actor="test", reason="test").number

    def score(self, ids: list[int]) -> int:
        """Publish, promote and follow; the engine takes it before its next round."""
        number = self.publish(ids)
        self.registry.promote(number, actor="test", reason="test")
        self.followed.refresh()
        return number

    def score_all(self) -> None:
        if self.registry.live().live:
            self.registry.promote(0, actor="test", reason="test")
            self.followed.refresh()


@pytest.fixture(scope="module")
def shared(folder, tmp_path_factory):
    built = Vocabulary(folder, tmp_path_factory.mktemp("data"))
    yield built
    built.rig.built.publisher.close()


@pytest.fixture
def vocabulary(shared):
    """The shared engine, scoring all tokens, three tokens drafted a round."""
    shared.score_all()
    shared.rig.engine.controller = FixedGamma(3)
    shared.rig.engine.step()
    return shared


@pytest.fixture
def own(folder, tmp_path):
    """An engine of its own, for tests that count or damage something."""
    built = Vocabulary(folder, tmp_path)
    yield built
    built.rig.built.publisher.close()


@pytest.fixture(scope="module")
def target(shared):
    return reference_models(shared.rig.pair)[0]


@pytest.fixture(scope="module")
def ids(target):
    return prompts(target.config.vocab_size)[: len(SAMPLINGS)]


@pytest.fixture(scope="module")
def said(target, ids):
    """What the target says alone, each prompt with its own parameters."""
    return plain_each(target, ids, SAMPLINGS, N)


def mixed(ids: list[list[int]], **more: Any) -> list[Sequence]:
    return requests_for(ids, SAMPLINGS, N, **more)


# -- drawing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 300, 1500])
def test_drawing_from_some_columns_is_drawing_from_the_full_row(size):
    """n=240 rows, seed 5: the token is the one a full row with -inf elsewhere gives, shaped in any way."""
    generator = torch.Generator().manual_seed(5)
    vocab = 3001  # not a multiple of four: the last block is short
    for _ in range(20):
        kept = torch.randperm(vocab, generator=generator)[:size].sort().values
        small = torch.randn(12, size, generator=generator) * 4
        small[3] = small[3, 0]  # every column alike: noise alone decides
        how = [Sampling(temperature=t, top_p=p, top_k=k) for t in (0.0, 0.3, 1.0) for p in (1.0, 0.8) for k in (0, 5)]
        params = row_params(how, list(range(100, 112)))
        seeds = torch.randint(-(2**62), 2**62, (12,), generator=generator)
        params = RowParams(params.temperature, params.top_p, params.top_k, seeds, params.positions)
        full = torch.full((12, vocab), -torch.inf)
        full[:, kept] = small
        assert torch.equal(
            kept[draw(shape_logits(small, params), params, columns=Columns.of(kept))],
            draw(shape_logits(full, params), params),
        )


def test_rows_without_anything_to_draw_stay_in_range():
    """All -inf and all NaN give some column, not an index error."""
    kept = torch.tensor([1, 2, 9])
    params = row_params([Sampling(temperature=1.0)] * 2, [1, 2])
    rows = torch.tensor([[-torch.inf] * 3, [torch.nan] * 3])
    assert all(0 <= column < 3 for column in draw(rows, params, columns=Columns.of(kept)).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_trimmed_head_is_rows_of_the_full_one(dtype, bias):
    """Its logits are the full head's at the chosen tokens, packed or not; tokens without a row are left out."""
    torch.manual_seed(0)
    holder = torch.nn.Sequential(torch.nn.Linear(64, 200, bias=bias, dtype=dtype))
    if dtype == torch.bfloat16 and packing_works():
        pack_linears(holder)
    states = torch.randn(5, 64).to(dtype)
    head = TrimmedHead(holder[0], np.array([0, 3, 50, 199, 200, 4000], np.uint32))
    with torch.inference_mode():
        wanted = holder[0](states)[:, [0, 3, 50, 199]].float()
        got = head(states).float()
    assert head.size == 4
    assert torch.allclose(got, wanted, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    wide = head.widen(got, 256)
    assert torch.equal(wide[:, head.token_ids], got)
    assert torch.isinf(wide).sum() == 5 * (256 - 4)


# -- the same text ---------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["one token", "the end token", "ten", "half", "all but one"])
def test_the_text_is_the_targets_under_any_trimming(vocabulary, ids, said, kept):
    """Greedy and sampled, with one scored token or nearly all: what the target says alone (I1)."""
    width = vocabulary.width
    pick = random.Random(7)
    tokens = {
        "one token": [40], "the end token": [END], "ten": pick.sample(range(width), 10),
        "half": pick.sample(range(width), width // 2), "all but one": list(range(1, width)),
    }[kept]  # fmt: skip
    number = vocabulary.score(tokens)
    assert vocabulary.rig.run(mixed(ids)) == said
    assert (vocabulary.followed.number, vocabulary.followed.size) == (number, len(tokens))


def test_the_text_survives_a_new_vocabulary_at_random_steps(vocabulary, ids, said):
    """Another vocabulary, the previous, or the full one at random steps, draft lengths changing too (I1)."""
    pick = random.Random(11)
    vocabulary.rig.engine.controller = Changing(3)
    numbers = set()

    def on_step(step: int) -> None:
        if pick.random() < 0.5:
            vocabulary.score(pick.sample(range(vocabulary.width), pick.choice([1, 5, 30, vocabulary.width - 1])))
        elif vocabulary.registry.live().previous is not None:
            vocabulary.registry.roll_back(actor="test", reason="test")
            vocabulary.followed.refresh()
        numbers.add(vocabulary.followed.number)

    assert vocabulary.rig.run(mixed(ids), on_step) == said
    assert len(numbers) > 5


def test_only_scored_tokens_are_proposed(vocabulary, ids):
    """No drafted token lies outside, and its law is finite exactly inside: what maximal coupling divides by."""
    proposer = vocabulary.proposer
    kept = sorted(random.Random(3).sample(range(vocabulary.width), 25))
    vocabulary.score(kept)
    vocabulary.rig.engine.step()
    items = mixed(ids)
    for item in items:
        item.block_table = list(range(1 + 10 * int(item.request_id), 11 + 10 * int(item.request_id)))
    budget, proposer._catch_up_tokens = proposer._catch_up_tokens, sum(len(item.tokens) for item in items)
    proposer._keep_laws = True
    try:
        proposals = proposer.propose(items, [4] * len(items))
    finally:
        proposer._keep_laws, proposer._catch_up_tokens = False, budget
    outside = torch.ones(vocabulary.width, dtype=torch.bool)
    outside[kept] = False
    for item, proposal in zip(items, proposals, strict=True):
        assert len(proposal.tokens) == len(proposal.scaled) == 4
        assert set(proposal.tokens) <= set(kept)
        laws = torch.stack(proposal.scaled)
        assert laws.shape == (4, vocabulary.width)
        assert torch.isinf(laws[:, outside]).all()
        if item.sampling.top_k == 0 and item.sampling.top_p == 1:
            assert torch.isfinite(laws[:, kept]).all()
        assert all(-20 < logprob <= 1e-6 for logprob in proposal.logprobs)


def test_maximal_coupling_serves_a_trimmed_draft(folder, tmp_path, ids, said):
    """Under the classical rule greedy text is the target's, and sampled requests finish with drafts accepted."""
    own = Vocabulary(folder, tmp_path, coupling="maximal")
    own.score(list(range(0, own.width, 2)))
    items = mixed(ids)
    answers = own.rig.run(items)
    greedy = [i for i, how in enumerate(SAMPLINGS) if how["temperature"] == 0]
    assert [answers[i] for i in greedy] == [said[i] for i in greedy]
    assert sum(counts.num_accepted for item in items for counts in item.by_version.values()) > 0
    own.rig.built.publisher.close()


class Allowing:
    """Rules that allow some tokens only, as a grammar does."""

    failed = False

    def __init__(self, allowed: list[int]) -> None:
        self.allowed = allowed

    def apply(self, logits: torch.Tensor, drafted: list[int], first: int = 0) -> None:
        keep = logits[:, self.allowed].clone()
        logits.fill_(-torch.inf)
        logits[:, self.allowed] = keep

    def commit(self, tokens: list[int]) -> None:
        return None


@pytest.mark.parametrize("allowed", ["inside", "outside"])
def test_rules_and_a_trimmed_vocabulary(vocabulary, ids, allowed):
    """With allowed tokens inside it or wholly outside it, text is what it is without a draft; none other is drafted."""
    scored, other = list(range(3, 40)), list(range(40, vocabulary.width))
    rules = Allowing(scored[::2] if allowed == "inside" else other)

    def answers(gamma: int) -> tuple[list[list[int]], int]:
        items = mixed(ids, gamma=gamma)
        for item in items:
            item.constraints = rules  # type: ignore[assignment]
        text = vocabulary.rig.run(items)
        return text, sum(counts.num_drafted for item in items for counts in item.by_version.values())

    without, _ = answers(0)
    vocabulary.score(scored)
    drafted_text, drafted = answers(3)
    assert drafted_text == without
    assert set().union(*drafted_text) <= set(rules.allowed)
    assert (drafted == 0) == (allowed == "outside")


# -- following -------------------------------------------------------------------------------


def test_a_new_vocabulary_is_taken_between_two_rounds(vocabulary):
    """Nothing changes before the engine's next step; then number, size, generation and receipt do."""
    before = vocabulary.followed.number
    number = vocabulary.score([1, 2, 30])
    assert vocabulary.followed.number == before
    vocabulary.rig.engine.step()
    followed = vocabulary.followed
    assert (followed.number, followed.size, followed.generation) == (number, 3, vocabulary.registry.live().generation)
    assert (followed.last.number, followed.last.replaced, followed.last.size) == (number, before, 3)
    assert vocabulary.proposer.runner.head is followed.head
    assert vocabulary.rig.engine.version == FLOOR_VERSION  # a draft version is another matter


def test_rolling_back_a_vocabulary_needs_no_disk(own):
    """With every file deleted, the previous vocabulary and the full one are taken again."""
    first, second = own.score([1, 2, 30]), own.score([1, 2, 40])
    own.rig.engine.step()
    assert own.followed.number == second
    shutil.rmtree(own.folder)
    for wanted in (first, second):
        own.registry.roll_back(actor="test", reason="test")
        own.followed.refresh()
        own.rig.engine.step()
        assert own.followed.number == wanted
    own.registry.promote(0, actor="test", reason="test")
    own.followed.refresh()
    own.rig.engine.step()
    assert (own.followed.number, own.proposer.runner.head) == (0, None)


def test_only_live_and_previous_stay_in_memory(own):
    """After six vocabularies at most three heads are held (I5)."""
    for token in range(6):
        own.score([1, 2, 30 + token])
        own.rig.engine.step()
    assert len(own.followed._heads) <= 3


def test_a_damaged_vocabulary_is_refused_and_left(own, ids, said):
    """An altered file is never scored with: it is quarantined, the alias goes back, and serving goes on."""
    first = own.score([1, 2, 30])
    own.rig.engine.step()
    second = own.publish([1, 2, 31])
    path = own.folder / own.registry.rows()[0].sha256 / TOKENS
    path.write_bytes(path.read_bytes()[:-4] + np.array([99], "<u4").tobytes())
    own.registry.promote(second, actor="test", reason="test")
    for _ in range(2):
        own.followed.refresh()
        own.rig.engine.step()
    assert own.followed.number == own.registry.live().live == first
    assert own.registry.rows()[0].state == "quarantined"
    assert "was altered" in Registry(open_database(f"sqlite:///{own.data / 'draftsmith.db'}")).audit(2)[1].reason
    assert own.rig.run(mixed(ids)) == said


# -- counting --------------------------------------------------------------------------------


def test_committed_tokens_are_counted_by_segment(own, ids):
    """Counts are exactly what requests generated, per segment; so is the share inside; both survive a restart."""
    own.score(list(range(0, own.width, 2)))
    own.rig.engine.step()
    items = mixed(ids)
    for i, item in enumerate(items):
        item.segment = f"s{i % 2}"
    own.rig.run(items)
    own.followed.refresh()
    generated = [token for item in items for token in item.tokens[item.prompt_tokens :]]
    assert own.followed.counters() == {
        "draft_vocab_number": 1, "draft_vocab_size": own.followed.head.size, "draft_vocab_counted": len(generated),
        "draft_vocab_inside": sum(token % 2 == 0 for token in generated),
    }  # fmt: skip
    own.followed.save()
    counts = read_counts(own.folder)
    assert counts is not None
    for name in ("s0", "s1"):
        mine = [token for item in items if item.segment == name for token in item.tokens[item.prompt_tokens :]]
        assert counts.segments[name].tolist() == np.bincount(mine, minlength=own.width).tolist()


def test_without_trimming_nothing_is_followed_or_counted(folder, tmp_path, ids, said):
    """engine.draft_vocab_size = 0 scores all tokens whatever the registry says."""
    built = build_rig(folder, tmp_path, draft_vocab_size=0)
    assert built.engine.proposers.draft.vocabulary is None
    assert built.engine.proposers.vocabulary_counts == {}
    assert built.run(mixed(ids)) == said
    built.built.publisher.close()


def test_the_shipped_ranking_is_whole():
    """The ranking that ships holds no token twice, none outside, and more than any default size."""
    [path] = SHIPPED.glob(f"*/{RANKING}")
    ranking = np.frombuffer(path.read_bytes(), "<u4")
    assert len(np.unique(ranking)) == len(ranking) >= 32768
    assert ranking.max() < 49152


# -- the command line ------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capfd):
    """Return `run(*arguments) -> (status, stdout, stderr)`; the command runs in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["draftsmith", "vocab", *map(str, arguments)])
        capfd.readouterr()  # what engines built before have logged
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def test_publishing_from_traffic_and_back(own, ids, run):
    """Serve, publish, list, roll back: the engine follows, end tokens are in, the audit says who."""
    at = ("--data-dir", own.data)
    status, _, err = run("publish", *at, "--size", 20)
    assert status == 2
    assert "nothing was counted yet" in err
    own.rig.run(mixed(ids))
    own.followed.refresh()
    own.followed.save()
    status, out, _ = run("publish", *at, "--size", 20, "--json", "--reason", "first week")
    made = json.loads(out)
    assert (status, made["number"], made["size"], made["live"], made["generation"]) == (0, 1, 20, 1, 2)
    assert 20 / own.width < made["coverage"] < 1
    own.followed.refresh()
    own.rig.engine.step()
    assert set(range(len(SPECIAL))) <= set(own.followed.head.token_ids.tolist())
    listed = json.loads(run("list", *at, "--json")[1])
    assert [(row["number"], row["alias"]) for row in listed["vocabularies"]] == [(1, "live"), (0, "previous")]
    assert "first week" in run("list", *at)[1]
    assert "vocabulary 0 is live (generation 3, previous 1)" in run("rollback", *at)[1]
    assert "vocabulary 1 is live" in run("promote", 1, *at, "--expected-generation", 3)[1]
    rows = Registry(open_database(f"sqlite:///{own.data / 'draftsmith.db'}")).audit(4)
    assert [row.verb for row in rows] == ["vocab_promote", "vocab_roll_back", "vocab_promote", "vocab_publish"]
    assert all(row.actor.startswith("cli") for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("publish",), "not smaller than the full one"),
        (("publish", "--size", 2), "nothing was counted yet"),
        (("publish", "--size", 20, "--expected-generation", 9), "generation is 1, you looked at 9"),
        (("promote", 9), "no vocabulary 9"),
        (("rollback",), "no earlier one"),
    ],
)
def test_what_cannot_be_done_is_one_line(vocabulary, run, folder, tmp_path_factory, arguments, words):
    """Refusals end with status 2 and one line that says why."""
    data = tmp_path_factory.getbasetemp() / "refusing"
    if not data.exists():
        built = Vocabulary(folder, data)
        built.rig.built.publisher.close()
    status, out, err = run(*arguments, "--data-dir", data)
    assert (status, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_a_folder_without_a_deployment_is_said(run, tmp_path):
    """An empty folder is not a deployment."""
    status, _, err = run("list", "--data-dir", tmp_path)
    assert status == 2
    assert "holds no deployment" in err
