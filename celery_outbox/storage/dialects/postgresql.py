"""PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    Executable,
    Table,
    any_,
    bindparam,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import insert

from celery_outbox.storage.dialects.base import RECEIVED, Dialect, lock_of
from celery_outbox.storage.tables import UTCDateTime

__all__ = ["PostgreSQL"]

#: libpq's number of a transaction in which no statement has failed.
_OPEN = 2


class PostgreSQL(Dialect):
    """PostgreSQL 12 and later, by psycopg 3."""

    name = "postgresql"

    def now(self) -> ColumnElement[datetime]:
        # Not clock_timestamp(): it is volatile, and no index is searched by it.
        return func.now(type_=UTCDateTime)

    def after(self, seconds: ColumnElement[float] | float) -> ColumnElement[datetime]:
        # make_interval(years, months, weeks, days, hours, mins, secs)
        return func.now(type_=UTCDateTime) + func.make_interval(0, 0, 0, 0, 0, 0, seconds)

    def among(self, column: ColumnElement[int], ids: Sequence[int]) -> ColumnElement[bool]:
        # One parameter, where IN has one for each: composing those costs more than the deletes.
        return column == any_(bindparam(None, list(ids), type_=ARRAY(BigInteger)))

    def lock_keys(self, connection: Connection, keys: Sequence[str]) -> None:
        # In one order, or two transactions with the same keys could wait for each other.
        locks = sorted({lock_of("order", key) for key in keys})
        lock = func.unnest(bindparam("locks", locks, type_=ARRAY(BigInteger))).column_valued("lock")
        connection.execute(select(func.pg_advisory_xact_lock(lock)))

    def receive(self, inbox: Table) -> Executable:
        # ON CONFLICT alone would wait for a concurrent first execution to end, and hold a worker's
        # slot as long; the advisory lock ends with the transaction that took it, and never waits.
        columns = inbox.c
        values = [bindparam(name, type_=columns[name].type) for name in RECEIVED]
        row = select(*values, self.now()).where(
            func.pg_try_advisory_xact_lock(bindparam("lock", type_=BigInteger))
        )
        return (
            insert(inbox)
            .from_select([*RECEIVED, "handled_at"], row)
            .on_conflict_do_nothing()
            .returning(columns.key)
        )

    def is_sound(self, connection: Connection) -> bool:
        # libpq knows from the database's last answer.
        driver: Any = connection.connection.dbapi_connection
        return connection.dialect.driver == "psycopg" and driver.info.transaction_status == _OPEN
