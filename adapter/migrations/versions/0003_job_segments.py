"""Which segments a training job is about."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("segments", sa.JSON, nullable=False, server_default="[]"))


def downgrade() -> None:
    op.drop_column("jobs", "segments")
