"""Open the SQL database, SQLite or PostgreSQL, and bring its tables up to date.

On both, writers stand in one line: a transaction that is not marked `readonly` takes one lock at its
start.  Writes are rare and short, and checks that span rows need no reasoning about isolation levels.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, make_url

_WRITERS = 0x6472616674736D69  # "draftsmi": the key of the one advisory lock in PostgreSQL
_MIGRATIONS = Path(__file__).parent / "migrations"


def open_database(url: str) -> Engine:
    """Connect lazily; SQLite gets a write-ahead log, full synchronisation and a busy time-out.

    WAL lets the engine's poll read while another process commits; synchronous=FULL is what makes
    "which draft is live" survive a power cut.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return _open_server(parsed)
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, future=True)

    @event.listens_for(engine, "connect")
    def _configure(connection, _record) -> None:  # type: ignore[no-untyped-def]
        connection.isolation_level = None  # we say BEGIN ourselves, see below
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection) -> None:  # type: ignore[no-untyped-def]
        # A deferred transaction that turns into a writer half-way fails at once when another
        # process wrote in between; taking the write lock first waits for the busy time-out.
        mode = "DEFERRED" if connection.get_execution_options().get("readonly") else "IMMEDIATE"
        connection.exec_driver_sql(f"BEGIN {mode}")

    return engine


def _open_server(url: URL) -> Engine:
    engine = create_engine(url, pool_pre_ping=True, future=True)

    @event.listens_for(engine, "begin")
    def _begin(connection) -> None:  # type: ignore[no-untyped-def]
        if not connection.get_execution_options().get("readonly"):
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITERS})")

    return engine


def migrate(engine: Engine) -> None:
    """Apply every pending migration; safe to run from several processes, one after the other."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
