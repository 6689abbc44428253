"""The SQL tables, as SQLAlchemy Core sees them.  Alembic migrations create exactly these."""

from __future__ import annotations

from sqlalchemy import JSON, Column, Float, Index, Integer, MetaData, String, Table, Text

metadata = MetaData()

drafts = Table(
    "drafts",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("parent", Integer),
    Column("state", String(16), nullable=False),  # ready, rejected, quarantined, retired
    Column("artifact_sha256", String(64)),  # None for version 0, the base draft
    Column("artifact_bytes", Integer),
    Column("target_fingerprint", String(64), nullable=False),
    Column("base_fingerprint", String(64), nullable=False),
    Column("trained_on", JSON, nullable=False),
    Column("gate", JSON, nullable=False),
    Column("reason", Text, nullable=False),
    Column("job_id", String(32)),
    Column("created_at_s", Float, nullable=False),
    Column("created_by", String(64), nullable=False),
)

aliases = Table(
    "aliases",
    metadata,
    Column("name", String(16), primary_key=True),  # live, previous
    Column("version", Integer, nullable=False),
)

generation = Table(
    "generation",
    metadata,
    Column("scope", String(32), primary_key=True),  # "global": drafts; "vocabulary"
    Column("value", Integer, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at_s", Float, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("automatic", Integer, nullable=False),
    Column("verb", String(24), nullable=False),
    Column("from_version", Integer),
    Column("to_version", Integer),
    Column("generation", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    Column("evidence", JSON, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("state", String(16), nullable=False),  # queued, running, done, failed, cancelled
    Column("reason", Text, nullable=False),
    Column("requested_by", String(64), nullable=False),
    Column("segments", JSON, nullable=False),  # names of those that drifted
    Column("created_at_s", Float, nullable=False),
    Column("started_at_s", Float),
    Column("finished_at_s", Float),
    Column("attempts", Integer, nullable=False, default=0),
    Column("epoch", Integer, nullable=False, default=0),  # fencing: rises with every claim
    Column("lease_until_s", Float),
    Column("worker", String(128)),
    Column("progress", JSON, nullable=False),
    Column("result", JSON, nullable=False),
    Column("error", Text),
)

alerts = Table(
    "alerts",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("rule", String(48), nullable=False),
    Column("key", String(96), nullable=False),  # de-duplication: one open alert per (rule, key)
    Column("severity", String(8), nullable=False),  # page, ticket, info
    Column("summary", Text, nullable=False),
    Column("evidence", JSON, nullable=False),
    Column("opened_at_s", Float, nullable=False),
    Column("resolved_at_s", Float),
)

windows = Table(
    "windows",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at_s", Float, nullable=False),  # end of the window
    Column("seconds", Float, nullable=False),
    Column("segment", String(96), nullable=False),
    Column("version", Integer),  # None: requests the draft model had no part in
    Column("requests", Integer, nullable=False),
    Column("rounds", Integer, nullable=False),
    Column("drafted", Integer, nullable=False),
    Column("examined", Integer, nullable=False),
    Column("accepted", Integer, nullable=False),
    Column("delivered", Integer, nullable=False),
    Column("acceptance_sum", Float, nullable=False),  # over requests that examined anything
    Column("acceptance_sum_squares", Float, nullable=False),
    Column("judged_requests", Integer, nullable=False),
    Index("windows_by_time", "at_s"),
)

vocabularies = Table(
    "vocabularies",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),  # 0, the full vocabulary, has no row
    Column("state", String(16), nullable=False),  # ready, quarantined
    Column("sha256", String(64), nullable=False),
    Column("size", Integer, nullable=False),
    Column("target_fingerprint", String(64), nullable=False),
    Column("coverage", Float),
    Column("counted", JSON, nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at_s", Float, nullable=False),
    Column("created_by", String(64), nullable=False),
)

vocabulary_aliases = Table(
    "vocabulary_aliases",
    metadata,
    Column("name", String(16), primary_key=True),  # live, previous
    Column("number", Integer, nullable=False),
)

facts = Table(
    "facts",
    metadata,
    Column("name", String(48), primary_key=True),  # one document a writer owns: pair, drift, watcher
    Column("value", JSON, nullable=False),
    Column("at_s", Float, nullable=False),
)
