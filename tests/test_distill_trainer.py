"""Training for real on a tiny pair: it learns, resumes exactly, refuses what is broken, publishes once."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import torch
from distill_tiny import make_blocks, make_pair
from tiny_pair import write_pair

from adapter import artifacts, keys
from adapter.contracts import RegistryError
from adapter.cores import taken
from adapter.facts import PAIR, Facts
from adapter.jobs import Jobs
from adapter.models import load_draft, prepare_pair
from adapter.pairs import Pair, expected_tensors
from adapter.registry import Registry
from adapter.sections import DistillSettings
from adapter.settings import Settings, child_environment
from adapter.wire import to_wire
from distill.job import run_job
from distill.replay import ReplayStore
from distill.tuning import Material, TrainingError, plan_steps, train

FAST = DistillSettings(
    replay_age_s=1e12,  # the tests' blocks are of 1970
    epochs=4,
    batch_tokens=256,
    rank=8,
    alpha=16,
    learning_rates=(5e-3,),
    min_requests=20,
    max_blocks=400,
    holdout_share=0.3,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    torch.set_num_threads(1)
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def material(pair) -> Material:
    return Material(
        fresh=make_blocks(pair, 60, seed=1, name="a"),
        replay=make_blocks(pair, 20, seed=2, name="b", segment="code"),
        validation=make_blocks(pair, 20, seed=3, name="c"),
    )


def _train(pair: Pair, material: Material, settings: DistillSettings = FAST, **more):
    return train(load_draft(pair, torch.float32), pair.lora_shapes, material, settings, **more)


@pytest.fixture
def settings(tmp_path, valkey_url) -> Settings:
    return Settings(
        data_dir=tmp_path / "data",
        redis_url=valkey_url,
        database_url=f"sqlite:///{tmp_path / 'draftsmith.db'}",
        distill=FAST,
    )


@pytest.fixture
def job(settings, database, pair, valkey_client):
    """A claimed job in a registry with the tiny pair installed and 90 requests logged."""
    Facts(database).put(PAIR, msgspec.to_builtins(pair))
    Registry(database).install_base(
        target_fingerprint=pair.target_fingerprint, base_fingerprint=pair.base_fingerprint, actor="test"
    )
    for block in make_blocks(pair, 90, seed=4, name="q"):
        valkey_client.xadd(keys.BLOCKS, {keys.PAYLOAD_FIELD: to_wire(block)})
    jobs = Jobs(database)
    return jobs.claim(jobs.request(reason="test", requested_by="test").id, worker="w", lease_s=60)


def test_held_out_acceptance_rises(pair, material):
    """A few seconds of training on the target's verdicts make the draft agree with it more often."""
    seen = []
    tuned = _train(pair, material, report=seen.append)
    assert tuned.acceptance_after > tuned.acceptance_before + 0.02
    assert seen[-1].loss < seen[0].loss
    assert [progress.step for progress in seen] == list(range(1, tuned.steps + 1))
    assert seen[-1].eta_s == 0


def test_training_is_deterministic_and_seeded(pair, material):
    """The same seed gives the same factors, another seed others."""
    short = changed(FAST, epochs=0.5)
    first, second = (_train(pair, material, short).factors for _ in range(2))
    other = _train(pair, material, changed(short, seed=7)).factors
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def changed(settings: DistillSettings, **changes) -> DistillSettings:
    return settings.model_copy(update=changes)


def test_the_rate_that_does_best_goes_on(pair, material):
    """Two rates get a quarter of the plan each, the better one the rest; what both reached is kept."""
    settings = changed(FAST, learning_rates=(1e-6, 5e-3), epochs=2.0)
    seen = []
    tuned = _train(pair, material, settings, report=seen.append)
    assert tuned.learning_rate == 5e-3
    assert tuned.rates["0.005"] > tuned.rates["1e-06"]
    steps = [progress.learning_rate for progress in seen]
    planned = len(plan_steps(material, settings))
    assert steps.count(1e-6) == math.ceil(planned / 4)
    assert steps.count(5e-3) == tuned.steps <= planned
    assert [progress.step for progress in seen] == list(range(1, len(seen) + 1))
    assert tuned.acceptance_after == max(value for _, value in tuned.curve)


def test_time_is_shared_by_all_rates(pair, material):
    """With a clock that jumps a second a look, three rates together take no longer than one training may."""
    ticks = iter(range(10**6))
    settings = changed(FAST, learning_rates=(5e-3, 1e-3, 2e-3), max_seconds=30.0, epochs=50.0)
    seen = []
    tuned = _train(pair, material, settings, clock=lambda: float(next(ticks)), report=seen.append)
    assert {progress.learning_rate for progress in seen} == {5e-3, 1e-3, 2e-3}
    assert tuned.seconds <= 30.0 + 3 * 4  # one step, or look, more than its share each


@pytest.mark.parametrize("loss", ["kl", "nla", "blend", "lk"])
def test_every_loss_raises_held_out_acceptance(pair, material, loss):
    """All four objectives learn on the tiny pair; which is best is an experiment, not a test."""
    tuned = _train(pair, material, changed(FAST, loss=loss))
    assert tuned.acceptance_after > tuned.acceptance_before + 0.01


def test_a_draft_learns_within_its_vocabulary(pair, material):
    """With half of the tokens scored, acceptance is judged and raised on those alone."""
    allowed = torch.arange(0, 64, 2)
    tuned = _train(pair, material, allowed=allowed)
    whole = _train(pair, material)
    assert tuned.acceptance_after > tuned.acceptance_before
    assert tuned.acceptance_after < whole.acceptance_after


@pytest.mark.parametrize(("rates", "killed_at"), [((5e-3,), 1), ((5e-3,), 7), ((5e-3, 1e-3), 2), ((5e-3, 1e-3), 7)])
def test_a_killed_training_goes_on_where_it_was(pair, material, tmp_path, rates, killed_at):
    """Stopped after any step and started again, it does only the missing steps and ends at the same factors."""
    settings = changed(FAST, epochs=1.0, learning_rates=rates)
    whole = _train(pair, material, settings)

    def kill(progress):
        if progress.step == killed_at:
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        _train(pair, material, settings, checkpoint=path, checkpoint_every_s=0.0, report=kill)
    seen = []
    again = _train(pair, material, settings, checkpoint=path, checkpoint_every_s=0.0, report=seen.append)
    assert seen[0].step == killed_at + 1
    assert again.steps == whole.steps
    for name, value in whole.factors.items():
        torch.testing.assert_close(again.factors[name], value, atol=1e-5, rtol=1e-4)


def test_a_loss_that_is_not_finite_aborts_in_words(pair, material):
    """A draft with NaN weights stops at the first step with advice, not with a published version."""
    model = load_draft(pair, torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"the loss is nan .* at step 1; .*learning_rates"):
        train(model, pair.lora_shapes, material, FAST)


def test_it_stops_when_its_time_is_up(pair, material):
    """With a clock that jumps, the loop ends after max_seconds and still returns checked factors."""
    ticks = iter(range(10**6))
    tuned = _train(pair, material, changed(FAST, max_seconds=20.0, epochs=50.0), clock=lambda: float(next(ticks)))
    assert 0 < tuned.steps < 40
    assert tuned.acceptance_after is not None


def test_nothing_to_train_on_is_said_so(pair):
    """No blocks is an error that names the remedy."""
    with pytest.raises(TrainingError, match="serve some requests first"):
        _train(pair, Material((), (), ()))


def test_a_job_publishes_a_checked_version(settings, database, pair, job, valkey_client):
    """From stream to registry: trained, gated, stored, published once, with a clean stream behind it."""
    valkey_client.xadd(keys.BLOCKS, {keys.PAYLOAD_FIELD: b"poison"})
    said: list[dict] = []
    result = run_job(settings, database, job.id, job.epoch, said.append)
    draft = Registry(database).draft(result["version"])
    assert (result["state"], draft.state, draft.parent, draft.job_id) == ("ready", "ready", 0, job.id)
    assert result["verdict"].startswith("Passed: acceptance")
    assert abs(draft.gate["parity"]["difference"]) < 1e-4
    assert json.loads(json.dumps(result)) == result
    artifacts.verify(
        settings.artifacts_dir, draft.artifact_sha256, target_fingerprint=pair.target_fingerprint,
        base_fingerprint=pair.base_fingerprint, expected=expected_tensors(pair, FAST.rank),
    )  # fmt: skip
    assert valkey_client.xlen(keys.BLOCKS_DEAD) == 1
    assert said[-1]["step"] == said[-1]["steps"]
    store = ReplayStore(settings.replay_dir, max_blocks=400)
    assert store.marker == store.refs[-1].sequence
    assert draft.trained_on["requests"] + draft.gate["requests"] < 90

    again = run_job(settings, database, job.id, job.epoch, said.append)
    assert again["version"] == result["version"]
    assert len(Registry(database).drafts()) == 2


def test_a_second_job_starts_from_what_is_live(settings, database, job, monkeypatch):
    """Once promoted, a version of the same rank is where the next training starts, and its parent."""
    import distill.job as job_module

    first = run_job(settings, database, job.id, job.epoch, lambda message: None)
    Registry(database).promote(first["version"], actor="test", reason="test")
    jobs = Jobs(database)
    jobs.finish(job.id, job.epoch, result=first)
    second = jobs.claim(jobs.request(reason="again", requested_by="test").id, worker="w", lease_s=60)
    starts = []
    monkeypatch.setattr(job_module, "train", lambda *a, start, **k: starts.append(start) or train(*a, start=start, **k))
    result = run_job(settings, database, second.id, second.epoch, lambda message: None)
    assert Registry(database).draft(result["version"]).parent == first["version"]
    assert any(float(value.abs().max()) > 0 for name, value in starts[0].items() if name.endswith("lora_B"))


def test_a_trainer_that_lost_its_job_publishes_nothing(settings, database, job):
    """Cancelled or taken over in the middle of the training, the late trainer is refused."""
    jobs = Jobs(database)

    def cancel(message):
        if jobs.get(job.id).state == "running":
            jobs.cancel(job.id)

    with pytest.raises(RegistryError, match="must not publish"):
        run_job(settings, database, job.id, job.epoch, cancel)
    with pytest.raises(RegistryError, match="must not publish"):
        run_job(settings, database, job.id, job.epoch + 1, lambda message: None)
    assert len(Registry(database).drafts()) == 1


def test_redis_down_trains_from_disk(settings, database, pair, job, valkey):
    """With the server gone, blocks collected earlier are enough."""
    from distill.evidence import collect

    collect(settings, pair)
    valkey.stop()
    result = run_job(settings, database, job.id, job.epoch, lambda message: None)
    assert result["blocks"] > 0


def test_the_trainer_needs_no_file_of_the_target(settings, database, valkey_client, tmp_path):
    """With a pruned draft, which borrows embedding and head, and the target's folder deleted, a job publishes."""
    target, draft = write_pair(tmp_path)
    pair = prepare_pair(settings.model_copy(update={"target": str(target), "draft": str(draft)}))
    assert pair.draft_kind == "pruned"
    blocks = make_blocks(pair, 60, seed=4, name="q")
    shutil.rmtree(target)
    Facts(database).put(PAIR, msgspec.to_builtins(pair))
    Registry(database).install_base(
        target_fingerprint=pair.target_fingerprint, base_fingerprint=pair.base_fingerprint, actor="test"
    )
    for block in blocks:
        valkey_client.xadd(keys.BLOCKS, {keys.PAYLOAD_FIELD: to_wire(block)})
    jobs = Jobs(database)
    job = jobs.claim(jobs.request(reason="test", requested_by="test").id, worker="w", lease_s=60)
    result = run_job(settings, database, job.id, job.epoch, lambda message: None)
    assert result["blocks"] > 0
    assert result["gate"]["requests"] > 0
    assert not target.exists()


def test_traffic_that_returns_is_a_switch_and_not_a_training(settings, database, job, pair, valkey_client):
    """After a version was trained and left again, the same kind of requests brings it back without a step."""
    first = run_job(settings, database, job.id, job.epoch, lambda message: None)
    jobs = Jobs(database)
    jobs.finish(job.id, job.epoch, result=first)
    for block in make_blocks(pair, 90, seed=40, name="again"):
        valkey_client.xadd(keys.BLOCKS, {keys.PAYLOAD_FIELD: to_wire(block)})
    second = jobs.claim(jobs.request(reason="drift", requested_by="test").id, worker="w", lease_s=60)
    settings = settings.model_copy(update={"distill": changed(FAST, switch_min_gain=0.0)})
    said: list[dict] = []
    result = run_job(settings, database, second.id, second.epoch, said.append)
    assert (result["action"], result["version"], result["compared_with"]) == ("switch", first["version"], 0)
    assert "knows this traffic" in result["verdict"]
    assert result["gate"]["passed"]
    assert said == []
    assert len(Registry(database).drafts()) == 2  # nothing was published


def test_the_process_leaves_when_its_parent_does(settings, database, job):
    """Stdin at its end means the worker is gone: the trainer exits in mid-training and frees its cores."""
    slow = settings.model_copy(update={"distill": changed(FAST, epochs=2_000.0, busy_share=1.0, threads=1)})
    with subprocess.Popen(
        [sys.executable, "-m", "distill.trainer", "--job", job.id, "--epoch", str(job.epoch)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=child_environment(slow),
    ) as process:  # fmt: skip
        try:
            assert "step" in json.loads(process.stdout.readline())
            assert taken(slow.run_dir) == slow.distill.threads  # the engine leaves these cores alone
            process.stdin.close()
            assert process.wait(20) == 1
            assert taken(slow.run_dir) == 0
        finally:
            process.kill()


def test_the_process_reports_what_cannot_work_with_its_own_status(settings, database):
    """A registry without a pair ends with status 2 and one line of words; stdout stays free of them."""
    with subprocess.Popen(
        [sys.executable, "-m", "distill.trainer", "--job", "nothing", "--epoch", "1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=child_environment(settings),
    ) as process:  # fmt: skip
        words, spoken = process.stderr.read().decode(), process.stdout.read()
    assert process.returncode == 2
    assert "start `draftsmith serve`" in words
    assert spoken == b""


def test_acceptance_before_is_the_base_drafts(pair, material):
    """The first score is taken before any step, on the draft as it is served."""
    from distill.scoring import score_blocks

    model = load_draft(pair, torch.float32)
    head = model.get_output_embeddings().weight.detach()
    base = float(np.concatenate(score_blocks(model, head, material.validation, "gumbel")).mean())
    tuned = _train(pair, material, changed(FAST, epochs=0.1))
    assert tuned.acceptance_before == pytest.approx(base, abs=1e-6)
