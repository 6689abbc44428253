"""One arm of a scenario: a fresh service in a folder of its own, the schedule sent to it, and what became of it.

Arms differ by settings alone, so that requests, their seeds and their times are the same.  The draft of the
`oracle` is trained here as well: B's learning prompts served generously, one long training asked for as an
operator would, its version promoted, and the folder copied for every arm that begins with it.  Called by
`bench.shift`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from adapter.contracts import DraftsmithError, SettingsError
from adapter.jobs import OPEN_STATES, Job
from adapter.settings import Settings
from bench.shift_client import Client, Seen, Wire
from bench.shift_marks import Marks, read_marks
from bench.shift_schedule import USUAL, Arrival, Heat
from serving.demo.service import Service

ARMS = ("none", "static", "adaptive", "suffix", "oracle")
Say = Callable[[str], None]

_START_S = 600.0
_LOOK_S = 0.25
_TOLD_EVERY_S = 15.0
_ACTOR = "bench.shift"
_SPARE = 10  # requests beyond those a training needs
_SHORT_LIVED = ("run", "logs")  # sockets, locks and words of processes that have ended


class ArmFailed(DraftsmithError):
    """Raised when an arm cannot be measured; the message is one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """What all arms share: settings before an arm changes them, and how requests are spelled."""

    settings: Settings
    max_tokens: int
    chat: bool = True
    heat: Heat = USUAL
    oracle_requests: int = 300
    oracle_clients: int = 4
    oracle_seconds: float = 480.0  # for its requests, and again for the steps of its training, at the most


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What became of an arm.  `url` is gone by now; `settings` are those it ran with."""

    arm: str
    seen: list[Seen]
    marks: Marks
    seconds: float


def arm_settings(base: Settings, arm: str, folder: Path) -> Settings:
    """Return the settings of an arm in a data folder.

    Raises:
        SettingsError: there is no such arm.
    """
    if arm not in ARMS:
        raise SettingsError(f"there is no arm {arm!r}; there are {', '.join(ARMS)}")
    update: dict[str, Any] = {
        "data_dir": folder, "port": 0, "dashboard_port": 0, "redis_url": None, "database_url": None
    }  # fmt: skip
    if arm != "adaptive":
        kept = {"guard_margin": 1.0} if arm == "oracle" else {}  # its draft stays, however bad it is on A
        update["monitors"] = base.monitors.model_copy(update={"adapt": False, **kept})
    if arm == "suffix":
        update["engine"] = base.engine.model_copy(update={"proposers": ("past", "ngram")})
    return base.model_copy(update=update)


def oracle_settings(base: Settings, folder: Path, seconds: float) -> Settings:
    """Return settings under which a draft is trained at leisure: longer, by all cores, nothing promoted by itself.

    Args:
        seconds: a limit to the time spent on training steps.
    """
    distill = base.distill
    longer = {
        "epochs": 2 * distill.epochs, "max_seconds": min(seconds, 2 * distill.max_seconds), "nice": 0,
        "threads": max(1, os.cpu_count() or 1),
    }  # fmt: skip
    settings = arm_settings(base, "oracle", folder)
    quiet = settings.monitors.model_copy(update={"auto_promote": False})
    return settings.model_copy(update={"distill": distill.model_copy(update=longer), "monitors": quiet})


def fresh_folder(folder: Path, begin: Path | None) -> None:
    """Make a data folder, empty or a copy of one that no process uses."""
    shutil.rmtree(folder, ignore_errors=True)
    if begin is None:
        folder.mkdir(parents=True)
    else:
        shutil.copytree(begin, folder, ignore=lambda at, names: _SHORT_LIVED if Path(at) == begin else ())


@contextmanager
def serving(settings: Settings) -> Iterator[Service]:
    """Run a service until the block ends; inside it, it answers.

    Raises:
        ArmFailed: it does not start.
    """
    service = Service(settings)
    try:
        service.start()
        _until(service, lambda: service.url and service.pair and _ready(service.url), _START_S, "did not start")
        yield service
    finally:
        service.stop()


def run_arm(
    arm: str,
    arrivals: list[Arrival],
    rig: Rig,
    folder: Path,
    say: Say,
    *,
    begin: Path | None = None,
    trainings: int = 0,
) -> Run:
    """Play a schedule against an arm.

    Args:
        begin: a data folder to begin with a copy of.
        trainings: how many to ask for, one after another, as soon as there is enough new to train on.

    Raises:
        ArmFailed: the service does not start, or ends before the schedule does.
    """
    fresh_folder(folder, begin)
    settings = arm_settings(rig.settings, arm, folder)
    with serving(settings) as service:
        starts_with = service.live
        client = Client(str(service.url), _wire(service, rig, speculate=arm != "none"))
        asker = _Asker(service, trainings, settings.distill.min_requests)
        began_s = time.time()
        asyncio.run(_play(service, client, arrivals, asker, say))
        seconds = round(client.now_s, 2)
        marks = read_marks(service, settings, began_s, seconds, starts_with)
    return Run(arm=arm, seen=sorted(client.seen, key=lambda seen: seen.arrival.index), marks=marks, seconds=seconds)


def prepare(arrivals: list[Arrival], rig: Rig, folder: Path, say: Say, *, train: bool) -> tuple[float, Job | None]:
    """Serve requests as fast as they go; return requests a second, and the training on them where one is wanted.

    With a training, the folder is left with its version live.

    Raises:
        ArmFailed: requests failed, or no version came of the training that passed its gate.
    """
    fresh_folder(folder, None)
    settings = oracle_settings(rig.settings, folder, rig.oracle_seconds)
    with serving(settings) as service:
        client = Client(str(service.url), _wire(service, rig))
        least = settings.distill.min_requests + _SPARE if train else 0
        asyncio.run(_crowd(client, arrivals, rig, least))
        bad = next((seen.error for seen in client.seen if not seen.ok), None)
        if bad is not None:
            raise ArmFailed(f"a request failed before anything was measured: {bad}")
        pace = len(client.seen) / client.now_s
        say(f"{len(client.seen)} requests, {pace:.2f} a second with {rig.oracle_clients} clients")
        return pace, _train(service, say) if train else None


def _train(service: Service, say: Say) -> Job:
    settings = service.settings
    job = service.jobs.request(reason="a draft for the oracle", requested_by=_ACTOR)
    if job is None:
        raise ArmFailed("another training runs already; is monitors.adapt off?")
    say("training the oracle's draft")
    limit = 2 * settings.distill.max_seconds + 180
    _until(service, lambda: service.jobs.get(job.id).state not in OPEN_STATES, limit, "did not end its training")
    done = service.jobs.get(job.id)
    if done.state != "done" or done.result.get("state") != "ready":
        raise ArmFailed(
            f"the oracle's training gave no draft: {done.error or done.result.get('verdict') or done.state}"
        )
    version = int(done.result["version"])
    if service.live != version:
        service.registry.promote(version, actor=_ACTOR, reason="the oracle's draft")
    say(f"the oracle's draft, version {version}: {done.result.get('verdict')}")
    return done


class _Asker:
    """Asks for trainings, each when enough ordinary requests have ended since the last."""

    def __init__(self, service: Service, trainings: int, every: int) -> None:
        self._service, self._left, self._every = service, trainings, every
        self._trained_at = 0

    def look(self, seen: list[Seen]) -> None:
        ended = sum(item.ok and not item.arrival.measuring for item in seen)
        due = self._left and ended - self._trained_at >= self._every
        if due and self._service.jobs.request(reason="the next cycle", requested_by=_ACTOR) is not None:
            self._left -= 1
            self._trained_at = ended


async def _play(service: Service, client: Client, arrivals: list[Arrival], asker: _Asker, say: Say) -> None:
    told = 0.0

    def tell() -> None:
        nonlocal told
        if service.error is not None:
            raise ArmFailed(service.error)
        asker.look(client.seen)
        if client.now_s - told >= _TOLD_EVERY_S:
            told = client.now_s
            ended = sum(seen.finished_s > 0 for seen in client.seen)
            say(f"{told:4.0f} s: {len(client.seen)} of {len(arrivals)} requests sent, {ended} ended; "
                f"version {service.live}; {service.loop_sentence()}")  # fmt: skip

    try:
        await client.play(arrivals, tell)
    finally:
        await client.close()


async def _crowd(client: Client, arrivals: list[Arrival], rig: Rig, least: int) -> None:
    try:
        await client.crowd(arrivals, rig.oracle_clients, least=least, seconds=rig.oracle_seconds)
    finally:
        await client.close()


def _wire(service: Service, rig: Rig, *, speculate: bool = True) -> Wire:
    pair = service.pair
    assert pair is not None
    name = service.settings.api.served_model_name or pair.target_name
    return Wire(model=name, max_tokens=rig.max_tokens, chat=rig.chat, speculate=speculate)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", trust_env=False, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _until(service: Service, condition: Callable[[], object], limit_s: float, failure: str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if service.error is not None:
            raise ArmFailed(service.error)
        if time.monotonic() > deadline:
            raise ArmFailed(f"the service {failure} within {limit_s:.0f} s; {service.loop_sentence()}")
        time.sleep(_LOOK_S)
