"""Microsoft SQL Server and Azure SQL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Integer,
    Row,
    Select,
    String,
    Table,
    bindparam,
    cast,
    delete,
    func,
    insert,
    literal_column,
    select,
    text,
    update,
)

from celery_outbox.errors import ConfigurationError
from celery_outbox.storage.dialects.base import CLAIMED, RECEIVED, Dialect, lock_of
from celery_outbox.storage.low_water import Mark
from celery_outbox.storage.tables import UTCDateTime

__all__ = ["SQLServer"]

#: READCOMMITTEDLOCK: without it READPAST is refused in a database with row versions.
_SKIP_LOCKED = "WITH (UPDLOCK, ROWLOCK, READPAST, READCOMMITTEDLOCK)"
_LOCK = "WITH (UPDLOCK, ROWLOCK, READCOMMITTEDLOCK)"
#: Each key is looked up: a scan would wait for rows that others have inserted and not committed.
_BY_KEY = "WITH (ROWLOCK, FORCESEEK)"

#: A lock by name that ends with the transaction: 0 or more is granted, less is not.
_GET_LOCK = text(
    "DECLARE @granted INT; "
    "EXEC @granted = sp_getapplock @Resource = :name, @LockMode = 'Exclusive', "
    "@LockOwner = 'Transaction', @LockTimeout = :wait; "
    "SELECT @granted AS granted"
).columns(granted=Integer)
_AT_ONCE, _FOR_EVER = 0, -1

_HAS_VERSIONS = text(
    "SELECT is_read_committed_snapshot_on AS found FROM sys.databases WHERE database_id = DB_ID()"
).columns(found=Boolean)


class SQLServer(Dialect):
    """SQL Server 2016 and later, Azure SQL; by pyodbc.

    The database keeps row versions (READ_COMMITTED_SNAPSHOT, as Azure SQL does by default), so that
    readers and writers do not wait for each other.
    """

    name = "mssql"

    def now(self) -> ColumnElement[datetime]:
        return func.sysutcdatetime(type_=UTCDateTime)

    def after(self, seconds: ColumnElement[float] | float) -> ColumnElement[datetime]:
        # DATEADD counts in whole numbers of 32 bits.
        whole = cast(func.floor(seconds), Integer)
        micros = cast((seconds - func.floor(seconds)) * literal_column("1000000"), Integer)
        unit: Any = literal_column
        soon = func.dateadd(unit("MICROSECOND"), micros, self.now())
        return func.dateadd(unit("SECOND"), whole, soon, type_=UTCDateTime)

    def skip_locked(self, rows: Select[Any]) -> Select[Any]:
        return rows.with_hint(rows.get_final_froms()[0], _SKIP_LOCKED)

    def lock(self, rows: Select[Any]) -> Select[Any]:
        return rows.with_hint(rows.get_final_froms()[0], _LOCK)

    def among(self, column: ColumnElement[Any], keys: Sequence[Any]) -> ColumnElement[bool]:
        # One parameter: a statement takes no more than 2,100.
        listed = func.openjson(bindparam(None, json.dumps(list(keys)), type_=String))
        values = listed.table_valued("value")
        return column.in_(select(cast(values.c.value, column.type)))

    def delete(
        self,
        connection: Connection,
        key: Column[Any],
        keys: Sequence[Any],
        *conditions: ColumnElement[bool],
    ) -> int:
        table: Any = key.table
        gone = delete(table).where(self.among(key, keys), *conditions).with_hint(_BY_KEY)
        return connection.execute(gone).rowcount

    def claim(
        self,
        connection: Connection,
        outbox: Table,
        *,
        limit: int,
        lease_seconds: float,
        token: str,
        start: Mark | None = None,
    ) -> Sequence[Row[Any]]:
        columns = outbox.c
        taken = self._take_under_lease(outbox, lease_seconds, token)
        rows: list[Row[Any]] = []
        # Found first: whoever passes over a locked row would take the next one for the first.
        if ids := connection.execute(self._ordered(outbox, limit)).scalars().all():
            in_order = taken.where(self.among(columns.id, ids), self._due(outbox))
            rows += connection.execute(in_order).all()
        if left := limit - len(rows):
            others = self.unordered(outbox, left)
            rows += connection.execute(taken.where(columns.id.in_(others))).all()
        return rows

    def claim_freshest(
        self,
        connection: Connection,
        outbox: Table,
        *,
        limit: int,
        lease_seconds: float,
        token: str,
    ) -> Sequence[Row[Any]]:
        columns = outbox.c
        newest = (columns.available_at.desc(), columns.id.desc())
        freshest = self.unordered(outbox, limit).order_by(None).order_by(*newest)
        taken = self._take_under_lease(outbox, lease_seconds, token)
        return connection.execute(taken.where(columns.id.in_(freshest))).all()

    def _take_under_lease(self, outbox: Table, lease_seconds: float, token: str) -> Any:
        columns = outbox.c
        return (
            update(outbox)
            .with_hint(_SKIP_LOCKED)
            .values(self.under_lease(outbox, lease_seconds, token))
            .returning(*(columns[name] for name in CLAIMED), self.now().label("now"))
        )

    def lock_keys(self, connection: Connection, inbox: Table, keys: Sequence[str]) -> None:
        _begin(connection, inbox)
        for number in sorted({lock_of("order", key) for key in keys}):
            _get_lock(connection, number, _FOR_EVER)

    def receive(self, inbox: Table) -> Executable:
        values: list[ColumnElement[Any]] = [
            bindparam(name, type_=inbox.c[name].type) for name in RECEIVED
        ]
        is_there = select(inbox.c.key).where(inbox.c.key == bindparam("key")).exists()
        row = select(*values, self.now()).where(~is_there)
        return insert(inbox).from_select([*RECEIVED, "handled_at"], row).returning(inbox.c.key)

    def received(
        self, connection: Connection, statement: Executable, values: Mapping[str, Any]
    ) -> bool:
        # The lock tells who executes: an INSERT alone would wait for the other one to end.
        into: Any = statement
        _begin(connection, into.table)
        if not _get_lock(connection, values["lock"], _AT_ONCE):
            return False
        values = {name: values[name] for name in RECEIVED}
        return connection.execute(statement, values).first() is not None

    def forget(self, connection: Connection, outbox: Table, key: str) -> int:
        gone = delete(outbox).where(outbox.c.key == key).with_hint(_BY_KEY)
        return connection.execute(gone).rowcount

    def check(self, engine: Engine) -> None:
        with engine.connect() as connection:
            if not connection.execute(_HAS_VERSIONS).scalar():
                raise ConfigurationError(
                    f"the database {engine.url.database!r} keeps no row versions, so that whoever "
                    "reads waits for whoever writes: "
                    "ALTER DATABASE CURRENT SET READ_COMMITTED_SNAPSHOT ON"
                )


def _begin(connection: Connection, table: Table) -> None:
    """Read something: the driver's transaction begins with the first statement that does."""
    connection.execute(select(literal_column("1")).select_from(table).limit(1)).all()


def _get_lock(connection: Connection, number: int, wait: int) -> bool:
    values = {"name": f"celery_outbox:{number}", "wait": wait}
    return int(connection.execute(_GET_LOCK, values).scalar_one()) >= 0
