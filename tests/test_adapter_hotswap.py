"""Following the registry: real SQLite, real artifacts on disk, and an engine that drafts with what they say."""

from __future__ import annotations

import shutil
import threading

import pytest
import structlog
import torch
from engine_rig import Rig, prompts, request
from sqlalchemy import text
from tiny_pair import pair_settings, random_factors, store_artifact

from adapter import artifacts, hotswap
from adapter.contracts import FLOOR_VERSION, ArtifactError, RegistryError
from adapter.database import migrate, open_database
from adapter.hotswap import check_finite
from adapter.lora import base_weights
from adapter.models import prepare_pair
from adapter.registry import Registry
from serving.engine import build

RANK = 4


class Deployment:
    """One data folder: its registry, its artifact store and an engine that follows them."""

    def __init__(self, folder, data) -> None:
        self.settings = pair_settings(folder, data)
        self.database = open_database(self.settings.database)
        migrate(self.database)
        self.registry = Registry(self.database)
        self.pair = prepare_pair(self.settings)
        self.start()

    def start(self) -> None:
        built = build.build_engine(self.settings, self.pair, self.database)
        built.hotswap.stop()  # the tests look at the registry themselves, when they mean to
        self.swapper = built.hotswap
        self.rig = Rig(built, self.pair)
        self.rig.collect(self.settings.log)

    def publish(self, seed: int = 0, *, size: float = 0.3, sha256: str | None = None, **more) -> int:
        """Store an artifact of random factors, or name one, and publish it as ready; return its version."""
        if sha256 is None:
            factors = random_factors(self.pair, rank=RANK, seed=seed, size=size)
            sha256 = store_artifact(self.settings.artifacts_dir, self.pair, factors, rank=RANK, **more).sha256
        return self.registry.publish(
            parent=0, state="ready", artifact_sha256=sha256, artifact_bytes=1, trained_on={}, gate={}, reason="test",
            job_id=None, actor="test",
        ).version  # fmt: skip

    def promote(self, version: int) -> None:
        self.registry.promote(version, actor="test", reason="test")

    def follow(self):
        """Look at the registry and take a round's chance to swap, as the loop and the thread do."""
        self.swapper.refresh()
        self.rig.engine.step()
        return self.swapper

    def folder_of(self, version: int):
        return self.settings.artifacts_dir / self.registry.draft(version).artifact_sha256


def most_slots(deployment: Deployment) -> int:
    """The base draft, live, previous, one in the making, and the alternates."""
    return 1 + hotswap.MERGED_SLOTS + deployment.settings.engine.alternates


@pytest.fixture
def deployment(folder, tmp_path):
    deployment = Deployment(folder, tmp_path)
    yield deployment
    deployment.rig.built.publisher.close()
    deployment.database.dispose()


def test_the_base_draft_is_served_first(deployment):
    """A new data folder serves version 0 in generation 1."""
    assert (deployment.swapper.version, deployment.swapper.generation) == (FLOOR_VERSION, 1)
    assert deployment.rig.engine.version == FLOOR_VERSION


def test_a_promoted_version_is_drafted_with(deployment):
    """After a promotion the engine's draft is another model, tagged with its version, and the log says so."""
    version = deployment.publish()
    deployment.promote(version)
    swapper = deployment.follow()
    assert (swapper.version, swapper.generation, swapper.previous) == (version, 2, 0)
    assert deployment.rig.engine.proposers.draft.runner.model is swapper.model is swapper._slots.get(version)
    item = request("r", prompts(100)[0])
    deployment.rig.run([item])
    assert set(item.by_version) == {version}
    assert (swapper.last.version, swapper.last.replaced) == (version, 0)


def test_floor_live_and_previous_stay_resident_and_no_more(deployment):
    """After five promotions slots are reused instead of added (I5)."""
    for seed in range(5):
        version = deployment.publish(seed)
        deployment.promote(version)
        deployment.follow()
        slots = deployment.swapper._slots
        assert set(slots.versions) >= {FLOOR_VERSION, version, version - 1}
        assert len(slots.versions) + len(slots._spare) <= most_slots(deployment)


def test_rolling_back_needs_no_disk(deployment):
    """With every artifact deleted, roll back and roll forward again still happen (W8)."""
    first, second = deployment.publish(1), deployment.publish(2)
    for version in (first, second):
        deployment.promote(version)
        deployment.follow()
    model = deployment.swapper._slots.get(first)
    shutil.rmtree(deployment.settings.artifacts_dir)
    deployment.registry.roll_back(actor="test", reason="test")
    assert deployment.follow().version == first
    assert deployment.swapper.model is model
    deployment.registry.roll_back(actor="test", reason="test")
    assert deployment.follow().version == second
    deployment.promote(0)
    assert deployment.follow().version == FLOOR_VERSION


def test_generations_rise_strictly(deployment):
    """Every swap carries a larger generation than the one before (I3)."""
    for seed in range(3):
        deployment.promote(deployment.publish(seed))
        deployment.follow()
    deployment.registry.roll_back(actor="test", reason="test")
    deployment.follow()
    seen = [receipt.generation for receipt in deployment.rig.engine.stats.swaps]
    assert seen == sorted(set(seen))
    assert len(seen) == 4


def test_several_moves_between_two_looks_end_at_the_last(deployment):
    """Aliases that moved three times while nobody looked lead to the version they point at now."""
    for seed in range(3):
        version = deployment.publish(seed)
        deployment.promote(version)
    assert deployment.follow().version == version
    assert deployment.swapper.generation == 4


def test_a_prepared_version_is_replaced_by_a_newer_one(deployment):
    """When the alias moves again before the loop came to swap, the loop swaps once, to the newer version."""
    first, second = deployment.publish(1), deployment.publish(2)
    deployment.promote(first)
    deployment.swapper.refresh()
    deployment.promote(second)
    assert deployment.follow().version == second
    assert [receipt.version for receipt in deployment.rig.engine.stats.swaps] == [second]


def test_looking_again_changes_nothing(deployment):
    """Polling without a move neither swaps nor loads."""
    deployment.promote(deployment.publish())
    deployment.follow()
    before = deployment.swapper.last
    for _ in range(3):
        deployment.follow()
    assert deployment.swapper.last is before


def test_adapter_w4_w8_merged_weights_come_from_the_pristine_base_every_time(deployment):
    """After many swaps through reused slots, W = W0 + s·B·A to the bit, and W0 itself is untouched."""
    slots, modules = deployment.swapper._slots, list(deployment.pair.lora_shapes)
    pristine = base_weights(slots.get(FLOOR_VERSION), modules)
    for seed in range(6):
        version = deployment.publish(seed, scale=0.5)
        deployment.promote(version)
        deployment.follow()
        factors = random_factors(deployment.pair, rank=RANK, seed=seed)
        for name in modules:
            update = 0.5 * (factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"])
            merged = deployment.swapper.model.get_submodule(name).weight
            assert torch.equal(merged, (pristine[name].float() + update).to(merged.dtype))
    for name, weight in base_weights(slots.get(FLOOR_VERSION), modules).items():
        assert torch.equal(weight, pristine[name])


@pytest.mark.parametrize("pinned", [False, True])
def test_adapter_w4_weights_that_draft_now_are_not_written(deployment, pinned):
    """While a forward of the draft is held up the registry moves twice; that model's weights stay what they were.

    The pinned request drafts with the previous version, which the first move already drops.  Once a new
    round has begun, the newest version is loaded, in no more slots than before.
    """
    versions = [deployment.publish(seed) for seed in range(4)]
    for version in versions[:2]:
        deployment.promote(version)
        deployment.follow()
    item = request("r", prompts(100)[0], 30)
    item.version = versions[0] if pinned else None
    modules, proposer = list(deployment.pair.lora_shapes), deployment.rig.engine.proposers.draft
    forward, moved = proposer.runner.forward, []

    def held_up(work, model=None):
        before = {name: model.get_submodule(name).weight.clone() for name in modules}
        if not moved:
            for version in versions[2:]:
                deployment.promote(version)
                thread = threading.Thread(target=deployment.swapper.refresh)
                thread.start()
                thread.join()
            moved.append(model)
        assert all(torch.equal(weight, model.get_submodule(name).weight) for name, weight in before.items())
        return forward(work, model)

    proposer.runner.forward, proposer.loop = held_up, None  # the loop in C has no place to hold it up at
    deployment.rig.run([item], lambda step: deployment.swapper.refresh() if step else None)
    assert moved
    assert next(iter(item.by_version)) == (versions[0] if pinned else versions[1])
    assert deployment.rig.engine.version == versions[3]
    slots = deployment.swapper._slots
    assert len(slots.versions) + len(slots._spare) + len(slots._retired) <= most_slots(deployment)


def test_who_drafts_for_a_pinned_request_changes_between_rounds_only(deployment):
    """A pinned version that is dropped while a round runs is what drafts, and what is counted, to the round's end."""
    versions = [deployment.publish(seed) for seed in range(3)]
    for version in versions[:2]:
        deployment.promote(version)
        deployment.follow()
    item, proposer = request("r", prompts(100)[0]), deployment.rig.engine.proposers.draft
    item.version = versions[0]
    before = proposer._drafter(item)
    deployment.promote(versions[2])
    deployment.swapper.refresh()
    assert proposer._drafter(item) == before
    assert before[0] == versions[0]
    deployment.rig.engine.step()
    assert proposer._drafter(item) == (versions[2], deployment.swapper.model)


def test_slots_share_what_versions_cannot_change(deployment):
    """Embedding and norms of a version are the base draft's own tensors, not copies."""
    deployment.promote(deployment.publish())
    base, model = deployment.swapper._slots.get(FLOOR_VERSION), deployment.follow().model
    assert model is not base
    assert model.get_input_embeddings().weight is base.get_input_embeddings().weight
    assert model.model.norm.weight is base.model.norm.weight


# -- artifacts that must not be loaded -------------------------------------------------------


def _truncate(deployment, version):
    path = deployment.folder_of(version) / artifacts.TENSORS
    path.write_bytes(path.read_bytes()[:-100])


def _flip(deployment, version):
    path = deployment.folder_of(version) / artifacts.TENSORS
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(bytes(data))


def _delete(deployment, version):
    shutil.rmtree(deployment.folder_of(version))


def _spoil_manifest(deployment, version):
    (deployment.folder_of(version) / artifacts.MANIFEST).write_text("{")


DAMAGE = [
    (_truncate, "truncated"), (_flip, "altered"), (_delete, "no manifest"), (_spoil_manifest, "cannot be read"),
]  # fmt: skip


def _nan(deployment):
    factors = random_factors(deployment.pair, rank=RANK)
    next(iter(factors.values()))[0, 0] = float("nan")
    return store_artifact(deployment.settings.artifacts_dir, deployment.pair, factors)


def _shape(deployment):
    factors = random_factors(deployment.pair, rank=RANK)
    name = next(iter(factors))
    factors[name] = factors[name][:, :-1]
    return store_artifact(deployment.settings.artifacts_dir, deployment.pair, factors)


def _missing(deployment):
    factors = random_factors(deployment.pair, rank=RANK)
    del factors[next(iter(factors))]
    return store_artifact(deployment.settings.artifacts_dir, deployment.pair, factors)


def _other_target(deployment):
    factors = random_factors(deployment.pair, rank=RANK)
    return store_artifact(deployment.settings.artifacts_dir, deployment.pair, factors, target_fingerprint="f" * 64)


def _other_base(deployment):
    factors = random_factors(deployment.pair, rank=RANK)
    return store_artifact(deployment.settings.artifacts_dir, deployment.pair, factors, base_fingerprint="f" * 64)


def _huge(deployment):
    factors = random_factors(deployment.pair, rank=RANK, size=30.0)
    return store_artifact(deployment.settings.artifacts_dir, deployment.pair, factors)


WRONG = [
    (_nan, "NaN"), (_shape, "expected"), (_missing, "missing"), (_other_target, "trained for target"),
    (_other_base, "base draft"), (_huge, "norm"),
]  # fmt: skip


def _assert_refused(deployment, version, reason):
    item = request("r", prompts(100)[1], 60)
    deployment.rig.engine.submit(item)
    deployment.rig.engine.step()
    swapper = deployment.follow()
    assert swapper.version == FLOOR_VERSION
    assert deployment.registry.draft(version).state == "quarantined"
    entry = next(entry for entry in deployment.registry.audit() if entry.verb == "quarantine")
    assert reason in entry.reason
    assert (entry.actor, entry.automatic) == ("engine", True)
    deployment.follow()
    assert deployment.registry.live().live == FLOOR_VERSION
    assert swapper.generation == deployment.registry.live().generation
    assert set(swapper._slots.versions) == {FLOOR_VERSION}
    deployment.rig.run([])
    assert item.num_generated == 60


@pytest.mark.parametrize(("damage", "reason"), DAMAGE)
def test_adapter_w6_a_damaged_artifact_is_refused(deployment, damage, reason):
    """It is quarantined with the reason, never served, and a running request is not disturbed (I4)."""
    version = deployment.publish()
    damage(deployment, version)
    deployment.promote(version)
    _assert_refused(deployment, version, reason)


@pytest.mark.parametrize(("wrong", "reason"), WRONG)
def test_adapter_w5_a_wrong_artifact_is_refused(deployment, wrong, reason):
    """NaN, another shape, a missing tensor, another target or base, a norm out of bounds: refused (I4, W1, W6)."""
    version = deployment.publish(sha256=wrong(deployment).sha256)
    deployment.promote(version)
    _assert_refused(deployment, version, reason)


def test_a_refused_version_falls_back_to_the_one_before(deployment):
    """With a good version live, a damaged successor is quarantined and the good one goes on."""
    good = deployment.publish(1)
    deployment.promote(good)
    deployment.follow()
    bad = deployment.publish(2)
    _flip(deployment, bad)
    deployment.promote(bad)
    deployment.follow()
    assert deployment.follow().version == good
    assert deployment.registry.live().live == good
    assert deployment.swapper.generation == deployment.registry.live().generation


def test_a_quarantine_that_cannot_be_written_is_said_once(deployment, monkeypatch):
    """A registry that only reads lets a bad version stay wanted: each poll tries again, the log hears of it once."""
    version = deployment.publish()
    _flip(deployment, version)
    deployment.promote(version)
    tried = []

    def refuse(*arguments, **more):
        tried.append(arguments)
        raise RegistryError("read only")

    with monkeypatch.context() as patch, structlog.testing.capture_logs() as said:
        patch.setattr(deployment.swapper._registry, "quarantine", refuse)
        for _ in range(5):
            assert deployment.follow().version == FLOOR_VERSION
    assert len(tried) == 5
    assert [entry["event"] for entry in said if "refused" in entry["event"] or "quarantine" in entry["event"]] == [
        "draft_refused", "quarantine_not_written",
    ]  # fmt: skip
    _assert_refused(deployment, version, "sha256")


def test_a_refused_candidate_does_not_spoil_the_draft_in_force(deployment, monkeypatch):
    """A candidate whose trial forward gives NaN is refused, and acceptance of running drafts stays what it was."""
    ids = prompts(100)
    # Once more at first: prompts found in the cache make other forwards, which round differently.
    deployment.rig.run([request(f"w{i}", prompt) for i, prompt in enumerate(ids)])
    before = [request(f"a{i}", prompt) for i, prompt in enumerate(ids)]
    deployment.rig.run(before)
    slots = deployment.swapper._slots
    finish = slots._finish

    def overflow(model):
        with torch.no_grad():
            for name in deployment.pair.lora_shapes:
                model.get_submodule(name).weight.fill_(float("inf"))
        finish(model)

    monkeypatch.setattr(slots, "_finish", overflow)
    version = deployment.publish()
    deployment.promote(version)
    deployment.follow()
    assert "NaN or infinite logits" in deployment.registry.audit()[1].reason + deployment.registry.audit()[0].reason
    after = [request(f"b{i}", prompt) for i, prompt in enumerate(ids)]
    deployment.rig.run(after)
    assert [item.by_version for item in after] == [item.by_version for item in before]


def test_check_finite_names_the_defect():
    """Only finite logits pass."""
    check_finite(torch.zeros(2, 3))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ArtifactError, match="NaN or infinite"):
            check_finite(torch.tensor([[0.0, bad]]))


# -- the registry is away --------------------------------------------------------------------


def test_an_unreachable_registry_keeps_serving(deployment):
    """With its tables gone the engine stays on what it has, and follows again when they are back (I2)."""
    version = deployment.publish()
    deployment.promote(version)
    deployment.follow()
    with deployment.database.begin() as connection:
        connection.execute(text("ALTER TABLE generation RENAME TO away"))
    deployment.follow()
    assert not deployment.swapper.registry_up
    item = request("r", prompts(100)[0])
    deployment.rig.run([item])
    assert set(item.by_version) == {version}
    with deployment.database.begin() as connection:
        connection.execute(text("ALTER TABLE away RENAME TO generation"))
    deployment.registry.roll_back(actor="test", reason="test")
    assert deployment.follow().version == FLOOR_VERSION
    assert deployment.swapper.registry_up


def test_the_live_version_is_there_at_the_first_round(deployment, folder):
    """An engine that starts on a data folder with a promoted version drafts with it from the beginning."""
    version = deployment.publish()
    deployment.promote(version)
    deployment.rig.built.publisher.close()
    deployment.start()
    assert deployment.rig.engine.version == version
    assert deployment.rig.engine.proposers.draft.runner.model is deployment.swapper._slots.get(version)


def test_the_thread_follows_by_itself(deployment, wait_for):
    """With its thread running, a promotion arrives without anybody asking, and `wake` is enough."""
    deployment.swapper._poll_s = 30.0
    deployment.swapper._stop.clear()
    deployment.swapper.start()
    version = deployment.publish()
    deployment.promote(version)
    deployment.swapper.wake()
    wait_for(lambda: deployment.swapper._prepared() is not None)
    deployment.rig.engine.step()
    assert deployment.rig.engine.version == version
    deployment.swapper.stop()


def test_the_thread_computes_alone(deployment, wait_for):
    """Merging opens no second pool of threads, with which nobody would spin at barriers any more.

    Not after the loop gave up threads to a training and took them back, either.
    """
    swapper, seen, before = deployment.swapper, [], torch.get_num_threads()
    torch.set_num_threads(2)
    refresh, looked = swapper.refresh, threading.Event()
    try:
        swapper._check = lambda model: seen.append(torch.get_num_threads())
        swapper.refresh = lambda: (looked.set(), refresh())
        swapper._stop.clear()
        swapper.start()
        swapper.wake()
        assert looked.wait(20)
        torch.set_num_threads(1)
        torch.set_num_threads(2)
        deployment.promote(deployment.publish())
        swapper.wake()
        wait_for(lambda: swapper._prepared() is not None)
        swapper.stop()
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_an_alternate_is_resident_beside_the_live_version(deployment):
    """Admitted it can be drafted with and nothing is swapped; dismissed its slot is free again."""
    first, second = deployment.publish(1), deployment.publish(2)
    deployment.promote(first)
    deployment.follow()
    swaps = deployment.rig.engine.stats.num_swaps
    deployment.registry.admit(second, most=2, actor="test", reason="test")
    deployment.follow()
    swapper = deployment.follow()
    assert (swapper.version, swapper.alternates, swapper.generation) == (first, (second,), 3)
    assert swapper.resident(second) is not None
    assert deployment.rig.engine.stats.num_swaps == swaps
    deployment.registry.dismiss(second, actor="test", reason="test")
    deployment.follow()
    swapper = deployment.follow()
    assert (swapper.alternates, swapper.resident(second)) == ((), None)


def test_slots_suffice_for_live_previous_and_all_alternates(deployment):
    """Ten promotions with two alternates each time: all that is named is resident, and slots stay bounded (I5)."""
    most = deployment.settings.engine.alternates
    for seed in range(10):
        version = deployment.publish(seed)
        deployment.promote(version)
        if version > 1:
            deployment.registry.admit(version - 1, most=most, actor="test", reason="test")
        for _ in range(3):
            deployment.follow()
        swapper, live = deployment.swapper, deployment.registry.live()
        assert swapper.alternates == live.alternates
        assert all(swapper.resident(item) is not None for item in live.alternates)
        assert len(swapper._slots.versions) + len(swapper._slots._spare) <= most_slots(deployment)


def test_an_alternate_that_cannot_be_loaded_is_left_out(deployment):
    """Its file is gone: serving goes on without it, and the log says so once."""
    version = deployment.publish(3)
    shutil.rmtree(deployment.folder_of(version))
    deployment.registry.admit(version, most=2, actor="test", reason="test")
    with structlog.testing.capture_logs() as logs:
        for _ in range(4):
            swapper = deployment.follow()
    assert (swapper.alternates, swapper.version) == ((), FLOOR_VERSION)
    assert [line["event"] for line in logs].count("version_not_resident") == 1


def test_what_the_gate_said_of_the_live_version_is_known(deployment):
    """By segment and overall; a gate that said nothing, or something else, is no forecast."""
    gate = {"difference": 0.1, "by_segment": {"chat": {"difference": 0.2}, "code": None}, "verdict": "Passed"}
    sha256 = deployment.registry.draft(deployment.publish(5)).artifact_sha256
    version = deployment.registry.publish(
        parent=0, state="ready", artifact_sha256=sha256, artifact_bytes=1, trained_on={}, gate=gate, reason="test",
        job_id=None, actor="test",
    ).version  # fmt: skip
    deployment.promote(version)
    assert deployment.follow().gain == {"": 0.1, "chat": 0.2}
    deployment.promote(deployment.publish(6))
    assert deployment.follow().gain == {}
