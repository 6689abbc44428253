"""What a finished training job says, and its promotion.

Reads the job's result, which another process wrote, and moves the alias; knows nothing of phases or alerts.
Called by `monitors.loop`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from adapter.contracts import ConflictError, RegistryError
from adapter.jobs import Job
from adapter.registry import Registry
from adapter.versions import Live

SWITCH, ADMIT = "switch", "admit"
_MOVES = 100  # audit rows looked back on


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A job's result.

    `train` is a version of its own, `switch` takes an older one again, and `admit` is either of them where it gains in
    single segments only: it may draft beside what is live.

    `compared_with` is the version that was live when it was judged, None where an older trainer does not say.
    """

    version: int
    state: Literal["ready", "rejected"]
    action: Literal["train", "switch", "admit"] = "train"
    verdict: str | None = None
    compared_with: int | None = None
    gate: dict[str, Any] = {}

    @property
    def sentence(self) -> str:
        """The verdict; for a switch it says that it is one."""
        words = self.verdict or "no verdict"
        if self.action == ADMIT:
            return f"v{self.version} drafts beside it, where it fits better: {words}"
        return f"switched to v{self.version}, which was kept: {words}" if self.action == SWITCH else words


class Promotion(msgspec.Struct, frozen=True, kw_only=True):
    """How an attempt to promote ended: `live` moved, `refused` says why not, or neither: look again."""

    live: Live | None = None
    refused: str | None = None


def outcome_of(job: Job) -> Outcome | None:
    """Read a job's result; None where it makes no sense."""
    try:
        outcome = msgspec.convert(job.result, Outcome)
    except msgspec.ValidationError:
        return None
    if outcome.action != "train" and (outcome.state != "ready" or outcome.compared_with is None):
        return None
    return outcome


def admit(registry: Registry, outcome: Outcome, *, most: int, live: int, generation: int, actor: str) -> Promotion:
    """Let a version draft beside the live one that it was judged against; `most` alternates in all."""
    if outcome.compared_with != live:
        return Promotion(refused=f"it was compared with v{outcome.compared_with}, and v{live} is live now")
    try:
        moved = registry.admit(
            outcome.version, most=most, actor=actor, automatic=True, reason=outcome.sentence,
            evidence=dict(outcome.gate), expected_generation=generation,
        )  # fmt: skip
    except ConflictError:
        return Promotion()
    except RegistryError as error:
        return Promotion(refused=str(error))
    return Promotion(live=moved)


def promote(registry: Registry, outcome: Outcome, job: Job, *, live: int, generation: int, actor: str) -> Promotion:
    """Make a version live that passed its gate against what is live.

    Refuses one that was judged against another version, and one that was promoted after its job already: somebody
    moved on since, before a crash let this loop see it.
    """
    try:
        draft = registry.draft(outcome.version)
        against = draft.parent if outcome.compared_with is None else outcome.compared_with
        if against != live:
            return Promotion(refused=f"it was compared with v{against}, and v{live} is live now")
        ended_s = job.finished_at_s or job.created_at_s
        for row in registry.audit(_MOVES):
            if row.verb == "promote" and row.to_version == outcome.version and row.at_s >= ended_s:
                return Promotion(refused=f"it was promoted before and left again for v{live}")
        evidence = dict(outcome.gate or draft.gate)
        if outcome.action == SWITCH:
            evidence |= {"action": SWITCH, "compared_with": against}
        moved = registry.promote(
            outcome.version, actor=actor, automatic=True, reason=outcome.sentence, evidence=evidence,
            expected_generation=generation,
        )  # fmt: skip
    except ConflictError:
        return Promotion()  # somebody moved the alias; the next step sees it and decides again
    except RegistryError as error:
        return Promotion(refused=str(error))
    return Promotion(live=moved)
