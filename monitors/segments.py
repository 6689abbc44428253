"""What is known about each segment under each draft version: its detector and its latest requests.

Pure memory, no Redis and no SQL; `to_state` is what the watcher keeps in SQL.  A version that comes
back to live finds its own baseline again, so a roll back does not forget that the traffic drifted.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

from adapter.sections import MonitorSettings
from monitors.drift import DriftDetector, alarm_threshold
from monitors.tails import Tails

MAX_SEGMENTS = 64
OTHER = "other"  # segments beyond the limit are judged together
_IDLE_S = 86400.0
_TESTS = 3  # a segment: of the mean and of both tails; they share the promised rate of false alarms
_VERSIONS_KEPT = 4
_RECENT = 200  # requests a segment keeps for the guard to compare with


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """One request under one version. `value` is accepted / examined, None when nothing was examined."""

    segment: str
    version: int
    value: float | None


class SegmentCap:
    """The segments that are told apart, `MAX_SEGMENTS` of them; one that was idle for a day makes room.

    Names come from a request's header, so without a cap anybody could grow tables and charts without bound.
    """

    def __init__(self) -> None:
        self._seen_s: dict[str, float] = {}  # least recently seen first
        self.expired: list[str] = []  # names that made room; whoever keeps something under them empties the list

    def name(self, segment: str, now_s: float) -> str:
        """Return the name a request is counted under, and remember that it came."""
        if segment == OTHER:
            return OTHER
        if segment not in self._seen_s and len(self._seen_s) >= MAX_SEGMENTS:
            oldest = next(iter(self._seen_s))
            if now_s - self._seen_s[oldest] < _IDLE_S:
                return OTHER
            del self._seen_s[oldest]
            self.expired.append(oldest)
        self._seen_s.pop(segment, None)
        self._seen_s[segment] = now_s
        return segment


class SegmentBook:
    """Detectors and recent acceptances, per version and segment."""

    def __init__(self, settings: MonitorSettings) -> None:
        self._settings = settings
        self._detectors: dict[int, dict[str, DriftDetector]] = {}
        self._tails: dict[int, dict[str, Tails]] = {}
        self._recent: dict[int, dict[str, deque[float]]] = {}

    def observe(self, observation: Observation) -> DriftDetector:
        """Feed one request of the live version and return its detector, freshly updated."""
        detectors = self._of(observation.version)
        name = _name(detectors, observation.segment)
        tails = self._tails[observation.version]
        if name not in detectors:
            detectors[name] = self._new()
        if name not in tails:
            tails[name] = Tails(self._settings.baseline_requests)
            self._set_thresholds(observation.version)
        detector = detectors[name].update(observation.value)
        tails[name].update(observation.value)
        recent = self._recent[observation.version].setdefault(name, deque(maxlen=_RECENT))
        if observation.value is not None:
            recent.append(observation.value)
        if detector.drift_detected:  # a new version must be compared with the traffic it was made for
            for _ in range(len(recent) - max(1, detector.since)):
                recent.popleft()
        return detector

    def detectors(self, version: int) -> dict[str, DriftDetector]:
        """Return the detectors of a version; empty when it was never live."""
        return self._detectors.get(version, {})

    def tails(self, version: int) -> dict[str, Tails]:
        """Return the tests of both ends of each segment of a version."""
        return self._tails.get(version, {})

    def drifting(self, version: int) -> dict[str, DriftDetector]:
        """Return the segments of a version that are below their baseline."""
        return {name: item for name, item in self.detectors(version).items() if item.drifting}

    def look_again(self, version: int) -> None:
        """End every drift of a version that serves again: what it was about may be over."""
        for detector in self.detectors(version).values():
            detector.look_again()

    def recent(self, version: int) -> dict[str, list[float]]:
        """Return the latest per-request acceptances of a version, newest last; after a drift, only those since."""
        return {name: list(values) for name, values in self._recent.get(version, {}).items()}

    def segment_name(self, version: int, segment: str) -> str:
        """Return the name a segment is judged under."""
        return _name(self.detectors(version), segment)

    def forget(self, segment: str) -> None:
        """Drop what is known about a segment, under every version."""
        for version, detectors in self._detectors.items():
            self._tails[version].pop(segment, None)
            if detectors.pop(segment, None) is not None:
                self._set_thresholds(version)
        for recent in self._recent.values():
            recent.pop(segment, None)

    def known(self) -> set[str]:
        """Return every segment something is known about."""
        return {name for detectors in self._detectors.values() for name in detectors}

    def to_state(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            str(version): {
                name: {
                    "detector": detector.to_state(),
                    "tails": self._tails[version][name].to_state(),
                    "recent": [round(value, 4) for value in self._recent[version].get(name, ())],
                }
                for name, detector in detectors.items()
            }
            for version, detectors in self._detectors.items()
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `to_state` returned."""
        for version, segments in state.items():
            detectors = self._of(int(version))
            for name, item in segments.items():
                detectors[name] = DriftDetector.from_state(
                    item["detector"],
                    baseline_requests=self._settings.baseline_requests,
                    margin=self._settings.drift_margin,
                    threshold=self._threshold(len(segments)),
                )
                self._tails[int(version)][name] = Tails.from_state(
                    item.get("tails", {}),
                    baseline_requests=self._settings.baseline_requests,
                    threshold=self._threshold(len(segments)),
                )
                self._recent[int(version)][name] = deque(item["recent"], maxlen=_RECENT)

    def _of(self, version: int) -> dict[str, DriftDetector]:
        if version not in self._detectors:
            while len(self._detectors) >= _VERSIONS_KEPT:
                oldest = next(iter(self._detectors))
                del self._detectors[oldest], self._tails[oldest], self._recent[oldest]
            self._detectors[version], self._tails[version], self._recent[version] = {}, {}, {}
        else:  # dicts keep insertion order: move the live version to the young end
            self._detectors[version] = self._detectors.pop(version)
        return self._detectors[version]

    def _new(self) -> DriftDetector:
        return DriftDetector(baseline_requests=self._settings.baseline_requests, margin=self._settings.drift_margin)

    def _threshold(self, segments: int) -> float:
        return alarm_threshold(
            false_alarms_per_30_days=self._settings.drift_false_alarms_per_30_days,
            requests_per_s=self._settings.drift_expected_requests_per_s,
            segments=_TESTS * segments,
        )

    def _set_thresholds(self, version: int) -> None:
        threshold = self._threshold(max(1, len(self._detectors[version])))
        for detector in self._detectors[version].values():
            detector.threshold = threshold
        for tails in self._tails[version].values():
            tails.set_threshold(threshold)


def _name(known: dict[str, DriftDetector], segment: str) -> str:
    """Return the segment, or `OTHER` once as many as may be are known beside that one."""
    return segment if segment in known or len(known) - (OTHER in known) < MAX_SEGMENTS else OTHER
