"""MySQL and MariaDB."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Delete,
    Engine,
    Executable,
    Insert,
    Row,
    Table,
    Text,
    bindparam,
    cast,
    delete,
    func,
    insert,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.compiler import compiles

from celery_outbox.errors import ConfigurationError
from celery_outbox.storage.dialects.base import CLAIMED, RECEIVED, Dialect, lock_of
from celery_outbox.storage.low_water import Mark
from celery_outbox.storage.tables import UTCDateTime

__all__ = ["MariaDB", "MySQL"]

_DUPLICATE, _WAITED, _DEADLOCK = 1062, 1205, 1213
#: The parameter of `_DeleteByKey`.
_KEYS = "celery_outbox_keys"
#: The versions that pass over locked rows.
_SINCE = {True: (10, 6), False: (8, 0, 1)}


class MySQL(Dialect):
    """MySQL 8.0.1 and later, MariaDB 10.6 and later; by PyMySQL, mysqlclient and others.

    Both lock the gaps between rows where a transaction is REPEATABLE READ, as it is by default, and
    the app's inserts would wait for a claim. So the outbox's own transactions are READ COMMITTED, and
    its statements in the app's transactions name rows by their primary keys.
    """

    name = "mysql"

    def now(self) -> ColumnElement[datetime]:
        # Not now(), which is in the session's time zone.
        return func.utc_timestamp(literal_column("6"), type_=UTCDateTime)

    def after(self, seconds: ColumnElement[float] | float) -> ColumnElement[datetime]:
        micros = cast(func.round(seconds * literal_column("1000000")), BigInteger)
        unit: ColumnElement[str] = literal_column("MICROSECOND")
        return func.timestampadd(unit, micros, self.now(), type_=UTCDateTime)

    @contextmanager
    def transaction(self, engine: Engine) -> Iterator[Connection]:
        with engine.begin() as connection:
            # For this one transaction.
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
            yield connection

    # A DELETE with a list of keys reads the whole table where that is cheaper, and waits for each row
    # that somebody has inserted and not committed. A join in a given order looks up each key. An UPDATE
    # does not wait for what it would not change, when it is READ COMMITTED.

    def delete(
        self,
        connection: Connection,
        key: Column[Any],
        keys: Sequence[Any],
        *conditions: ColumnElement[bool],
    ) -> int:
        gone = _DeleteByKey(key.table).where(*conditions) if conditions else _DeleteByKey(key.table)
        return connection.execute(gone, {_KEYS: json.dumps(list(keys))}).rowcount

    def insert(
        self,
        connection: Connection,
        table: Table,
        rows: Sequence[Mapping[str, Any]],
        channel: str | None,
    ) -> None:
        if len(rows) == 1:
            super().insert(connection, table, rows, channel)
            return
        # The drivers write many rows in one statement if their values are nothing but parameters.
        now = connection.execute(select(self.now())).scalar_one()
        values = [
            {
                **{name: row[name] for name in row if name in table.c},
                "attempts": 0,
                "created_at": now,
                "available_at": row["not_before"] or now,
            }
            for row in rows
        ]
        connection.execute(insert(table), values)

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
        # There is no UPDATE … RETURNING: the rows are locked and read, then written.
        rows = self._lock_ordered(connection, outbox, limit)
        unordered = self.unordered(outbox, limit - len(rows))
        # Whatever other way the database may find cheaper locks rows that it does not return.
        by_time = unordered.with_hint(outbox, f"FORCE INDEX ({_by_time(outbox)})")
        rows += connection.execute(by_time.with_only_columns(*self._read(outbox))).all()
        return self._lease(connection, outbox, rows, lease_seconds, token)

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
        found = self.unordered(outbox, limit).with_hint(outbox, f"FORCE INDEX ({_by_time(outbox)})")
        freshest = found.order_by(None).order_by(columns.available_at.desc(), columns.id.desc())
        rows = connection.execute(freshest.with_only_columns(*self._read(outbox))).all()
        return self._lease(connection, outbox, rows, lease_seconds, token)

    def _lease(
        self,
        connection: Connection,
        outbox: Table,
        rows: Sequence[Row[Any]],
        lease_seconds: float,
        token: str,
    ) -> Sequence[Row[Any]]:
        if rows:
            taken = (
                update(outbox)
                .where(outbox.c.id.in_([row.id for row in rows]))
                .values(self.under_lease(outbox, lease_seconds, token))
            )
            connection.execute(taken)
        return rows

    def _lock_ordered(self, connection: Connection, outbox: Table, limit: int) -> list[Row[Any]]:
        # Found first, and locked then by their keys: a search locks all that it meets.
        ids = connection.execute(self._ordered(outbox, limit)).scalars().all()
        if not ids:
            return []
        due = select(*self._read(outbox)).where(outbox.c.id.in_(ids), self._due(outbox))
        by_key = self.skip_locked(due.with_hint(outbox, "FORCE INDEX (PRIMARY)"))
        return list(connection.execute(by_key).all())

    def _read(self, outbox: Table) -> list[ColumnElement[Any]]:
        """What a claim returns, as it will be after the claim."""
        read = [outbox.c[name] for name in CLAIMED if name != "attempts"]
        return [*read, (outbox.c.attempts + 1).label("attempts"), self.now().label("now")]

    def lock_keys(self, connection: Connection, inbox: Table, keys: Sequence[str]) -> None:
        # A lock by name, GET_LOCK, does not end with the transaction. That of a row does, also of one
        # that is inserted and deleted; ON DUPLICATE KEY, for else who waits locks it shared at first,
        # and two of them are a deadlock. In one order, for the same reason.
        names = [f"order:{number}" for number in sorted({lock_of("order", key) for key in keys})]
        values = {"task": "", "task_id": "", "state": "", "handled_at": self.now()}
        row = mysql.insert(inbox).values(key=bindparam("key"), **values)
        locked = row.on_duplicate_key_update(state="")
        connection.execute(locked, [{"key": name} for name in names])
        gone = delete(inbox).where(inbox.c.key == bindparam("name"))
        connection.execute(gone, [{"name": name} for name in names])

    def receive(self, inbox: Table) -> Executable:
        values: dict[str, Any] = {name: bindparam(name) for name in RECEIVED}
        return _InsertAtOnce(inbox).values({**values, "handled_at": self.now()})

    def received(
        self, connection: Connection, statement: Executable, values: Mapping[str, Any]
    ) -> bool:
        # Of a concurrent first execution the row is locked: "waited too long", at once on MariaDB,
        # after a second on MySQL, which knows no shorter time.
        values = {name: values[name] for name in RECEIVED}
        try:
            with _waiting_for_a_second(connection):
                connection.execute(statement, values)
        except IntegrityError as exc:
            if _code(exc) == _DUPLICATE:
                return False
            raise
        except DBAPIError as exc:
            # Two wait for the first one, which rolls back: one of them is a deadlock's victim.
            if _code(exc) in (_WAITED, _DEADLOCK):
                return False
            raise
        return True

    def forget(self, connection: Connection, outbox: Table, key: str) -> int:
        # A DELETE by another index than the primary one locks a gap, and inserts wait for it.
        found = select(outbox.c.id).where(outbox.c.key == key)
        ids = connection.execute(found).scalars().all()
        if not ids:
            return 0
        return self.delete(connection, outbox.c.id, ids, outbox.c.key == key)

    def check(self, engine: Engine) -> None:
        with engine.connect() as connection:
            dialect: Any = connection.dialect
            name = "MariaDB" if dialect.is_mariadb else "MySQL"
            since, found = _SINCE[dialect.is_mariadb], dialect.server_version_info
            if found < since:
                raise ConfigurationError(
                    f"{name} {_dotted(found)} can't pass over locked rows: the outbox needs "
                    f"{name} {_dotted(since)} or later"
                )


class MariaDB(MySQL):
    """The same, under SQLAlchemy's other name for it."""

    name = "mariadb"


class _InsertAtOnce(Insert):
    """An INSERT that fails where it would have to wait for another transaction."""

    inherit_cache = True


@compiles(_InsertAtOnce, "mysql", "mariadb")
def _insert_at_once(element: _InsertAtOnce, compiler: Any, **options: Any) -> str:
    at_once = "SET STATEMENT innodb_lock_wait_timeout=0 FOR " if compiler.dialect.is_mariadb else ""
    return f"{at_once}{compiler.visit_insert(element, **options)}"


class _DeleteByKey(Delete):
    """A DELETE of the rows with the primary keys in the parameter `_KEYS`, a list in JSON."""

    inherit_cache = True


@compiles(_DeleteByKey, "mysql", "mariadb")
def _delete_by_key(element: _DeleteByKey, compiler: Any, **options: Any) -> str:
    table: Any = element.table
    (key,) = table.primary_key
    name, column = compiler.preparer.format_table(table), compiler.preparer.format_column(key)
    kind = key.type.compile(dialect=compiler.dialect)
    keys = compiler.process(bindparam(_KEYS, type_=Text), **options)
    rows = f"JSON_TABLE({keys}, '$[*]' COLUMNS (wanted {kind} PATH '$')) AS wanted"
    single, _, conditions = compiler.visit_delete(element, **options).partition(" WHERE ")
    is_wanted = f"{name}.{column} = wanted.wanted"
    return f"{single} USING {rows} STRAIGHT_JOIN {name} FORCE INDEX (PRIMARY) WHERE {is_wanted}" + (
        f" AND ({conditions})" if conditions else ""
    )


@contextmanager
def _waiting_for_a_second(connection: Connection) -> Iterator[None]:
    dialect: Any = connection.dialect
    if dialect.is_mariadb:
        yield
        return
    before = "@celery_outbox_waits"
    connection.exec_driver_sql(
        f"SET {before} = @@innodb_lock_wait_timeout, innodb_lock_wait_timeout = 1"
    )
    try:
        yield
    finally:
        connection.exec_driver_sql(f"SET innodb_lock_wait_timeout = {before}")


def _by_time(outbox: Table) -> str:
    """The index in which the rows are in the order in which they become available."""
    (found,) = [index for index in outbox.indexes if "available_at" in index.columns]
    return mysql.dialect().identifier_preparer.quote(str(found.name))


def _dotted(version: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in version)


def _code(error: DBAPIError) -> object:
    """The number that the server gave the error."""
    known: Any = error.orig
    return getattr(known, "errno", None) or (known.args[0] if known.args else None)
