"""Making a day-0 draft of a tiny target: it learns, it resumes, it is exactly reproducible, it can be served."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_pair import write_target
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter.contracts import SettingsError
from adapter.models import prepare_pair
from adapter.pairs import DRAFT_MANIFEST, DRAFT_TENSORS, load_draft_manifest
from adapter.settings import Settings
from distill.bootstrap import _load_shard, bootstrap, choose_layers, prune
from distill.bootstrap_cli import run
from distill.bootstrap_recipe import Recipe
from distill.bootstrap_training import evaluate, used_tokens
from distill.selfplay import chat_turns, write_chats

RECIPE = Recipe(
    layers=2, shards=3, rows=8, length=64, top_k=16, steps=80, batch_rows=8, learning_rate=3e-3, warmup_steps=5, seed=7,
    vocab_size=200,
)  # fmt: skip
FLAGS = [
    "--layers", "2", "--shards", "2", "--rows", "4", "--length", "32", "--steps", "4", "--batch-rows", "4",
    "--seed", "3",
]  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bootstrap") / "tiny-target"
    write_target(folder, brevity=2.5, seed=4)
    return folder


@pytest.fixture(scope="module")
def done(target, tmp_path_factory):
    """One whole run: the folder of the draft, the folder of the work, and every report."""
    base, heard = tmp_path_factory.mktemp("run"), []
    manifest = bootstrap(target, "tiny", base / "out", base / "work", RECIPE, lambda *report: heard.append(report))
    return base / "out", base / "work", manifest, heard


def _quiet(*_report) -> None:
    """Hear nothing."""


def test_a_bootstrapped_draft_is_served(target, done, tmp_path):
    """The result is a pruned draft of exactly this target, with a sound manifest."""
    pair = prepare_pair(Settings(target=str(target), draft=str(done[0]), data_dir=tmp_path))
    assert pair.draft_kind == "pruned"
    manifest = load_draft_manifest(done[0])
    assert manifest == done[2]
    assert manifest.layers == (0, 2)
    assert manifest.target_fingerprint == pair.target_fingerprint
    assert 0 < manifest.measured["acceptance"] <= 1
    assert manifest.measured["positions"] > 20


def test_training_makes_the_draft_better(target, done):
    """The loss falls, and held-out chats agree more often than with the untrained pruned layers."""
    losses = [figures["kl"] for phase, _, _, figures in done[3] if phase == "training"]
    assert sum(losses[-5:]) < sum(losses[:5])
    pruned, shards = prune(target, [0, 2]), [_load_shard(done[1], i) for i in range(RECIPE.shards)]
    vocabulary = used_tokens(shards[:-1], RECIPE.vocab_size, pruned.lm_head.weight.shape[0])
    untrained = evaluate(pruned, shards[-1], 8, vocabulary)
    assert done[2].measured["acceptance"] >= untrained["acceptance"]


def test_a_draft_goes_on_from_another_one(target, done, tmp_path):
    """Begun with a finished draft the first loss is about the finished one's, and the manifest names it."""
    heard: list[dict[str, float]] = []

    def note(phase, _count, _total, figures):
        if phase == "training":
            heard.append(figures)

    shutil.copytree(done[1] / "shards", tmp_path / "work" / "shards")  # the text does not depend on the start
    recipe = replace(RECIPE, steps=4, learning_rate=1e-4)
    manifest = bootstrap(target, "tiny", tmp_path / "out", tmp_path / "work", recipe, note, done[0])
    first, *_, last = [figures["kl"] for phase, _, _, figures in done[3] if phase == "training"]
    assert abs(heard[0]["kl"] - last) < abs(heard[0]["kl"] - first)
    assert manifest.recipe["start"] == done[2].sha256


def test_a_start_that_does_not_fit_is_refused(target, done, tmp_path):
    """A draft of another target, or of other layers, is no start; nothing is written."""
    other = tmp_path / "other-target"
    write_target(other, seed=9)
    with pytest.raises(SettingsError, match="is a draft of tiny, not of this target"):
        bootstrap(other, "other", tmp_path / "out", tmp_path / "work", RECIPE, _quiet, done[0])
    changed = tmp_path / "changed"
    shutil.copytree(done[0], changed)
    manifest = json.loads((changed / DRAFT_MANIFEST).read_text())
    (changed / DRAFT_MANIFEST).write_text(json.dumps(manifest | {"layers": [0, 1]}))
    with pytest.raises(SettingsError, match=r"keeps the layers \[0, 1\], asked for are \[0, 2\]"):
        bootstrap(target, "tiny", tmp_path / "out", tmp_path / "work", RECIPE, _quiet, changed)
    assert not (tmp_path / "work").exists()


def test_what_is_scored_is_what_such_text_uses_most(done):
    """The chosen tokens hold more of the target's expectation than any others of that number; 0 keeps all."""
    shards = [_load_shard(done[1], 0)]
    full = 1 + int(shards[0].topk_ids.max())
    use = torch.zeros(full, dtype=torch.float64)
    for ids, logprobs in zip(shards[0].topk_ids[shards[0].free_mask], shards[0].topk_logprobs[shards[0].free_mask],
                             strict=True):  # fmt: skip
        use[ids.long()] += logprobs.double().exp()
    chosen = used_tokens(shards, 20, full)
    inside = [token for token in range(full) if int(chosen.find(torch.tensor([token]))[0]) >= 0]
    assert len(inside) == 20
    assert float(use[inside].sum()) == pytest.approx(float(use.topk(20).values.sum()))
    assert int(used_tokens(shards, 0, full).find(torch.tensor([full - 1]))[0]) == full - 1


def test_a_share_of_the_chats_begins_with_given_words(target, done):
    """With a share of 1 every chat does, with 0 none; the given words are not the target's own."""
    words = [[5, 6, 7]]
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    turns = chat_turns(AutoTokenizer.from_pretrained(target))
    start = len(turns.prefix)
    for share, found in ((1.0, 6), (0.0, 0)):
        chats = write_chats(model, turns, rows=6, length=start + 12, seed=1, top_k=8, openings=words, opened=share)
        begun = (chats.token_ids[:, start : start + 3] == torch.tensor(words[0])).all(1)
        assert int(begun.sum()) == found
        assert not chats.free_mask[begun][:, start - 1 : start + 2].any()


def test_progress_counts_every_phase_to_its_end(done):
    """Each phase reports rising counts that end at its total, and training carries its figures."""
    for phase, total in (("writing", None), ("training", RECIPE.steps)):
        counts = [(count, all_) for name, count, all_, _ in done[3] if name == phase]
        assert [count for count, _ in counts] == sorted(count for count, _ in counts)
        assert total is None or counts[-1] == (total, total)
    assert set(done[3][-1][3]) == {"kl", "acceptance"}


def test_a_run_that_was_cut_short_resumes_exactly(target, done, tmp_path):
    """Stopped while writing and again while training, the same recipe ends with the same bytes."""

    class Stop(Exception):
        """Thrown by a report, as a kill would come."""

    def stop_at(phase: str, fraction: float):
        def report(name, count, total, _figures):
            if name == phase and count >= fraction * total:
                raise Stop

        return report

    for phase, fraction in (("writing", 0.5), ("training", 0.7)):
        with pytest.raises(Stop):
            bootstrap(target, "tiny", tmp_path / "out", tmp_path / "work", RECIPE, stop_at(phase, fraction))
        assert not (tmp_path / "out" / DRAFT_MANIFEST).exists()
    again = bootstrap(target, "tiny", tmp_path / "out", tmp_path / "work", RECIPE, _quiet)
    assert again.sha256 == done[2].sha256
    assert (tmp_path / "out" / DRAFT_TENSORS).read_bytes() == (done[0] / DRAFT_TENSORS).read_bytes()


def test_a_finished_run_repeats_at_once(target, done, tmp_path):
    """Called again on finished work it neither writes nor trains, and exports the same draft."""
    heard = []
    again = bootstrap(target, "tiny", tmp_path, done[1], RECIPE, lambda *report: heard.append(report))
    assert again.sha256 == done[2].sha256
    assert not heard


def test_work_of_another_recipe_is_refused(target, done, tmp_path):
    """A work folder is not mixed: another seed or another target is told to use its own."""
    with pytest.raises(SettingsError, match="another recipe or target"):
        bootstrap(target, "tiny", tmp_path, done[1], Recipe(seed=1), _quiet)


@pytest.mark.parametrize("keep", [0, 1, 3, 4])
def test_impossible_layer_counts_are_refused(keep):
    """A draft keeps at least two layers and fewer than the target."""
    with pytest.raises(SettingsError, match=f"layers = {keep}"):
        choose_layers(3, keep)


def test_an_untied_head_is_shared_too(tmp_path):
    """A target with a head of its own lends the draft that head, not its embedding."""
    from transformers import LlamaForCausalLM

    model = write_target(tmp_path / "tied")
    config = model.config
    config.tie_word_embeddings = False
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "untied")
    draft = prune(tmp_path / "untied", [0, 2])
    assert not torch.equal(draft.lm_head.weight, draft.model.embed_tokens.weight)


# -- the command line ------------------------------------------------------------------------


def test_the_command_makes_a_draft(target, tmp_path, capfd, monkeypatch):
    """`draftsmith bootstrap` writes the draft and says how to serve it; the default work folder is in the cache."""
    monkeypatch.setenv("DRAFTSMITH_CACHE_DIR", str(tmp_path / "cache"))
    assert run(["--target", str(target), "--out", str(tmp_path / "out"), *FLAGS]) == 0
    assert load_draft_manifest(tmp_path / "out").recipe["seed"] == 3
    assert (tmp_path / "cache/bootstrap/tiny-target/recipe.json").exists()
    said = capfd.readouterr().err
    assert "acceptance" in said
    assert f"--draft {tmp_path / 'out'}" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--layers", "9"], "layers = 9"), (["--target", "no/such/model/anywhere"], "neither a folder here")],
)
def test_mistakes_are_one_line_and_status_2(target, tmp_path, capfd, monkeypatch, flags, message):
    """What cannot work ends with one line that says what is wrong."""
    monkeypatch.setenv("DRAFTSMITH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = ["--target", str(target), "--out", str(tmp_path / "out"), *FLAGS, *flags]
    assert run(given) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("flags", [[], ["--out", "x", "--steps", "0"], ["--out", "x", "--rows", "many"]])
def test_bad_flags_are_status_2(flags, capfd):
    """A missing, impossible or unreadable flag is a usage error."""
    assert run(flags) == 2
    assert "--out" in capfd.readouterr().err or flags


def test_a_target_without_a_chat_template_is_refused(target, tmp_path, capfd, monkeypatch):
    """Self-play needs turn markers; a target without them is refused in one line."""
    bare = tmp_path / "bare"
    shutil.copytree(target, bare)
    (bare / "chat_template.jinja").unlink()
    monkeypatch.setenv("DRAFTSMITH_CACHE_DIR", str(tmp_path / "cache"))
    assert run(["--target", str(bare), "--out", str(tmp_path / "out"), *FLAGS]) == 2
    assert "chat template" in capfd.readouterr().err


def test_a_target_without_weights_is_refused(tmp_path, capfd, monkeypatch):
    """A folder that is no model is refused in one line."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.setenv("DRAFTSMITH_CACHE_DIR", str(tmp_path / "cache"))
    assert run(["--target", str(tmp_path / "empty"), "--out", str(tmp_path / "out"), *FLAGS]) == 2
    assert "no .safetensors weights" in capfd.readouterr().err
