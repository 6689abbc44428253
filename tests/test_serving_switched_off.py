"""Speculation switched off by settings, as the runbook says, and what the other setting does not do."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_rig import Rig, build_rig, counts_of, prompts, request
from tiny_pair import pair_settings

from adapter.database import migrate, open_database
from adapter.models import prepare_pair
from adapter.settings import load_settings
from serving.engine import build
from serving.engine.control.fixed import FixedGamma

RUNBOOK = Path(__file__).resolve().parent.parent / "docs" / "operations.md"
OFF = {"DRAFTSMITH_ENGINE__CONTROLLER": "fixed", "DRAFTSMITH_ENGINE__GAMMA": "0"}


def test_the_runbooks_settings_switch_speculation_off(folder, tmp_path, monkeypatch):
    """With the two variables of the runbook no request is drafted for, and all get their tokens; one that asks is."""
    assert " ".join(f"{name}={value}" for name, value in OFF.items()) in RUNBOOK.read_text()
    for name, value in OFF.items():
        monkeypatch.setenv(name, value)
    told = load_settings().engine
    settings = pair_settings(folder, tmp_path, engine={"controller": told.controller, "gamma": told.gamma})
    database = open_database(settings.database)
    migrate(database)
    pair = prepare_pair(settings)
    rig = Rig(build.build_engine(settings, pair, database), pair)
    rig.built.hotswap.stop()
    rig.collect(settings.log)
    try:
        assert isinstance(rig.engine.controller, FixedGamma)
        plain = [request(f"r{i}", prompt) for i, prompt in enumerate(prompts(100))]
        assert all(rig.run(plain))
        assert (rig.engine.stats.drafted, counts_of(plain).num_drafted) == (0, 0)
        asking = request("own", prompts(100)[0], gamma=2)
        rig.run([asking])
        assert counts_of([asking]).num_drafted > 0
    finally:
        rig.built.publisher.close()
        database.dispose()


def test_gamma_max_switches_it_off_under_the_adaptive_controller(folder, tmp_path):
    """With `engine.gamma_max` = 0 and the default `engine.gamma` the engine starts, drafts for nobody and says so."""
    rig = build_rig(folder, tmp_path, controller="adaptive", gamma=2, gamma_max=0)
    asking = [request("any", prompts(100)[0]), request("own", prompts(100)[1], gamma=2)]
    assert all(rig.run(asking))
    assert counts_of(asking).num_drafted == rig.engine.stats.drafted == 0
    assert rig.engine.controller.explain()["drafts"] is False
    rig.built.publisher.close()


@pytest.mark.parametrize("gamma", [0, 2])
def test_gamma_alone_leaves_the_adaptive_controller_in_charge(monkeypatch, gamma):
    """`engine.gamma` is the fixed controller's; without the other variable the length stays adaptive."""
    monkeypatch.setenv("DRAFTSMITH_ENGINE__GAMMA", str(gamma))
    assert load_settings().engine.controller == "adaptive"
