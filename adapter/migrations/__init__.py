"""Alembic migrations, applied in order by `adapter.database.migrate`."""
