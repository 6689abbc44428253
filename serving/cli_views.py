"""What the command line prints while it supervises, and for `draftsmith status`."""

from __future__ import annotations

import json
import signal
import time
import urllib.error
import urllib.request
from typing import Any

import structlog
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from adapter.addresses import bind
from adapter.contracts import SettingsError
from adapter.database import migrate, open_database
from adapter.facts import SERVING, WATCHER, Facts
from adapter.logs import configure_logging
from adapter.settings import Settings
from adapter.streams import BROKEN, connect
from serving.cli_common import open_deployment
from serving.roles import roles_for
from serving.status import collect_status
from serving.supervisor import Supervisor, check_free

log = structlog.get_logger(__name__)
console = Console()
_LOOK_EVERY_S = 0.5


def supervise(settings: Settings, names: list[str]) -> None:
    """Run roles until Ctrl-C; say so when the service is ready.

    Raises:
        SettingsError: a port cannot be had; nothing was started and no folder made.
        DataDirInUse: another supervisor has the data folder.
    """
    configure_logging()
    _look_around(settings, with_dashboard="watcher" in names)
    supervisor = Supervisor(settings, roles_for(settings, names))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: supervisor.stop())
    supervisor.start()
    words = f"starting {', '.join(names)} in {settings.data_dir} (logs in {settings.logs_dir})"
    console.print(escape(words), highlight=False, soft_wrap=True)
    announcement = _Announcement(settings, with_dashboard="watcher" in names)
    supervisor.run(on_tick=announcement.look)
    console.print("stopped")


def _look_around(settings: Settings, with_dashboard: bool) -> None:
    """Find out now what the roles would find out one by one."""
    check_free(settings)
    if with_dashboard and settings.port and settings.port == settings.dashboard_port:
        raise SettingsError(
            f"port and dashboard_port are both {settings.port}; choose another with --port or --dashboard-port"
        )
    if settings.redis_url:
        _ask_redis(settings.redis, settings.log.timeout_s)
    bind(settings.host, settings.port, setting="port").close()
    if with_dashboard:
        bind(settings.dashboard_host, settings.dashboard_port, setting="dashboard_port").close()


def _ask_redis(url: str, timeout_s: float) -> None:
    client = connect(url, timeout_s)
    try:
        client.ping()
    except BROKEN as error:  # it may come later, and answers never wait for it
        log.warning("redis_away", error=str(error), until_it_comes="nothing is logged, so nothing is learned")
    finally:
        client.close()


class _Announcement:
    """Print the URLs once, when the API can serve."""

    def __init__(self, settings: Settings, with_dashboard: bool) -> None:
        self._settings = settings
        self._with_dashboard = with_dashboard
        self._since_s = time.time()
        self._next_s = 0.0
        self._done = False
        self._said_away = False
        self._facts: Facts | None = None

    def look(self) -> None:
        """Check, at most a couple of times a second."""
        if self._done or time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + _LOOK_EVERY_S
        try:
            if self._facts is None:
                database = open_database(self._settings.database)
                migrate(database)
                self._facts = Facts(database)
            api = (self._facts.get(SERVING) or {}).get("url")
            dashboard = (self._facts.get(WATCHER) or {}).get("dashboard_url")
        except SQLAlchemyError as error:  # the roles go on without the database; so does their supervisor
            if not self._said_away:
                log.warning("database_away", error=str(error))
            self._said_away = True
            return
        if not api or not _answers(f"{api}/ready"):
            return
        if self._with_dashboard and not (dashboard and _answers(f"{dashboard}/health")):
            return
        self._done = True
        seconds = time.time() - self._since_s
        console.print(f"[bold green]ready[/] after {seconds:.0f} s", highlight=False)
        console.print(f"  API        {api}/v1", highlight=False)
        if self._with_dashboard:
            console.print(f"  dashboard  {dashboard}", highlight=False)
        words = f"draftsmith status --data-dir {self._settings.data_dir}"
        console.print(escape(words), highlight=False, soft_wrap=True)
        console.print("Ctrl-C stops everything.")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def show_status(settings: Settings, as_json: bool) -> None:
    """Print the status of a deployment.

    Raises:
        SettingsError: the folder holds no deployment.
    """
    status = collect_status(settings, open_deployment(settings))
    status["ready"] = _runs(status, "api") and _answers(f"{status['api_url']}/ready")
    if as_json:
        typer.echo(json.dumps(status, indent=2))
        return
    _print_status(status)


def _print_status(status: dict[str, Any]) -> None:
    acceptance = status["acceptance"]
    lines = Table.grid(padding=(0, 2))
    lines.add_row("target", escape(f"{status['target']} ({status['dtype']})"))
    lines.add_row("live draft", f"version {status['live']}, generation {status['generation']}")
    lines.add_row("previous", "–" if status["previous"] is None else f"version {status['previous']}")
    if status["alternates"]:
        words = ", ".join(f"version {number}" for number in status["alternates"])
        lines.add_row("alternates", f"{words}: draft for requests they fit better")
    if acceptance["value"] is None:
        lines.add_row("acceptance", f"version {status['live']} drafted for no request in the last five minutes")
    else:
        low, high = acceptance["interval"]
        lines.add_row(
            "acceptance",
            f"{acceptance['value']:.3f} [{low:.3f}, {high:.3f}] over the {acceptance['n']} requests it drafted for in "
            f"the last five minutes, {acceptance['tokens_per_round']:.2f} tokens per round",
        )
    job = status["job"]
    if job is not None:
        lines.add_row("newest training", escape(f"{job['state']}: {job['error'] or job['reason']}"))
    if status["log"] is not None:
        lines.add_row("log", _log_words(status["log"]))
    lines.add_row("alerts", escape("; ".join(alert["summary"] for alert in status["alerts"])) or "none firing")
    not_ready = "" if status["ready"] else " [yellow]serves nothing yet: /ready says why[/]"
    for label, role, url, remark in (
        ("API", "api", status["api_url"], not_ready), ("dashboard", "watcher", status["dashboard_url"], ""),
    ):  # fmt: skip
        lines.add_row(label, f"{url}{remark}" if _runs(status, role) and url else "not running here")
    console.print(lines, highlight=False)
    roles = Table("process", "state", "pid", "restarts", box=None, header_style="bold")
    for name, role in status["roles"].items():
        roles.add_row(name, role["state"], str(role["pid"] or "–"), str(role["restarts"]))
    console.print(roles if status["roles"] else "no processes run here", highlight=False)


def _runs(status: dict[str, Any], role: str) -> bool:
    return status["roles"].get(role, {}).get("pid") is not None


def _log_words(said: dict[str, Any]) -> str:
    """Say whether blocks and outcomes reach Redis, in words."""
    if said["connected"]:
        return f"{said['written']} entries written, {said['dropped']} dropped"
    if not said["written"] and not said["dropped"]:
        return "nothing written yet: the first finished request is the first entry"
    return f"[yellow]nothing is written: Redis is gone or full[/]; {said['dropped']} entries dropped"
