"""What the service says of itself after a run: drift, trainings, swaps, versions and gates, in seconds of the run.

Reads SQL through `serving.demo.service`, as an operator's tools do.  Called by `bench.shift_arms`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from adapter.alerting import Alerts
from adapter.contracts import FLOOR_VERSION, DraftsmithError
from adapter.database import open_database
from adapter.jobs import OPEN_STATES
from adapter.settings import Settings
from serving.demo.service import Service

_MANY = 1000
_MOVES = ("promote", "roll_back", "quarantine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """Times are seconds since the begin of the run; what happened before it has a negative time.

    `starts_with` is the version that was live when the run began.
    """

    starts_with: int = FLOOR_VERSION
    drift: list[dict[str, Any]] = field(default_factory=list)  # at_s, segment, words
    trainings: list[dict[str, Any]] = field(default_factory=list)  # from_s, until_s, state, reason, error
    swaps: list[dict[str, Any]] = field(default_factory=list)  # at_s, version, pause_ms
    moves: list[dict[str, Any]] = field(default_factory=list)  # at_s, verb, from_version, to_version, automatic, reason
    versions: list[dict[str, Any]] = field(default_factory=list)  # version, parent, state, at_s, created_by
    gates: list[dict[str, Any]] = field(default_factory=list)  # version, at_s, passed, verdict and the gate's figures

    def version_at(self, at_s: float) -> int:
        """Return the version that drafted at a time."""
        found = self.starts_with
        for swap in self.swaps:
            if 0 <= swap["at_s"] <= at_s:
                found = swap["version"]
        return found

    def training_at(self, begin_s: float, end_s: float) -> bool:
        """Whether a training ran during a stretch."""
        return any(item["from_s"] < end_s and begin_s < item["until_s"] for item in self.trainings)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def read_marks(service: Service, settings: Settings, began_s: float, seconds: float, starts_with: int) -> Marks:
    """Read what happened since `began_s` (epoch seconds); a training that still runs ends at `seconds`.

    Versions and gates are all there are, those that the folder began with too.
    """

    def at(epoch_s: float) -> float:
        return round(epoch_s - began_s, 2)

    alerts = _alerts(settings)
    jobs = [
        job
        for job in service.jobs.latest(_MANY)
        if job.started_at_s is not None and (job.finished_at_s is None or job.finished_at_s >= began_s)
    ]
    drafts = [draft for draft in service.registry.drafts() if draft.version != FLOOR_VERSION]
    return Marks(
        starts_with=starts_with,
        drift=sorted(
            ({"at_s": at(alert.opened_at_s), "segment": alert.key, "words": alert.summary}
             for alert in alerts if alert.rule == "AcceptanceDrift"),
            key=lambda item: item["at_s"],
        ),
        trainings=[
            {"from_s": at(job.started_at_s or 0), "reason": job.reason, "state": job.state, "error": job.error,
             "until_s": seconds if job.state in OPEN_STATES or job.finished_at_s is None else at(job.finished_at_s)}
            for job in reversed(jobs)
        ],
        swaps=[{"at_s": at(swap["at_s"]), "version": swap["version"], "pause_ms": swap["pause_ms"]}
               for swap in service.swaps if swap["at_s"] >= began_s],
        moves=[
            {"at_s": at(row.at_s), "verb": row.verb, "from_version": row.from_version, "to_version": row.to_version,
             "automatic": row.automatic, "reason": row.reason}
            for row in reversed(service.registry.audit(_MANY)) if row.verb in _MOVES
        ],
        versions=[
            {"version": draft.version, "parent": draft.parent, "state": draft.state, "at_s": at(draft.created_at_s),
             "created_by": draft.created_by}
            for draft in reversed(drafts)
        ],
        gates=[{"version": draft.version, "at_s": at(draft.created_at_s), **draft.gate} for draft in reversed(drafts)],
    )  # fmt: skip


def _alerts(settings: Settings) -> list[Any]:
    database = open_database(settings.database)
    try:
        return list(Alerts(database).latest(_MANY))
    except DraftsmithError:
        return []
    finally:
        database.dispose()
