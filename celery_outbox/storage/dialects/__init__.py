"""The databases: a dialect is a list of differences."""

from __future__ import annotations

from celery_outbox.errors import ConfigurationError
from celery_outbox.storage.dialects.base import Dialect
from celery_outbox.storage.dialects.mssql import SQLServer
from celery_outbox.storage.dialects.mysql import MariaDB, MySQL
from celery_outbox.storage.dialects.postgresql import PostgreSQL
from celery_outbox.storage.dialects.sqlite import SQLite

__all__ = ["DIALECTS", "Dialect", "dialect_for"]

DIALECTS: dict[str, type[Dialect]] = {
    dialect.name: dialect for dialect in (PostgreSQL, MySQL, MariaDB, SQLServer, SQLite)
}


def dialect_for(name: str) -> Dialect:
    """Return the dialect for SQLAlchemy's name of a database."""
    try:
        return DIALECTS[name]()
    except KeyError:
        known = ", ".join(sorted(DIALECTS))
        raise ConfigurationError(
            f"the outbox can't be kept in a {name!r} database: it speaks {known}"
        ) from None
