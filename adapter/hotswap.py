"""Follow the registry and change the served draft between two rounds.

A thread polls the registry, checks and merges a new live version into a spare slot and leaves it
ready; the decoding loop calls `poll` between rounds, which only moves a reference.  Floor, live and
previous stay resident, so going back needs no disk; alternates do, to draft beside the live one.  An
artifact that must not be loaded is quarantined with the reason and serving stays on what it has.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from sqlalchemy.exc import SQLAlchemyError

from adapter.contracts import FLOOR_VERSION, ArtifactError, RegistryError
from adapter.following import Follower, forbid
from adapter.lora import base_weights, merge_all, merge_artifact
from adapter.pairs import Pair
from adapter.registry import Registry
from adapter.versions import Live

log = structlog.get_logger(__name__)

MERGED_SLOTS = 3  # live, previous, and the one being written or, until the next round, just dropped


@dataclass(frozen=True, slots=True)
class SwapReceipt:
    """One swap: what is drafted with now, what was before, and how long the loop stood still."""

    version: int
    replaced: int
    generation: int
    pause_ms: float
    at_s: float


class DraftSlots:
    """Resident drafts by version: the base draft and `MERGED_SLOTS` merged ones and `alternates`, at fixed addresses.

    Slots share embedding, head and norms; only the linear layers a version may change are their own.
    `write` merges the weights as `adapter.lora.merge_all` does; `finish` is run on a slot after that, before it is
    served.  A version that is dropped may still be drafting: its slot is written again only after `reclaim`.
    """

    def __init__(
        self, base_model: Any, pair: Pair, max_norm_ratio: float, finish: Callable[[Any], None] = lambda model: None,
        write: Callable[[Any, float], torch.Tensor] = merge_all, alternates: int = 0,
    ) -> None:  # fmt: skip
        self._pair = pair
        self._most = MERGED_SLOTS + alternates
        self._finish = finish
        self._write = write
        self._max_norm_ratio = max_norm_ratio
        self._modules = list(pair.lora_shapes)
        self._pristine = base_weights(base_model, self._modules)
        self._resident: dict[int, Any] = {FLOOR_VERSION: base_model}
        self._spare: list[Any] = []
        self._retired: list[Any] = []  # dropped, and perhaps in use until the loop's next round
        self._base = base_model

    def get(self, version: int) -> Any | None:
        """Return the resident model of a version, if there is one."""
        return self._resident.get(version)

    @property
    def versions(self) -> list[int]:
        """Versions that can be served at once."""
        return sorted(self._resident)

    @property
    def can_load(self) -> bool:
        """Whether there is a slot that nobody can be drafting with, or room for another one."""
        return bool(self._spare) or len(self._resident) - 1 + len(self._retired) < self._most

    def load(
        self, version: int, artifact_sha256: str, root: Path, check: Callable[[Any], None] = lambda model: None
    ) -> Any:
        """Check an artifact, merge it into a spare slot, let `check` try the model and return it.

        Raises:
            ArtifactError: the artifact must not be loaded.
        """
        slot = self._spare.pop() if self._spare else self._new_slot()
        try:
            merge_artifact(
                slot, self._pristine, self._pair, root, artifact_sha256, max_norm_ratio=self._max_norm_ratio,
                write=self._write,
            )  # fmt: skip
            self._finish(slot)
            check(slot)
        except BaseException:
            self._spare.append(slot)
            raise
        self._resident[version] = slot
        return slot

    def keep_only(self, versions: set[int]) -> None:
        """Drop all other versions; the base draft always stays."""
        for version in [item for item in self._resident if item not in versions | {FLOOR_VERSION}]:
            self._retired.append(self._resident.pop(version))

    def reclaim(self) -> None:
        """Turn the slots of dropped versions into spare ones.  Called between two rounds, when none is in use."""
        self._spare += self._retired
        self._retired = []

    def _new_slot(self) -> Any:
        own = {id(self._base.get_submodule(name).weight) for name in self._modules}
        shared = {id(item): item for item in self._base.parameters() if id(item) not in own}
        return copy.deepcopy(self._base, shared)


class HotSwap(Follower[Any]):
    """Keep the draft in force equal to the registry's live alias.

    Args:
        check: run once on a freshly merged model, off the hot path; raises ArtifactError when the
            model does not behave.
        companion: run after every look at the registry, for what else follows it.
        clock: epoch seconds for receipts.
    """

    def __init__(
        self,
        registry: Registry,
        slots: DraftSlots,
        artifacts_dir: Path,
        *,
        poll_s: float,
        check: Callable[[Any], None] = lambda model: None,
        companion: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(FLOOR_VERSION, slots.get(FLOOR_VERSION), generation=0)
        self._registry = registry
        self._slots = slots
        self._root = artifacts_dir
        self._poll_s = poll_s
        self._check = check
        self._companion = companion
        self._clock = clock
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self.previous: int | None = None
        self.alternates: tuple[int, ...] = ()  # resident, and allowed to draft beside the version in force
        self.gain: dict[str, float] = {}  # acceptance its gate forecast, by segment; "": overall
        self._named: Live | None = None  # what the registry said last
        self.last: SwapReceipt | None = None
        self.registry_up = True
        self._choosable: dict[int, Any] = {FLOOR_VERSION: slots.get(FLOOR_VERSION)}  # the same all through a round
        self._refused: tuple[int, str] | None = None
        self._unloadable: set[int] = set()  # versions that were tried in this generation
        self._back_at: int | None = None  # an older generation the registry showed, said once

    @property
    def version(self) -> int:
        """The version in force."""
        return self._in_force[1]

    @property
    def model(self) -> Any:
        """Its model."""
        return self._in_force[2]

    def start(self) -> None:
        """Bring the live version in before the first round, then follow in a thread."""
        self.refresh()
        self.poll()
        self._thread = threading.Thread(target=self._run, name="hot-swap", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(5)

    def resident(self, version: int) -> Any | None:
        """Return the model of a version a request may draft with: floor, live, previous or an alternate.

        The answer changes in `poll` alone, so a round that asks twice hears the same.
        """
        return self._choosable.get(version)

    def wake(self) -> None:
        """Look at the registry now instead of at the next poll."""
        self._wake.set()

    def poll(self) -> SwapReceipt | None:
        """Flip to the version that is ready, if any.  Called between two rounds; moves references only."""
        flipped = self._flip()
        with self._lock:  # nobody drafts now, so what was dropped until here is in nobody's hands
            self._slots.reclaim()
            named = self._named.alternates if self._named is not None else ()
            versions = {FLOOR_VERSION, self.version, *named} | (set() if self.previous is None else {self.previous})
            found = {version: self._slots.get(version) for version in versions}
        self._choosable = {version: model for version, model in found.items() if model is not None}
        self.alternates = tuple(item for item in named if item in self._choosable and item != self.version)
        if flipped is None or flipped[0] == self.version:  # the same version, of a generation with other alternates
            return None
        (generation, version, _), (replaced, pause_ms) = self._in_force, flipped
        self.last = SwapReceipt(version, replaced, generation, pause_ms, self._clock())
        log.info(
            "draft_swapped", version=version, replaced=replaced, generation=generation, pause_ms=round(pause_ms, 3)
        )
        return self.last

    def refresh(self) -> None:
        """Ask the registry once and prepare what it wants; never raises for a bad artifact."""
        try:
            wanted = self._registry.live()
            self.registry_up = True
        except (SQLAlchemyError, RegistryError, OSError) as error:
            if self.registry_up:
                log.warning("registry_unreachable", error=str(error))
            self.registry_up = False
            return
        if wanted.generation < self.generation:
            if self._back_at != wanted.generation:
                log.error("registry_went_back", generation=wanted.generation, serving=self.generation)
            self._back_at = wanted.generation
            return
        if self._prepared() != wanted.generation and wanted.generation != self.generation:
            self._prepare(wanted)
        elif self._named == wanted:
            self._warm(wanted)  # what had no slot before may have one now

    def _prepare(self, wanted: Live) -> None:
        with self._lock:  # a swap in between would leave the version now in force out of `keep`
            keep = {self.version, wanted.live, *_beside(wanted)}
            if self._ready is not None:
                keep.add(self._ready[1])
            self._slots.keep_only(keep)
            if self._slots.get(wanted.live) is None and not self._slots.can_load:
                return  # until the loop has begun another round; the next look at the registry tries again
        try:
            model = self._resident_or_load(wanted.live, wanted.artifacts[wanted.live])
            gain = _gain(self._registry.draft(wanted.live).gate)
        except ArtifactError as error:
            self._refuse(wanted.live, error)
            return
        with self._lock:
            self._ready = (wanted.generation, wanted.live, model)
            self.previous, self._named, self.gain = wanted.previous, wanted, gain
        self._unloadable.clear()
        self._warm(wanted)

    def _resident_or_load(self, version: int, sha256: str | None) -> Any:
        model = self._slots.get(version)
        if model is None:
            if sha256 is None:
                raise ArtifactError(f"version {version} has no artifact")
            begin = time.perf_counter()
            model = self._slots.load(version, sha256, self._root, self._check)
            log.info("draft_loaded", version=version, seconds=round(time.perf_counter() - begin, 3))
        return model

    def _warm(self, wanted: Live) -> None:
        """Have the previous version and the alternates resident too, so that neither needs the disk.

        One that cannot be loaded is tried once; one for which all slots are in use, at every look at the registry.
        """
        for version in _beside(wanted):
            with self._lock:
                waits = self._slots.get(version) is not None or not self._slots.can_load
            if waits or version in self._unloadable:
                continue
            try:
                self._resident_or_load(version, wanted.artifacts[version])
            except ArtifactError as error:
                self._unloadable.add(version)
                log.warning("version_not_resident", version=version, error=str(error))

    def _refuse(self, version: int, error: ArtifactError) -> None:
        again = self._refused == (version, str(error))  # a quarantine that cannot be written is tried at every poll
        self._refused = (version, str(error))
        if not again:
            log.error("draft_refused", version=version, reason=str(error))
        forbid(self._registry, version, str(error), quiet=again)

    def _run(self) -> None:
        # A second pool of OpenMP threads would count as more threads than cores, and then nobody spins any more.
        # Asking for the number fixes it for this thread; else it would become the loop's with the first computation.
        torch.set_num_threads(1)
        torch.get_num_threads()
        while not self._stop.is_set():
            self._wake.wait(self._poll_s)
            self._wake.clear()
            try:
                self.refresh()
                self._companion()
            except Exception:  # the thread that can undo a bad draft must outlive any surprise
                log.exception("swap_poll_failed")


def _gain(gate: dict[str, Any]) -> dict[str, float]:
    """Read what a gate said of a version, by segment and, under "", of all; nothing where it said nothing."""
    said = {"": gate, **(gate.get("by_segment") or {})}
    gains = {name: part.get("difference") for name, part in said.items() if isinstance(part, dict)}
    return {name: float(gain) for name, gain in gains.items() if isinstance(gain, int | float)}


def _beside(wanted: Live) -> tuple[int, ...]:
    """Return the versions to have resident besides the live one, those that matter most first."""
    return tuple(dict.fromkeys([*([] if wanted.previous is None else [wanted.previous]), *wanted.alternates]))


def check_finite(logits: torch.Tensor) -> None:
    """Refuse a model whose logits are not finite.

    Raises:
        ArtifactError: NaN or infinity among them.
    """
    if not torch.isfinite(logits).all():
        raise ArtifactError("the merged draft gives NaN or infinite logits")
