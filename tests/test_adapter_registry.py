"""The version registry through its public surface, on real SQLite files."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import Engine

from adapter.contracts import ConflictError, RegistryError
from adapter.database import migrate, open_database
from adapter.registry import Registry
from adapter.versions import Draft

TARGET, BASE = "a" * 64, "b" * 64
MOVES = ("install", "promote", "roll_back", "admit", "dismiss")
MOST = 2  # alternates


def new_registry(engine: Engine, **options: Any) -> Registry:
    registry = Registry(engine, clock=lambda: 1000.0, **options)
    registry.install_base(target_fingerprint=TARGET, base_fingerprint=BASE, actor="engine")
    return registry


def publish(registry: Registry, state: str = "ready", parent: int = 0) -> Draft:
    return registry.publish(
        parent=parent, state=state, artifact_sha256="c" * 64, artifact_bytes=10, trained_on={"requests": 3},
        gate={"gain": 0.1}, reason="gate passed", job_id="j1", actor="trainer",
    )  # fmt: skip


def test_nothing_is_live_before_the_base_draft_is_installed(database: Engine) -> None:
    """An empty registry says so and what installs the base draft."""
    with pytest.raises(RegistryError, match="no base draft is installed"):
        Registry(database).live()


def test_installing_twice_is_one_change(database: Engine) -> None:
    """A second start with the same pair changes nothing; another pair is refused by name."""
    registry = new_registry(database)
    again = registry.install_base(target_fingerprint=TARGET, base_fingerprint=BASE, actor="engine")

    assert (1, 0, None) == (again.generation, again.live, again.previous)
    assert 1 == len(registry.audit())
    with pytest.raises(RegistryError, match="belongs to another pair"):
        registry.install_base(target_fingerprint="d" * 64, base_fingerprint=BASE, actor="engine")


def test_promote_then_roll_back_restores_what_was_live(database: Engine) -> None:
    """Roll back goes to previous, and both moves are announced and audited with who and why."""
    announced: list[int] = []
    registry = new_registry(database, announce=announced.append)
    first, second = publish(registry), publish(registry)
    registry.promote(first.version, actor="ana", reason="looks good")
    registry.promote(second.version, actor="watcher", reason="gate", automatic=True, evidence={"gain": 0.04})

    live = registry.roll_back(actor="ana", reason="slower on chat")

    assert (first.version, second.version) == (live.live, live.previous)
    assert [2, 3, 4] == announced
    newest, before = registry.audit(limit=2)
    assert ("ana", "roll_back", False, "slower on chat") == (newest.actor, newest.verb, newest.automatic, newest.reason)
    assert (True, {"gain": 0.04}) == (before.automatic, before.evidence)


@pytest.mark.parametrize(("state", "words"), [("rejected", "is rejected"), ("quarantined", "is quarantined")])
def test_only_ready_versions_can_be_promoted(database: Engine, state: str, words: str) -> None:
    """A version that failed its gate or was quarantined never becomes live; the error says which."""
    registry = new_registry(database)
    version = publish(registry, "rejected" if state == "rejected" else "ready").version
    if state == "quarantined":
        registry.quarantine(version, actor="ana", reason="bad bytes")

    with pytest.raises(RegistryError, match=words):
        registry.promote(version, actor="ana", reason="try")


def test_refusals_name_what_is_valid(database: Engine) -> None:
    """Unknown versions, moves to where we are, and a base draft that must stay are all refused in words."""
    registry = new_registry(database)
    with pytest.raises(RegistryError, match="no draft version 9; known versions: 0"):
        registry.promote(9, actor="ana", reason="typo")
    with pytest.raises(RegistryError, match="live already"):
        registry.promote(0, actor="ana", reason="again")
    with pytest.raises(RegistryError, match="no earlier version"):
        registry.roll_back(actor="ana", reason="further")
    with pytest.raises(RegistryError, match="base draft and cannot be quarantined"):
        registry.quarantine(0, actor="ana", reason="off")
    with pytest.raises(RegistryError, match="'ready' or 'rejected'"):
        publish(registry, "live")
    assert 1 == len(registry.audit())


def test_a_stale_view_is_told_who_moved_first(database: Engine) -> None:
    """A mover that looked at an older generation changes nothing and learns who was faster."""
    registry = new_registry(database)
    first, second = publish(registry), publish(registry)
    seen = registry.live().generation
    registry.promote(first.version, actor="ana", reason="mine", expected_generation=seen)

    with pytest.raises(ConflictError, match="ana did 'promote' to version 1"):
        registry.promote(second.version, actor="bo", reason="mine too", expected_generation=seen)
    assert first.version == registry.live().live


def test_quarantining_the_live_version_leaves_it_first(database: Engine) -> None:
    """Quarantine of what is live rolls back in the same transaction; a second time does nothing."""
    registry = new_registry(database)
    version = publish(registry).version
    registry.promote(version, actor="ana", reason="go")

    live = registry.quarantine(version, actor="watcher", reason="NaN", automatic=True)
    rows = len(registry.audit())
    again = registry.quarantine(version, actor="watcher", reason="NaN", automatic=True)

    assert (0, "quarantined") == (live.live, registry.draft(version).state)
    assert (live, rows) == (again, len(registry.audit()))


def test_roll_back_skips_a_quarantined_previous(database: Engine) -> None:
    """When previous was quarantined meanwhile, roll back goes to the base draft, never to it."""
    registry = new_registry(database)
    first, second = publish(registry), publish(registry)
    registry.promote(first.version, actor="ana", reason="go")
    registry.promote(second.version, actor="ana", reason="go")
    registry.quarantine(first.version, actor="ana", reason="bad data")

    assert 0 == registry.roll_back(actor="ana", reason="slower").live


def test_a_failed_announcement_happens_after_the_commit(database: Engine) -> None:
    """The hint is only a hint: the move stands when the announcer fails."""

    def broken(generation: int) -> None:
        raise OSError("redis is gone")

    registry = new_registry(database, announce=broken)
    version = publish(registry).version
    with pytest.raises(OSError, match="redis is gone"):
        registry.promote(version, actor="ana", reason="go")
    assert version == registry.live().live


def _race(starters: list[threading.Thread]) -> None:
    for thread in starters:
        thread.start()
    for thread in starters:
        thread.join(60)
        assert not thread.is_alive()


def test_of_concurrent_promotions_exactly_one_wins(database: Engine) -> None:
    """n=8 threads with the same expected generation: one move, seven conflicts, one audit row."""
    registry = new_registry(database)
    versions = [publish(registry).version for _ in range(8)]
    seen = registry.live().generation
    start = threading.Barrier(len(versions))
    outcomes: list[str] = []

    def promote(version: int) -> None:
        start.wait(30)
        try:
            registry.promote(version, actor=f"t{version}", reason="race", expected_generation=seen)
            outcomes.append("won")
        except ConflictError:
            outcomes.append("conflict")

    _race([threading.Thread(target=promote, args=(version,)) for version in versions])

    assert ["conflict"] * 7 + ["won"] == sorted(outcomes)
    assert seen + 1 == registry.live().generation
    assert 1 == sum(entry.verb == "promote" for entry in registry.audit())


_PROMOTER = """
import sys
from adapter.contracts import ConflictError
from adapter.database import open_database
from adapter.registry import Registry
url, version, seen = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
registry = Registry(open_database(url))
sys.stdin.readline()
try:
    registry.promote(version, actor=f"p{version}", reason="race", expected_generation=seen)
    print("won")
except ConflictError:
    print("conflict")
"""


def test_of_concurrent_processes_exactly_one_wins(database: Engine) -> None:
    """n=4 processes on one SQLite file: one wins, nobody sees a locked database."""
    registry = new_registry(database)
    versions = [publish(registry).version for _ in range(4)]
    seen = registry.live().generation
    url = database.url.render_as_string(hide_password=False)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROMOTER, url, str(version), str(seen)],
            cwd=Path(__file__).parent.parent,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for version in versions
    ]
    replies = [process.communicate("go\n", timeout=60) for process in processes]

    assert ["conflict"] * 3 + ["won"] == sorted(out.strip() for out, _ in replies), replies
    assert seen + 1 == registry.live().generation


def test_published_versions_never_share_a_number(database: Engine) -> None:
    """n=6 threads that publish at once get six different, consecutive versions."""
    registry = new_registry(database)
    start = threading.Barrier(6)
    found: list[int] = []

    def work() -> None:
        start.wait(30)
        found.append(publish(registry).version)

    _race([threading.Thread(target=work) for _ in range(6)])
    assert [1, 2, 3, 4, 5, 6] == sorted(found)


class RegistryMachine(RuleBasedStateMachine):
    """Random operations against a model of four variables: states, live, previous, alternates."""

    @initialize()
    def open(self) -> None:
        """Start from a fresh file with the base draft."""
        self.folder = tempfile.TemporaryDirectory()
        self.engine = open_database(f"sqlite:///{self.folder.name}/r.db")
        migrate(self.engine)
        self.announced: list[int] = []
        self.registry = new_registry(self.engine, announce=self.announced.append)
        self.states = {0: "ready"}
        self.live, self.previous = 0, None
        self.alternates: set[int] = set()
        self.generation, self.rows = 1, 1

    def _moved(self, to: int) -> None:
        self.live, self.previous = to, self.live
        self.alternates.discard(to)
        self._raised()

    def _raised(self) -> None:
        self.generation += 1
        self.rows += 1

    @rule(state=st.sampled_from(["ready", "rejected"]))
    def publish(self, state: str) -> None:
        """A new version gets the next number and moves nothing."""
        draft = publish(self.registry, state)
        assert max(self.states) + 1 == draft.version
        self.states[draft.version] = state
        self.rows += 1

    @rule(pick=st.integers(0, 6), stale=st.booleans())
    def promote(self, pick: int, stale: bool) -> None:
        """Only a ready version that is not live moves, and only for a fresh view."""
        seen = self.generation - stale
        allowed = not stale and self.states.get(pick) == "ready" and pick != self.live
        if allowed:
            self.registry.promote(pick, actor="ana", reason="r", expected_generation=seen)
            self._moved(pick)
        else:
            with pytest.raises(RegistryError):
                self.registry.promote(pick, actor="ana", reason="r", expected_generation=seen)

    @rule()
    def roll_back(self) -> None:
        """Back to previous, or to the base draft when previous cannot be live."""
        ok = self.previous is not None and self.states[self.previous] == "ready"
        to = self.previous if ok else 0
        if to == self.live:
            with pytest.raises(RegistryError):
                self.registry.roll_back(actor="ana", reason="r")
        else:
            self.registry.roll_back(actor="ana", reason="r")
            self._moved(to)

    @rule(pick=st.integers(0, 6))
    def quarantine(self, pick: int) -> None:
        """A known version but the base draft; the live one is left in the same breath."""
        if pick == 0 or pick not in self.states:
            with pytest.raises(RegistryError):
                self.registry.quarantine(pick, actor="ana", reason="r")
            return
        self.registry.quarantine(pick, actor="ana", reason="r")
        if self.states[pick] == "quarantined":
            return
        self.states[pick] = "quarantined"
        self.rows += 1
        if pick in self.alternates:
            self.alternates.discard(pick)
            self._raised()
        if pick == self.live:
            ok = self.previous not in (None, pick) and self.states[self.previous] == "ready"
            self._moved(self.previous if ok else 0)

    @rule(pick=st.integers(0, 6), stale=st.booleans())
    def admit(self, pick: int, stale: bool) -> None:
        """Only a ready version that drafts for nobody yet; the lowest numbers make room."""
        seen = self.generation - stale
        allowed = not stale and self.states.get(pick) == "ready" and pick not in (self.live, *self.alternates)
        if allowed:
            self.registry.admit(pick, most=MOST, actor="ana", reason="r", expected_generation=seen)
            while len(self.alternates) >= MOST:
                self.alternates.remove(min(self.alternates))
            self.alternates.add(pick)
            self._raised()
        else:
            with pytest.raises(RegistryError):
                self.registry.admit(pick, most=MOST, actor="ana", reason="r", expected_generation=seen)

    @rule(pick=st.integers(0, 6))
    def dismiss(self, pick: int) -> None:
        """Only an alternate."""
        if pick not in self.alternates:
            with pytest.raises(RegistryError):
                self.registry.dismiss(pick, actor="ana", reason="r")
            return
        self.registry.dismiss(pick, actor="ana", reason="r")
        self.alternates.remove(pick)
        self._raised()

    @invariant()
    def agrees(self) -> None:
        """Registry and model agree; quarantined is never live; one audit row a change."""
        live = self.registry.live()
        assert (self.generation, self.live, self.previous) == (live.generation, live.live, live.previous)
        assert tuple(sorted(self.alternates)) == live.alternates
        assert all(self.registry.draft(version).state == "ready" for version in live.alternates)
        assert "ready" == self.registry.draft(live.live).state
        assert self.states == {draft.version: draft.state for draft in self.registry.drafts()}
        audit = self.registry.audit(limit=1000)
        assert self.rows == len(audit)
        moves = [entry.generation for entry in reversed(audit) if entry.verb in MOVES]
        assert list(range(1, self.generation + 1)) == moves
        assert moves[1:] == self.announced

    def teardown(self) -> None:
        """Close the file."""
        if hasattr(self, "engine"):
            self.engine.dispose()
            self.folder.cleanup()


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = hypothesis_settings(max_examples=25, stateful_step_count=25, deadline=None)


class LongRegistryMachine(RegistryMachine):
    """The same machine, on more and longer histories."""


TestLongRegistryMachine = pytest.mark.slow(LongRegistryMachine.TestCase)
TestLongRegistryMachine.settings = hypothesis_settings(max_examples=100, stateful_step_count=40, deadline=None)
