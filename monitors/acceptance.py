"""Request outcomes in, acceptance windows out.

Reads the outcome stream through a consumer group and adds every request to the open window of its
segment and version.  Entries are acknowledged after the rows they went into are committed, so a
crash repeats them and loses none.  Knows no drift, no versions' roles, no alerts; the watcher
calls it.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import redis
import structlog

from adapter import keys
from adapter.accounting import Tally, Window
from adapter.contracts import RequestOutcome, WireError
from adapter.streams import BROKEN, Entry, StreamReader
from adapter.wire import outcome_from_wire
from monitors.segments import Observation, SegmentCap

log = structlog.get_logger(__name__)

_BATCH = 500
_MAX_PENDING = 20_000  # entries held until SQL takes their rows
_REMEMBERED = 4096  # requests recognised when the publisher repeats them


@dataclass(slots=True)
class ReaderCounters:
    """What the reader saw since start."""

    outcomes: int = 0
    garbage: int = 0
    duplicates: int = 0
    redis_errors: int = 0


def observations_of(outcome: RequestOutcome) -> list[Observation]:
    """Return one observation for each version that drafted for the request."""
    return [
        Observation(segment=outcome.segment, version=item.version, value=item.counts.acceptance)
        for item in outcome.by_version
    ]


def split_delivered(outcome: RequestOutcome) -> list[int]:
    """Share the delivered tokens among the versions of `by_version`, adding up exactly.

    A version committed about rounds + accepted tokens; which of them were trimmed is not recorded.
    """
    weights = [item.counts.num_rounds + item.counts.num_accepted for item in outcome.by_version]
    total, given, seen, shares = sum(weights), 0, 0, []
    for weight in weights:
        seen += weight
        upto = outcome.delivered_tokens * seen // total if total else 0
        shares.append(upto - given)
        given = upto
    if shares:
        shares[-1] += outcome.delivered_tokens - given
    return shares


class OutcomeReader:
    """Read outcomes and add them up.

    Args:
        client: a Redis client whose calls end by themselves.
        clock: epoch seconds.
        window_s: length of a window.
        watermark: the last entry whose rows are known to be committed; re-delivered entries up to
            it are acknowledged and not counted again.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        clock: Callable[[], float],
        window_s: float,
        watermark: str = "0-0",
        consumer: str = "watcher",
    ) -> None:
        self._reader = StreamReader(client, keys.OUTCOMES, keys.WATCHER_GROUP, consumer)
        self._clock = clock
        self._window_s = window_s
        self.watermark = watermark
        self.counters = ReaderCounters()
        self.segments = SegmentCap()
        self.connected: bool | None = None  # None until the first call
        self._opened_at_s = clock()
        self._rows: dict[tuple[str, int | None], Tally] = {}
        self._pending: list[Entry] = []
        self._to_ack: list[Entry] = []
        self._seen: OrderedDict[tuple[str, float], None] = OrderedDict()
        self._recovering = True

    def poll(self) -> list[RequestOutcome]:
        """Return new outcomes, already added to the open window; empty while Redis is unreachable."""
        fresh: list[RequestOutcome] = []
        try:
            self._send_acks()
            while len(self._pending) < _MAX_PENDING:
                entries = self._next()
                fresh += [outcome for entry in entries if (outcome := self._take(entry)) is not None]
                if len(entries) < _BATCH or self._recovering:
                    break
            self._note(None)
        except BROKEN as error:
            self._note(error)
        return fresh

    def due(self) -> bool:
        """Tell whether the open window should be closed."""
        return self._recovering or abs(self._clock() - self._opened_at_s) >= self._window_s

    def close_window(self) -> list[Window]:
        """Return the rows of the open window; call `committed` once they are stored."""
        now = self._clock()
        seconds = max(0.0, now - self._opened_at_s)
        return [
            Window(
                at_s=now,
                seconds=seconds,
                segment=segment,
                version=version,
                **{name: getattr(row, name) for name in Tally.__struct_fields__},
            )
            for (segment, version), row in self._rows.items()
        ]

    def last_entry(self) -> str:
        """Return the newest entry in the open window, to be stored beside its rows as the watermark."""
        return max([self.watermark, *(entry.entry_id for entry in self._pending)], key=_order)

    def committed(self) -> None:
        """Start a new window and acknowledge the entries of the stored one, now or when Redis is back."""
        self.watermark = self.last_entry()
        self._to_ack = (self._to_ack + self._pending)[-_MAX_PENDING:]
        self._pending, self._rows = [], {}
        self._opened_at_s = self._clock()
        try:
            self._send_acks()
        except BROKEN as error:
            self._note(error)

    def _next(self) -> list[Entry]:
        if not self._recovering:
            return self._reader.read(_BATCH)
        if self._pending:
            return []  # the claimed ones come first; the next poll after their commit goes on
        claimed = self._reader.claim(0, _BATCH)
        if not claimed:
            self._recovering = False
            return self._reader.read(_BATCH)
        done = [entry for entry in claimed if _order(entry.entry_id) <= _order(self.watermark)]
        self._reader.ack(done)
        return [entry for entry in claimed if _order(entry.entry_id) > _order(self.watermark)]

    def _take(self, entry: Entry) -> RequestOutcome | None:
        self._pending.append(entry)
        try:
            outcome = outcome_from_wire(entry.payload)
        except WireError as error:
            self.counters.garbage += 1
            log.warning("outcome_unreadable", entry=entry.entry_id, error=str(error))
            return None
        name = (outcome.request_id, outcome.finished_at_s)
        if name in self._seen:
            self.counters.duplicates += 1
            return None
        self._seen[name] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        self.counters.outcomes += 1
        outcome = dataclasses.replace(outcome, segment=self.segments.name(outcome.segment, self._clock()))
        self._add(outcome)
        return outcome

    def _add(self, outcome: RequestOutcome) -> None:
        if not outcome.by_version:
            row = self._rows.setdefault((outcome.segment, None), Tally())
            row.requests += 1
            row.rounds += outcome.plain_rounds
            row.delivered += outcome.delivered_tokens
            return
        # A request that spanned a swap is one request: it counts where most of its rounds ran.
        owner = max(outcome.by_version, key=lambda item: item.counts.num_rounds)
        for item, delivered in zip(outcome.by_version, split_delivered(outcome), strict=True):
            row = self._rows.setdefault((outcome.segment, item.version), Tally())
            row.requests += item is owner
            row.rounds += item.counts.num_rounds
            row.drafted += item.counts.num_drafted
            row.examined += item.counts.num_examined
            row.accepted += item.counts.num_accepted
            row.delivered += delivered
            value = item.counts.acceptance
            if value is not None:
                row.acceptance_sum += value
                row.acceptance_sum_squares += value * value
                row.judged_requests += 1

    def _send_acks(self) -> None:
        while self._to_ack:
            self._reader.ack(self._to_ack[:_BATCH])
            del self._to_ack[:_BATCH]

    def _note(self, error: Exception | None) -> None:
        if error is not None:
            self.counters.redis_errors += 1
        connected = error is None
        if connected != self.connected:
            if connected:
                log.info("outcomes_connected")
            else:
                log.warning("outcomes_disconnected", error=str(error))
        self.connected = connected


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)
