"""Versions that draft beside the live one: the registry's side, on real SQLite files."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine
from test_adapter_registry import new_registry, publish

from adapter.contracts import ConflictError, RegistryError


def test_an_alternate_comes_and_goes_with_one_audit_row_each(database: Engine) -> None:
    """Both raise the generation and are announced; live and previous stay where they are."""
    announced: list[int] = []
    registry = new_registry(database, announce=announced.append)
    version = publish(registry).version
    there = registry.admit(version, most=2, actor="ana", reason="fits chat", evidence={"gain": 0.1})
    gone = registry.dismiss(version, actor="ana", reason="no more")
    assert (there.alternates, there.live, there.previous) == ((version,), 0, None)
    assert there.artifacts[version] == "c" * 64
    assert (gone.alternates, gone.generation) == ((), 3)
    assert announced == [2, 3]
    dismissed, admitted = registry.audit(limit=2)
    assert (admitted.verb, admitted.from_version, admitted.to_version) == ("admit", None, version)
    assert (admitted.reason, admitted.evidence) == ("fits chat", {"gain": 0.1})
    assert (dismissed.verb, dismissed.from_version, dismissed.to_version) == ("dismiss", version, None)


def test_a_move_to_an_alternate_makes_it_live_and_nothing_else(database: Engine) -> None:
    """Promoted or gone back to, it is live; one that was left is not an alternate by itself."""
    registry = new_registry(database)
    first = publish(registry).version
    registry.admit(first, most=2, actor="ana", reason="r")
    live = registry.promote(first, actor="ana", reason="r")
    assert (live.live, live.alternates) == (first, ())
    registry.admit(0, most=2, actor="ana", reason="r")
    back = registry.roll_back(actor="ana", reason="r")
    assert (back.live, back.previous, back.alternates) == (0, first, ())


def test_a_quarantined_alternate_drafts_no_longer(database: Engine) -> None:
    """It leaves in the same transaction, the generation rises, and the log says why."""
    registry = new_registry(database)
    version = publish(registry).version
    seen = registry.admit(version, most=2, actor="ana", reason="r").generation
    after = registry.quarantine(version, actor="engine", reason="NaN", automatic=True)
    assert (after.alternates, after.generation) == ((), seen + 1)
    assert [row.verb for row in registry.audit(limit=2)] == ["dismiss", "quarantine"]
    assert "NaN" in registry.audit(limit=1)[0].reason
    assert registry.quarantine(version, actor="engine", reason="NaN") == after


def test_beyond_the_most_the_lowest_number_leaves(database: Engine) -> None:
    """The newest are kept, and the audit row names who had to leave."""
    registry = new_registry(database)
    versions = [publish(registry).version for _ in range(3)]
    for version in versions:
        live = registry.admit(version, most=2, actor="ana", reason="r")
    assert live.alternates == tuple(versions[1:])
    assert registry.audit(limit=1)[0].evidence == {"dismissed": versions[:1]}


def test_refusals_name_what_is_valid(database: Engine) -> None:
    """Live, rejected, unknown and doubled ones are refused in words, and so is a budget of none."""
    registry = new_registry(database)
    ready, rejected = publish(registry).version, publish(registry, "rejected").version
    registry.admit(ready, most=1, actor="ana", reason="r")
    seen = registry.live()
    for version, words in ((0, "is live already"), (ready, "is an alternate already"), (rejected, "is rejected"),
                           (9, "known versions: 0, 1, 2")):  # fmt: skip
        with pytest.raises(RegistryError, match=words):
            registry.admit(version, most=1, actor="ana", reason="r")
    with pytest.raises(RegistryError, match=r"engine\.alternates = 0"):
        registry.admit(ready, most=0, actor="ana", reason="r")
    with pytest.raises(RegistryError, match="alternates: 1"):
        registry.dismiss(rejected, actor="ana", reason="r")
    assert registry.live() == seen


def test_a_stale_view_is_told_who_moved_first(database: Engine) -> None:
    """Alternates count as moves, also for one who only wants to promote."""
    registry = new_registry(database)
    version = publish(registry).version
    registry.admit(version, most=1, actor="ana", reason="r")
    with pytest.raises(ConflictError, match="ana did 'admit' to version 1"):
        registry.promote(version, actor="bo", reason="r", expected_generation=1)
    registry.dismiss(version, actor="ana", reason="r")
    with pytest.raises(ConflictError, match="ana did 'dismiss' of version 1"):
        registry.promote(version, actor="bo", reason="r", expected_generation=2)
