"""Tells the workers about waiting jobs, again and again, because the broker may have lost it.

A job that is claimed already is refused by the job table, so a repeated message costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from adapter.jobs import Jobs

_EVERY_S = 3.0
_EVERY_AT_MOST_S = 15.0  # the pause doubles up to this, or a queue without workers would only grow


class Announcer:
    """Announce every claimable job.

    Args:
        announce: tells a worker that a job waits; False when it could not.
        clock: epoch seconds.
    """

    def __init__(self, jobs: Jobs, announce: Callable[[str], bool], clock: Callable[[], float]) -> None:
        self._jobs = jobs
        self._announce = announce
        self._clock = clock
        self._told: dict[str, tuple[float, float]] = {}  # job id -> last time, pause before the next

    def tick(self) -> None:
        """Announce what is due."""
        now, waiting = self._clock(), self._jobs.claimable()
        self._told = {job_id: self._told[job_id] for job_id in waiting if job_id in self._told}
        for job_id in waiting:
            last, pause = self._told.get(job_id, (float("-inf"), _EVERY_S))
            if abs(now - last) < pause:
                continue
            delivered = self._announce(job_id)
            repeated = delivered and last != float("-inf")
            self._told[job_id] = (now, min(2 * pause, _EVERY_AT_MOST_S) if repeated else _EVERY_S)

    def forget(self) -> None:
        """Announce everything afresh: the broker came back and may have come back empty."""
        self._told.clear()
