"""One description of every setting, read from the environment (`DRAFTSMITH_SECTION__FIELD`).

Command-line flags override what differs from launch to launch; everything else has a default that
works on a laptop.  `REDIS_URL` and `DATABASE_URL` are honoured under their usual names.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from pydantic import AliasChoices, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as EnvironmentUnreadable

from adapter.contracts import SettingsError
from adapter.sections import ApiSettings, DistillSettings, EngineSettings, LogSettings, MonitorSettings, Section
from adapter.streams import check_url

DEFAULT_TARGET = "smollm2-135m-instruct"
_SOCKET_PATH_LIMIT = 90  # the kernel allows 107 bytes; leave room for the file name


class Settings(BaseSettings):
    """All settings of one deployment."""

    model_config = SettingsConfigDict(
        env_prefix="DRAFTSMITH_", env_nested_delimiter="__", extra="forbid", frozen=True, populate_by_name=True
    )

    data_dir: Path = Field(
        default_factory=lambda: Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local/share")) / "draftsmith",
        description="database, artifacts, logs and sockets",
    )
    cache_dir: Path = Field(
        default_factory=lambda: Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "draftsmith",
        description="converted models, timings and unfinished bootstraps; all can be made again",
    )
    target: str = Field(DEFAULT_TARGET, description="target model: a Hugging Face name, a path, or the default")
    draft: str = Field("auto", description="draft model: a name or path, `auto` for the shipped one, `none`")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="weights and arithmetic of the target; the draft takes what is fastest"
    )
    host: str = Field("127.0.0.1", description="address the API listens on")
    dashboard_host: str = Field(
        "127.0.0.1", description="address the dashboard listens on, whatever `host` is: it promotes and rolls back "
        "and asks for no login"
    )  # fmt: skip
    port: int = Field(8000, ge=0, le=65535, description="port of the API")
    dashboard_port: int = Field(8080, ge=0, le=65535, description="port of the dashboard")
    redis_url: str | None = Field(
        None, validation_alias=AliasChoices("redis_url", "REDIS_URL"), description="unset: the bundled Valkey"
    )
    database_url: str | None = Field(
        None, validation_alias=AliasChoices("database_url", "DATABASE_URL"), description="unset: SQLite"
    )
    engine: EngineSettings = EngineSettings()
    api: ApiSettings = ApiSettings()
    log: LogSettings = LogSettings()
    distill: DistillSettings = DistillSettings()
    monitors: MonitorSettings = MonitorSettings()

    @property
    def database(self) -> str:
        """SQLAlchemy URL of the database in force."""
        return self.database_url or f"sqlite:///{self.data_dir / 'draftsmith.db'}"

    @property
    def redis(self) -> str:
        """URL of the Redis or Valkey in force, in redis-py's form."""
        return self.redis_url or f"unix://{quote(str(self.redis_socket))}"

    @property
    def redis_socket(self) -> Path:
        """Where the bundled Valkey listens; in a URL, `#`, `?` and `%` of a folder's name would mean something else."""
        return self.run_dir / "valkey.sock"

    @property
    def broker(self) -> str:
        """The same server in Celery's form."""
        return self.redis.replace("unix://", "redis+socket://", 1)

    @property
    def artifacts_dir(self) -> Path:
        """Where draft artifacts live, one folder a content hash."""
        return self.data_dir / "artifacts"

    @property
    def vocabularies_dir(self) -> Path:
        """Where trimmed draft vocabularies and the token counts they are chosen from live."""
        return self.data_dir / "vocabularies"

    @property
    def pair_dir(self) -> Path:
        """Where what a draft borrows of its target is kept for the trainer."""
        return self.data_dir / "pair"

    @property
    def replay_dir(self) -> Path:
        """Where the trainer keeps the blocks it may train on again."""
        return self.data_dir / "replay"

    @property
    def logs_dir(self) -> Path:
        """Where the processes of `draftsmith up` write their logs."""
        return self.data_dir / "logs"

    @property
    def run_dir(self) -> Path:
        """Sockets, locks and the role table; a short path beside /tmp where `data_dir` is too long."""
        inside = self.data_dir.resolve() / "run"
        if len(str(inside)) <= _SOCKET_PATH_LIMIT:
            return inside
        digest = hashlib.sha256(str(inside).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"draftsmith-{os.getuid()}-{digest}"


def load_settings(**overrides: object) -> Settings:
    """Read the environment, apply `overrides` that are not None, and check everything.

    Raises:
        SettingsError: one line a problem, each with the name, the value and what is valid.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    if unknown := _unknown_names():
        raise SettingsError("settings that do not exist:\n  " + "\n  ".join(unknown))
    try:
        settings = Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        flags: dict[tuple[int | str, ...], str] = {(name,): f"--{name.replace('_', '-')}" for name in given}
        lines = [
            f"{flags.get(problem['loc']) or '.'.join(map(str, problem['loc']))} = {problem.get('input')!r}: "
            + problem["msg"].replace("Input should be", "expected", 1)
            for problem in error.errors()
        ]
        raise SettingsError("settings that cannot work:\n  " + "\n  ".join(lines)) from None
    except EnvironmentUnreadable as error:  # its cause says what is wrong, and never which variable
        raise SettingsError(
            f"settings that cannot work:\n  {error}: {error.__cause__}; lists and whole sections are written as JSON, "
            """like DRAFTSMITH_API__KEYS='["first-key", "second-key"]'"""
        ) from None
    if settings.redis_url:
        check_url(settings.redis_url)
    return settings


def _unknown_names() -> list[str]:
    """Say which DRAFTSMITH_ variables would be ignored, and what was probably meant."""
    plain = {"redis_url", "database_url"}
    known = set(Settings.model_fields) - plain
    for section, description in Settings.model_fields.items():
        if isinstance(description.default, Section):
            known |= {f"{section}__{field}" for field in type(description.default).model_fields}
    lines = []
    for name in sorted(os.environ):
        field = name.removeprefix("DRAFTSMITH_").lower()
        if not name.startswith("DRAFTSMITH_") or field in known:
            continue
        guess = [field] if field in plain else [f"DRAFTSMITH_{near}" for near in get_close_matches(field, known, 1)]
        lines.append(name + "".join(f"; did you mean {near.upper()}?" for near in guess))
    return lines


def child_environment(settings: Settings) -> dict[str, str]:
    """Return the environment that makes a child process read exactly these settings."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("DRAFTSMITH_")}
    for name, value in settings.model_dump(mode="json").items():
        if isinstance(value, dict):
            env[f"DRAFTSMITH_{name.upper()}"] = _json(value)
        elif value is not None:
            env[f"DRAFTSMITH_{name.upper()}"] = str(value)
    if settings.redis_url:
        env["REDIS_URL"] = settings.redis_url
    if settings.database_url:
        env["DATABASE_URL"] = settings.database_url
    for name in ("DRAFTSMITH_REDIS_URL", "DRAFTSMITH_DATABASE_URL"):
        env.pop(name, None)
    return env


def _json(value: object) -> str:
    return json.dumps(value)
