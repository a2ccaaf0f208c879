"""PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Executable, Table, func, literal, select
from sqlalchemy.dialects.postgresql import insert

from celery_outbox.storage.dialects.base import Dialect
from celery_outbox.storage.tables import UTCDateTime

__all__ = ["PostgreSQL"]


class PostgreSQL(Dialect):
    """PostgreSQL 12 and later, by psycopg 3."""

    name = "postgresql"

    def now(self) -> ColumnElement[datetime]:
        # Not clock_timestamp(): it is volatile, and no index is searched by it.
        return func.now(type_=UTCDateTime)

    def after(self, seconds: ColumnElement[float] | float) -> ColumnElement[datetime]:
        # make_interval(years, months, weeks, days, hours, mins, secs)
        return func.now(type_=UTCDateTime) + func.make_interval(0, 0, 0, 0, 0, 0, seconds)

    def receive(self, inbox: Table, values: Mapping[str, Any], lock: int) -> Executable:
        # ON CONFLICT alone would wait for a concurrent first execution to end, and hold a worker's
        # slot as long; the advisory lock ends with the transaction that took it, and never waits.
        row = select(
            *(
                value.label(name)
                if isinstance(value, ColumnElement)
                else literal(value, inbox.c[name].type).label(name)
                for name, value in values.items()
            )
        ).where(func.pg_try_advisory_xact_lock(lock))
        return (
            insert(inbox)
            .from_select(list(values), row)
            .on_conflict_do_nothing()
            .returning(inbox.c.key)
        )
