"""The API never goes on with a pair that its engine does not serve: real processes on the tiny pair."""

from __future__ import annotations

import shutil
from pathlib import Path

from processes import START_S, serving_tiny

from adapter.facts import STARTING, Facts
from adapter.pairs import loaded_pair, pair_from_facts


def test_an_api_whose_pair_is_no_longer_served_ends_and_an_engine_disowns_what_was_said_before():
    """An engine that comes back with another folder ends the API; while one loads, or cannot, no pair counts."""
    with serving_tiny() as service:
        facts = Facts(service.database)
        before = pair_from_facts(facts)
        assert before is not None

        service.kill_engine()
        kept = service.settings
        service.settings = kept.model_copy(update={"target": "/no/such/model"})
        service.start_engine()
        assert service.engine.wait(START_S) == 2
        assert facts.get(STARTING) is not None
        assert (loaded_pair(facts), pair_from_facts(facts)) == (None, before)

        moved = Path(shutil.copytree(before.target_path, kept.data_dir / "moved" / Path(before.target_path).name))
        service.settings = kept.model_copy(update={"target": str(moved)})
        service.start_engine()
        assert service.api.wait(START_S) == 1
        assert loaded_pair(facts).target_path == str(moved)
