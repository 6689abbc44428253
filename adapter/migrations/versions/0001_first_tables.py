"""First tables: drafts, aliases, generation, audit, jobs, alerts, windows, facts."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "drafts",
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("parent", sa.Integer),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("artifact_sha256", sa.String(64)),
        sa.Column("artifact_bytes", sa.Integer),
        sa.Column("target_fingerprint", sa.String(64), nullable=False),
        sa.Column("base_fingerprint", sa.String(64), nullable=False),
        sa.Column("trained_on", sa.JSON, nullable=False),
        sa.Column("gate", sa.JSON, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("job_id", sa.String(32)),
        sa.Column("created_at_s", sa.Float, nullable=False),
        sa.Column("created_by", sa.String(64), nullable=False),
    )
    op.create_table(
        "aliases", sa.Column("name", sa.String(16), primary_key=True), sa.Column("version", sa.Integer, nullable=False)
    )
    op.create_table(
        "generation",
        sa.Column("scope", sa.String(32), primary_key=True),
        sa.Column("value", sa.Integer, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at_s", sa.Float, nullable=False),
        sa.Column("actor", sa.String(64), nullable=False),
        sa.Column("automatic", sa.Integer, nullable=False),
        sa.Column("verb", sa.String(24), nullable=False),
        sa.Column("from_version", sa.Integer),
        sa.Column("to_version", sa.Integer),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("evidence", sa.JSON, nullable=False),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("requested_by", sa.String(64), nullable=False),
        sa.Column("created_at_s", sa.Float, nullable=False),
        sa.Column("started_at_s", sa.Float),
        sa.Column("finished_at_s", sa.Float),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("lease_until_s", sa.Float),
        sa.Column("worker", sa.String(128)),
        sa.Column("progress", sa.JSON, nullable=False),
        sa.Column("result", sa.JSON, nullable=False),
        sa.Column("error", sa.Text),
    )
    op.create_table(
        "alerts",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("rule", sa.String(48), nullable=False),
        sa.Column("key", sa.String(96), nullable=False),
        sa.Column("severity", sa.String(8), nullable=False),
        sa.Column("summary", sa.Text, nullable=False),
        sa.Column("evidence", sa.JSON, nullable=False),
        sa.Column("opened_at_s", sa.Float, nullable=False),
        sa.Column("resolved_at_s", sa.Float),
    )
    op.create_table(
        "windows",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at_s", sa.Float, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("segment", sa.String(96), nullable=False),
        sa.Column("version", sa.Integer),
        sa.Column("requests", sa.Integer, nullable=False),
        sa.Column("rounds", sa.Integer, nullable=False),
        sa.Column("drafted", sa.Integer, nullable=False),
        sa.Column("examined", sa.Integer, nullable=False),
        sa.Column("accepted", sa.Integer, nullable=False),
        sa.Column("delivered", sa.Integer, nullable=False),
        sa.Column("acceptance_sum", sa.Float, nullable=False),
        sa.Column("acceptance_sum_squares", sa.Float, nullable=False),
        sa.Column("judged_requests", sa.Integer, nullable=False),
    )
    op.create_index("windows_by_time", "windows", ["at_s"])
    op.create_table(
        "facts",
        sa.Column("name", sa.String(48), primary_key=True),
        sa.Column("value", sa.JSON, nullable=False),
        sa.Column("at_s", sa.Float, nullable=False),
    )


def downgrade() -> None:
    for table in ("facts", "windows", "alerts", "jobs", "audit", "generation", "aliases", "drafts"):
        op.drop_table(table)
