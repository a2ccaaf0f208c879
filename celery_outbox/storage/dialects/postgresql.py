"""PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Compiled,
    Connection,
    Engine,
    Executable,
    Insert,
    Integer,
    Row,
    String,
    Table,
    any_,
    bindparam,
    column,
    func,
    literal,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import OperationalError

from celery_outbox.storage.dialects.base import RECEIVED, Dialect, lock_of
from celery_outbox.storage.low_water import Mark
from celery_outbox.storage.notifications import Listener
from celery_outbox.storage.tables import UTCDateTime

__all__ = ["PostgreSQL"]

#: libpq's number of a transaction in which no statement has failed.
_OPEN = 2


class PostgreSQL(Dialect):
    """PostgreSQL 12 and later, by psycopg 3."""

    name = "postgresql"

    def __init__(self) -> None:
        self._compiled: WeakKeyDictionary[Insert, Compiled] = WeakKeyDictionary()

    def now(self) -> ColumnElement[datetime]:
        # Not clock_timestamp(): it is volatile, and no index is searched by it.
        return func.now(type_=UTCDateTime)

    def after(self, seconds: ColumnElement[float] | float) -> ColumnElement[datetime]:
        # make_interval(years, months, weeks, days, hours, mins, secs)
        return func.now(type_=UTCDateTime) + func.make_interval(0, 0, 0, 0, 0, 0, seconds)

    def begins_at(self, outbox: Table, start: Mark | None) -> Sequence[ColumnElement[bool]]:
        if start is None:
            return ()
        # Compared as a pair, as the index is sorted: what was stored in one transaction has one time.
        here = tuple_(literal(start.available_at, UTCDateTime), literal(start.id, BigInteger))
        return (tuple_(outbox.c.available_at, outbox.c.id) > here,)

    def among(self, column: ColumnElement[Any], keys: Sequence[Any]) -> ColumnElement[bool]:
        # One parameter, where IN has one for each: composing those costs more than the deletes.
        return column == any_(bindparam(None, list(keys), type_=ARRAY(column.type)))

    def not_awaited(self) -> Sequence[ColumnElement[Any]]:
        # For this transaction only. What settles the batch waits, and with it all that was before.
        return (func.set_config("synchronous_commit", "off", True),)

    def lock_keys(self, connection: Connection, inbox: Table, keys: Sequence[str]) -> None:
        # In one order, or two transactions with the same keys could wait for each other.
        locks = sorted({lock_of("order", key) for key in keys})
        lock = func.unnest(bindparam("locks", locks, type_=ARRAY(BigInteger))).column_valued("lock")
        connection.execute(select(func.pg_advisory_xact_lock(lock)))

    def notifying(self, stage: Insert, channel: str) -> Insert:
        # For each row; of equal ones in a transaction the database sends one, at its commit.
        return stage.returning(func.pg_notify(channel, ""))

    def notify(self, connection: Connection, channel: str) -> None:
        connection.execute(select(func.pg_notify(channel, "")))

    def listen(self, engine: Engine, channel: str) -> Listener | None:
        return None if engine.dialect.driver != "psycopg" else _Listener(engine, channel)

    def take(
        self,
        connection: Connection,
        local: Table,
        *,
        wanted: Sequence[tuple[str, int]],
        limit: int,
        lease_seconds: float,
        token: str,
    ) -> Sequence[Row[Any]]:
        # All looks in one statement. The outer limit ends it: a row that is not wanted any more is
        # neither looked at nor locked.
        columns = local.c
        looks = (
            func.unnest(
                bindparam("wanted_queues", type_=ARRAY(String)),
                bindparam("wanted_priorities", type_=ARRAY(Integer)),
            )
            .table_valued(column("queue", String), column("priority", Integer), name="looks")
            .render_derived()
        )
        found = (
            select(columns.id)
            .where(
                columns.queue == looks.c.queue,
                columns.priority == looks.c.priority,
                columns.available_at <= self.now(),
            )
            .order_by(columns.available_at, columns.id)
            .limit(limit)
            .with_for_update(skip_locked=True)
            .lateral("found")
        )
        due = select(found.c.id).select_from(looks.join(found, true())).limit(limit).cte("due")
        taken = (
            update(local)
            .where(columns.id.in_(select(due.c.id)))
            .values(self.under_lease(local, lease_seconds, token))
            .returning(*columns, *self.not_awaited())
        )
        queues, priorities = zip(*wanted, strict=True)
        parameters = {"wanted_queues": list(queues), "wanted_priorities": list(priorities)}
        return connection.execute(taken, parameters).all()

    def insert(
        self, connection: Connection, statement: Insert, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        if connection.dialect.driver != "psycopg" or _translates_schemas(connection):
            super().insert(connection, statement, rows)
            return
        # The driver takes our rows as they are: a third of the time goes to SQLAlchemy's own
        # processing of parameters.
        if (compiled := self._compiled.get(statement)) is None:
            # Inline: without the ids, which nobody asks for.
            compiled = self._compiled[statement] = statement.inline().compile(
                dialect=connection.dialect, column_keys=list(rows[0])
            )
        constants = compiled.params
        connection.exec_driver_sql(str(compiled), [{**constants, **row} for row in rows])

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


class _Listener:
    """A psycopg connection that LISTENs; it is not the pool's any more."""

    def __init__(self, engine: Engine, channel: str) -> None:
        self._errors: Any = engine.dialect.loaded_dbapi.Error
        # The pool would count it among those that are in use.
        fairy = engine.raw_connection()
        driver: Any = fairy.driver_connection
        fairy.detach()
        self._driver = driver
        with self._as_sqlalchemys():
            self._driver.autocommit = True
            self._driver.execute(f"LISTEN {engine.dialect.identifier_preparer.quote(channel)}")

    def fileno(self) -> int:
        number: int = self._driver.fileno()
        return number

    def heard(self) -> bool:
        heard = False
        with self._as_sqlalchemys():
            self._driver.pgconn.consume_input()
            while self._driver.pgconn.notifies() is not None:
                heard = True
        return heard

    def close(self) -> None:
        self._driver.close()

    @contextmanager
    def _as_sqlalchemys(self) -> Iterator[None]:
        try:
            yield
        except self._errors as exc:
            raise OperationalError("LISTEN", None, exc) from exc


def _translates_schemas(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get("schema_translate_map"))
