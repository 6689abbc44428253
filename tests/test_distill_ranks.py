"""Two real processes, started by torchrun, that share one draft over gloo: the numbers of one, and no rank left behind.

Run by torchrun, this file is what the two processes do: `_together` writes down what `train` gave each of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import torch
from distill_tiny import log_requests, make_blocks, make_pair
from tiny_pair import random_factors

from adapter import artifacts
from adapter.contracts import SettingsError, VerifiedBlock
from adapter.cores import taken
from adapter.database import migrate, open_database
from adapter.facts import PAIR, Facts
from adapter.jobs import Job, Jobs
from adapter.models import load_draft
from adapter.pairs import Pair, expected_tensors
from adapter.registry import Registry
from adapter.sections import DistillSettings
from adapter.settings import Settings, child_environment, load_settings
from distill import tasks, trainer
from distill.batches import RowWeights, judged_states
from distill.factors import attach
from distill.losses import sparse_teacher_loss
from distill.ranks import Ranks
from distill.sharding import collate_share, gradient_norm, shard, whole
from distill.tuning import Material, TrainingError, Tuned, train

ROOT = Path(__file__).resolve().parent.parent
TOGETHER_S = 120.0  # ranks that lost each other wait for ever
START_S = 60.0  # three processes import torch first, on a machine that may be busy
FAST = DistillSettings(
    epochs=0.3, batch_tokens=128, rank=8, alpha=16, learning_rates=(5e-3,), loss="lk", replay_age_s=1e12,
    min_requests=20, holdout_share=0.3, half_precision=False, threads=1,
)  # fmt: skip
ALONE = FAST.model_copy(update={"batch_tokens": 40, "epochs": 0.1})  # a request a step: one rank has nothing to read
RATES = FAST.model_copy(update={"learning_rates": (5e-3, 1e-3)})
SHORT = FAST.model_copy(update={"max_seconds": 10.0, "epochs": 50.0})
COUNTS = (1, 2, 5)
KILLED_AT = 3
ATOL = 1e-4


def _train(pair: Pair, material: Material, settings: DistillSettings, *, broken: bool = False, **more: Any) -> Tuned:
    model = load_draft(pair, torch.float32)
    if broken:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    return train(model, pair.lora_shapes, material, settings, **more)


def _until_killed(pair: Pair, material: Material, path: Path, **more: Any) -> None:
    """Train with a checkpoint after every step, and stop in the middle."""

    def kill(progress: Any) -> None:
        if progress.step == KILLED_AT:
            raise KeyboardInterrupt

    try:
        _train(pair, material, RATES, checkpoint=path, checkpoint_every_s=0.0, report=kill, **more)
    except KeyboardInterrupt:
        return


def _gradient(pair: Pair, blocks: list[VerifiedBlock], ranks: Ranks) -> tuple[dict[str, torch.Tensor], float]:
    """The whole gradient of one batch, and its norm, at factors that are not zero."""
    model = load_draft(pair, torch.float32)
    attach(model, pair.lora_shapes, rank=4, alpha=8, seed=0, start=random_factors(pair, rank=4))
    head = model.get_output_embeddings().weight.detach()
    shard(model, ranks)
    batch, *_ = collate_share(blocks, RowWeights(rejected=2.0), ranks)
    loss, _ = sparse_teacher_loss(
        judged_states(model, batch), head, batch.topk_ids, batch.topk_logprobs, batch.weights, kind="kl"
    )
    loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = whole({name: parameter.grad for name, parameter in trained.items()})
    return grads, float(gradient_norm(list(trained.values()), ranks))


def _together(folder: Path, job_id: str) -> None:
    """What each of two processes does for the tests of this file; at last a job for which nothing is trained."""
    torch.set_num_threads(1)
    ranks = Ranks.join(2)
    pair, material = torch.load(folder / "given.pt", weights_only=False)
    ticks = itertools.count(step=1.0 + 5.0 * ranks.rank)  # rank 1's time flies
    found: dict[str, Any] = {
        "gradient": [_gradient(pair, list(material.fresh[:count]), ranks) for count in COUNTS],
        "plain": _train(pair, material, FAST, ranks=ranks),
        "alone": _train(pair, material, ALONE, ranks=ranks),
        "rates": _train(pair, material, RATES, ranks=ranks),
        "short": _train(pair, material, SHORT, ranks=ranks, clock=lambda: float(next(ticks))),
        "allowed": _train(pair, material, ALONE, ranks=ranks, allowed=torch.arange(0, 64, 2)),
    }
    _until_killed(pair, material, folder / "two.pt", ranks=ranks)
    found["resumed"] = _train(pair, material, RATES, checkpoint=folder / "one.pt", ranks=ranks)
    try:
        _train(pair, material, FAST, broken=True, ranks=ranks)
    except TrainingError as error:
        found["error"] = str(error)
    model = load_draft(pair, torch.float32)
    shard(model, ranks)
    layers = list(model.model.layers.parameters())
    found["held"] = sum(part.to_local().numel() for part in layers) / sum(part.numel() for part in layers)
    torch.save(found, folder / f"found-{ranks.rank}.pt")
    trainer.work(load_settings(), ranks, job_id, 1)


def _narrow(block: VerifiedBlock, k: int) -> VerifiedBlock:
    """The same block as it is logged with a smaller top-k."""
    ids, logprobs = (block.array(name)[:, :k] for name in ("topk_ids", "topk_logprobs"))
    tail = (1 - np.exp(logprobs.astype("<f4")).sum(-1)).astype("<f4")
    return dataclasses.replace(
        block, top_k=k, topk_ids=ids.tobytes(), topk_logprobs=logprobs.tobytes(), tail_mass=tail.tobytes()
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    torch.set_num_threads(1)
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def material(pair) -> Material:
    """60 + 20 requests to train on, one in three logged with a smaller top-k, and 15 to look at."""
    fresh = make_blocks(pair, 60, seed=1, name="a")
    return Material(
        fresh=[_narrow(block, 8) if i % 3 == 0 else block for i, block in enumerate(fresh)],
        replay=make_blocks(pair, 20, seed=2, name="b", segment="code"),
        validation=make_blocks(pair, 15, seed=3, name="c"),
    )


def _reported_job(settings: Settings, pair: Pair) -> str:
    """A claimed job whose version was published already, so that its trainer only reports."""
    engine = open_database(settings.database)
    migrate(engine)
    jobs, registry = Jobs(engine), Registry(engine)
    Facts(engine).put(PAIR, msgspec.to_builtins(pair))
    registry.install_base(
        target_fingerprint=pair.target_fingerprint, base_fingerprint=pair.base_fingerprint, actor="test"
    )
    job = jobs.claim(jobs.request(reason="test", requested_by="test").id, worker="w", lease_s=600)
    registry.publish(
        parent=0, state="rejected", artifact_sha256="0" * 64, artifact_bytes=1, trained_on={}, gate={}, reason="test",
        job_id=job.id, actor="test",
    )  # fmt: skip
    engine.dispose()
    return job.id


@pytest.fixture(scope="module")
def both(pair, material, tmp_path_factory) -> tuple[list[dict[str, Any]], Path]:
    """What each of two processes found, and the folder they worked in."""
    folder = tmp_path_factory.mktemp("together")
    torch.save((pair, material), folder / "given.pt")
    _until_killed(pair, material, folder / "one.pt")
    settings = Settings(
        data_dir=folder, database_url=f"sqlite:///{folder / 'draftsmith.db'}",
        distill=FAST.model_copy(update={"processes": 2}),
    )  # fmt: skip
    command = [*tasks.LAUNCHER, "--nproc-per-node", "2", __file__, str(folder), _reported_job(settings, pair)]
    env = {**child_environment(settings), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        try:
            said, words = process.communicate(timeout=TOGETHER_S)
        finally:
            process.terminate()  # torchrun takes its processes along
    assert process.returncode == 0, words[-4000:]
    (folder / "said").write_text(said)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(2)], folder


def _assert_same(one: Tuned, other: Tuned, atol: float = ATOL) -> None:
    assert (one.steps, one.tokens, one.learning_rate) == (other.steps, other.tokens, other.learning_rate)
    assert one.acceptance_before == pytest.approx(other.acceptance_before, abs=1e-5)
    assert one.acceptance_after == pytest.approx(other.acceptance_after, abs=1e-4)
    for name, value in one.factors.items():
        torch.testing.assert_close(other.factors[name], value, atol=atol, rtol=0.0)


def test_the_gradient_is_that_of_one_process(pair, material, both):
    """Each entry within 1e-5 of the largest, for batches of 1, where a rank has none, of 2 at two top-k, and of 5."""
    for i, count in enumerate(COUNTS):
        grads, norm = _gradient(pair, list(material.fresh[:count]), Ranks.alone())
        bound = 1e-5 * max(float(value.abs().max()) for value in grads.values())
        for found in both[0]:
            assert found["gradient"][i][1] == pytest.approx(norm, rel=1e-5)
            for name, value in found["gradient"][i][0].items():
                torch.testing.assert_close(value, grads[name], atol=bound, rtol=0.0)


@pytest.mark.parametrize(("name", "settings"), [("plain", FAST), ("alone", ALONE), ("rates", RATES)])
def test_two_processes_train_what_one_does(pair, material, both, name, settings):
    """Factors after 6 to 8 steps from seed 0 lie within 1e-4 of one process's, an entry; they move by 1e-2 and more.

    Requests are of 29 tokens, a step of 4 or, for "alone", of one, where a rank has nothing to read.
    """
    alone = _train(pair, material, settings)
    assert max(float(value.abs().max()) for name, value in alone.factors.items() if name.endswith("lora_B")) > 0.01
    for found in both[0]:
        _assert_same(alone, found[name])


def test_two_processes_learn_within_a_vocabulary(pair, material, both):
    """The output head's rows that are scored are the same in both; bound as above."""
    alone = _train(pair, material, ALONE, allowed=torch.arange(0, 64, 2))
    _assert_same(alone, both[0][1]["allowed"])


def test_every_rank_ends_with_the_same(both):
    """What one rank returns, the other does to the last bit, also where their clocks differ and time ends it."""
    first, second = both[0]
    for name in ("plain", "rates", "short", "resumed"):
        assert first[name].steps == second[name].steps > 0
        assert first[name].curve == second[name].curve
        assert all(torch.equal(value, second[name].factors[key]) for key, value in first[name].factors.items())
    assert first["short"].seconds == second["short"].seconds
    assert first["short"].steps < 20


def test_each_holds_half_of_the_layers(both):
    """Weights and factors of the layers are split, not copied."""
    for found in both[0]:
        assert 0.45 < found["held"] < 0.55


def test_a_loss_that_is_not_finite_ends_both(both):
    """Neither rank goes on, or waits, when the training of all cannot."""
    for found in both[0]:
        assert "the loss is nan" in found["error"]
        assert "at step 1" in found["error"]


def test_a_training_goes_on_with_another_number_of_processes(pair, material, both):
    """Killed after step 3 alone and resumed by two, or the other way round, it ends where an undisturbed one does."""
    found, folder = both
    whole = _train(pair, material, RATES)
    _assert_same(whole, found[0]["resumed"])
    seen: list[Any] = []
    again = _train(pair, material, RATES, checkpoint=folder / "two.pt", report=seen.append)
    assert seen[0].step == KILLED_AT + 1
    _assert_same(whole, again)


def test_who_has_nothing_to_help_with_is_let_go(both):
    """A job that only reports trains nothing: both end well, and one of them speaks."""
    [line] = (both[1] / "said").read_text().splitlines()
    assert json.loads(line)["result"]["version"] == 1


def test_a_trainer_that_torchrun_did_not_start_says_so():
    """Started by hand for several processes, it says how to start it."""
    with pytest.raises(SettingsError, match=r"distill.processes is 4, but .* on its own.* --nproc-per-node 4"):
        Ranks.join(4)


@pytest.fixture
def settings(tmp_path, valkey_url, database, pair, valkey_client) -> Settings:
    """A deployment with the tiny pair served, 60 requests logged, and trainings on two processes."""
    log_requests(pair, database, valkey_client)
    return Settings(
        data_dir=tmp_path / "data", redis_url=valkey_url, database_url=f"sqlite:///{tmp_path / 'draftsmith.db'}",
        distill=FAST.model_copy(update={"processes": 2, "epochs": 1.0, "lease_s": 30.0}),
    )  # fmt: skip


@pytest.fixture
def jobs(database) -> Jobs:
    return Jobs(database)


def _family(job: Job) -> list[psutil.Process]:
    """Every process that works on a job: torchrun and its ranks, by their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "distill.trainer" in command and job.id in command:
            found.append(process)
    return found


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [item for item in processes if item.is_running() and item.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_a_job_of_two_processes_publishes_a_version_like_any_other(settings, jobs, database, pair):
    """Through the task: trained by two, judged and published by one, with all cores told and one voice heard."""
    job, cores = jobs.request(reason="test", requested_by="test"), set()
    outcome = tasks.supervise(settings, job.id, stopping=lambda: cores.add(taken(settings.run_dir)) or False)
    done = jobs.get(job.id)
    assert outcome == "done", done.error
    draft = Registry(database).draft(1)
    assert (done.result["version"], draft.job_id, draft.parent) == (1, job.id, 0)
    assert abs(draft.gate["parity"]["difference"]) < 1e-4  # the stored file is what the two measured
    assert draft.trained_on["validation_after"] > draft.trained_on["validation_before"]
    assert done.progress["step"] == done.progress["steps"]
    artifacts.verify(
        settings.artifacts_dir, draft.artifact_sha256, target_fingerprint=pair.target_fingerprint,
        base_fingerprint=pair.base_fingerprint, expected=expected_tensors(pair, FAST.rank),
    )  # fmt: skip
    assert max(cores) == 2  # the engine leaves both alone
    assert _family(job) == []


@pytest.mark.slow
def test_a_job_that_cannot_work_ends_for_good_in_rank_0s_words(settings, jobs, database):
    """Without a pair rank 0 hands nothing out: the other leaves, and torchrun's status does not hide the reason."""
    Facts(database).drop(PAIR)
    job = jobs.request(reason="test", requested_by="test")
    assert tasks.supervise(settings, job.id) == "failed"
    failed = jobs.get(job.id)
    assert failed.state == "failed", failed.error
    assert failed.error.startswith("the trainer failed with status 2: no draft is served")
    assert _family(job) == []


def _slow(settings: Settings) -> Settings:
    return settings.model_copy(update={"distill": settings.distill.model_copy(update={"epochs": 200.0})})


@pytest.mark.slow
def test_no_rank_outlives_a_task_that_is_killed(settings, jobs, wait_for):
    """SIGKILL of the process group of the task: torchrun and its ranks, each in a session of its own, go too."""
    job = jobs.request(reason="test", requested_by="test")
    script = "import sys, adapter.settings as s, distill.tasks as t; t.supervise(s.load_settings(), sys.argv[1])"
    with subprocess.Popen(
        [sys.executable, "-c", script, job.id], env=child_environment(_slow(settings)), start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    ) as task:  # fmt: skip
        family: list[psutil.Process] = []
        try:
            wait_for(lambda: jobs.get(job.id).progress.get("step", 0) > 0, START_S)
            family = _family(job)
            assert len(family) == 3
            os.killpg(task.pid, signal.SIGKILL)
            wait_for(lambda: not _alive(family))
        finally:
            task.kill()
            for process in _alive(family):
                process.kill()


@pytest.mark.slow
def test_no_rank_outlives_its_launcher(settings, jobs, monkeypatch):
    """A launcher that is killed leaves processes in sessions of their own: when the task has ended they are gone."""
    script = """
import os, subprocess, sys
for _ in range(2):
    subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()", *sys.argv[1:]], start_new_session=True)
os.kill(os.getpid(), 9)
"""
    monkeypatch.setattr(tasks, "LAUNCHER", (sys.executable, "-c", script))
    job = jobs.request(reason="test", requested_by="test")
    assert tasks.supervise(settings, job.id) == "failed"
    assert _family(job) == []
    assert jobs.get(job.id).state == "queued"
    assert "was ended by SIGKILL" in jobs.get(job.id).error


if __name__ == "__main__":
    _together(Path(sys.argv[1]), sys.argv[2])
