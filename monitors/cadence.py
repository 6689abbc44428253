"""When a training may start, how much may be spent on trainings, and when to stop asking for them.

What each state needs to end well; its time-out; where it leads:

* watching: sustained drift, or `evidence_requests` requests since the last training; none; to collecting,
  training, cooling (the budget is spent) or held (trainings do not pay).
* collecting: `distill.min_requests` requests since the drift began; a day; to training, watching (acceptance
  recovered) or cooling.
* training: the job's end, which its gate decides; the trainer's own limit, or a day without any worker; to observing,
  cooling or held.
* observing: `guard_min_requests` comparable requests whose interval leaves the margin, or whose mean is within it once
  there is evidence for another training; ten times as many, or a day; to watching, cooling (rolled back) or held.
* cooling: time; `retrain_cooldown_s`, doubled by every failure, an hour at the most, or until the budget has room; to
  watching, or training (a person asked).
* held: a person, who asks for a training or moves a version; a day where the loop gave up, none where trainings do not
  pay; to watching, observing, cooling or training.

A request that nothing was drafted for is evidence, too: the log holds what the target thought of each token.
What is missing starts nothing: without a request there is no training.  Pure functions and plain
data, which survive a restart; knows no SQL and no Redis.  `monitors.loop` decides with it.

Start values: NVIDIA NeMo-RL's draft adaptation (a minimum of observations, a minimum interval, a burst cap that
fails loudly) and Aurora's 400 samples between two updates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from adapter.jobs import Job
from adapter.sections import MonitorSettings

DAY_S = 86400.0
_DOUBLINGS = 4  # 16 times the evidence at the most


class Evidence(msgspec.Struct, kw_only=True):
    """Requests that no training has seen, per segment, and how often each segment's were learnt from in vain.

    A request counts 1 / 2^doublings of its segment, so that n refusals in a row ask for 2^n times as many.
    """

    counted: dict[str, int] = msgspec.field(default_factory=dict)
    doublings: dict[str, int] = msgspec.field(default_factory=dict)
    taken: list[str] = msgspec.field(default_factory=list)  # segments of the last training

    def add(self, segment: str) -> None:
        """Count one request that was logged."""
        self.counted[segment] = self.counted.get(segment, 0) + 1

    @property
    def weight(self) -> float:
        """What is there, in requests of a segment that never failed."""
        return sum(math.ldexp(number, -self.doublings.get(name, 0)) for name, number in self.counted.items())

    def missing(self, needed: int) -> int:
        """Return how many further requests of today's mix it takes to weigh `needed`."""
        total = sum(self.counted.values())
        if self.counted:
            share = self.weight / total
        else:
            known = [self.doublings.get(name, 0) for name in self.taken] or [0]
            share = sum(math.ldexp(1, -times) for times in known) / len(known)
        return max(0, round((needed - self.weight) / share))

    def take(self) -> None:
        """Note that a training has begun with all of it."""
        self.taken = sorted(self.counted)
        self.counted = {}

    def refused(self) -> None:
        """Ask for twice as much of what the last training learnt from in vain."""
        for name in self.taken:
            self.doublings[name] = min(_DOUBLINGS, self.doublings.get(name, 0) + 1)

    def passed(self) -> None:
        """Ask for the plain number again."""
        self.doublings = {}

    def forget(self, segment: str) -> None:
        """Drop what is known about a segment."""
        self.counted.pop(segment, None)
        self.doublings.pop(segment, None)


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """Trainings of the last 24 hours; `free_at_s` is when there is room for one again, None when there is now."""

    trainings: int
    seconds: float
    free_at_s: float | None


def seconds_of(job: Job, now_s: float) -> float:
    """Return how long a job has computed, as far as it is known; 0 for one that nobody claimed.

    While it waited for serving it cost nothing; a job that runs has not said yet how long it did.
    """
    if job.started_at_s is None:
        return 0.0
    ended_s = now_s if job.finished_at_s is None else job.finished_at_s
    took_s = max(_number(job.result.get("seconds")), ended_s - job.started_at_s)
    return max(0.0, took_s - _number(job.result.get("waited_s")))


def _number(said: object) -> float:
    return float(said) if isinstance(said, int | float) and not isinstance(said, bool) else 0.0


def spent(jobs: Sequence[Job], settings: MonitorSettings, now_s: float) -> Spent:
    """Add up the trainings that began within the last 24 hours, whoever asked for them."""
    begun = sorted(
        (job.started_at_s, seconds_of(job, now_s))
        for job in jobs
        if job.started_at_s is not None and job.started_at_s > now_s - DAY_S
    )
    trainings, seconds = len(begun), sum(item[1] for item in begun)
    free_at_s, left, left_s = None, trainings, seconds
    for started_s, took_s in begun:
        if left < settings.trainings_per_day and left_s < settings.training_seconds_per_day:
            break
        left, left_s, free_at_s = left - 1, left_s - took_s, started_s + DAY_S
    return Spent(trainings=trainings, seconds=seconds, free_at_s=free_at_s)


def budget_sentence(used: Spent, settings: MonitorSettings) -> str:
    """Say that the budget of a day is spent."""
    return (
        f"the training budget of 24 hours is spent: {used.trainings} of {settings.trainings_per_day} trainings, "
        f"{used.seconds:,.0f} of {settings.training_seconds_per_day:,.0f} s; serving goes on with what is live"
    )


def given_up_sentence(failures: int, last: str) -> str:
    """Say that the loop has stopped answering drift, and what a person can do."""
    return (
        f"gave up after {failures} trainings on drift that brought nothing; the last: {last}. The live version stays. "
        "`draftsmith drafts train` starts another, promoting a version also ends this, and so does a day"
    )


def nothing_pays_sentence(refused: int, live: int | None, missing: int | None) -> str:
    """Say that trainings bring nothing on this traffic, and when the next one comes; `missing` None: when asked for."""
    following = "when a person asks for it" if missing is None else f"with drift, or after {missing:,} more requests"
    return (
        f"nothing pays at present: none of the last {refused} trainings made a version certain to be better than "
        f"v{live}, which stays; the next comes {following}"
    )
