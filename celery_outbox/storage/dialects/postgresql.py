"""PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Insert,
    Integer,
    Row,
    Select,
    String,
    Table,
    Update,
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

from celery_outbox.storage.dialects.base import RECEIVED, Dialect, lock_of
from celery_outbox.storage.dialects.psycopg3 import (
    FinalStatement,
    NotificationListener,
    RawInsert,
    RawStatement,
    raw_cursors,
    takes_raw,
)
from celery_outbox.storage.low_water import Mark
from celery_outbox.storage.notifications import Listener
from celery_outbox.storage.tables import UTCDateTime

__all__ = ["PostgreSQL"]

#: libpq's number of a transaction in which no statement has failed.
_OPEN = 2
#: How many messages one statement inserts: up to the first, or exactly the second; or one that has a
#: body of more bytes than the third.
_FEW, _MANY = 20, 100
_LARGE = 1_000_000


class PostgreSQL(Dialect):
    """PostgreSQL 12 and later, by psycopg 3."""

    name = "postgresql"

    def __init__(self) -> None:
        super().__init__()
        self._inserts: dict[tuple[Table, str | None, int], RawInsert] = {}
        self._changes: dict[Executable, RawStatement] = {}
        self._final_changes: dict[Update, FinalStatement] = {}

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

    def first_of_each_key(self, outbox: Table) -> Select[Any]:
        # Without statistics of the keys (the table was empty when it was analysed) the planner takes
        # nearly every row for one that has a key, and reads the whole table, dead rows and all. Of
        # keys between two others it expects few, and goes by the index.
        key = outbox.c.ordering_key
        lowest, highest = (
            select(end(key)).where(key.is_not(None)).scalar_subquery()
            for end in (func.min, func.max)
        )
        return select(func.min(outbox.c.id)).where(key.between(lowest, highest)).group_by(key)

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
        return NotificationListener(engine, channel) if engine.dialect.driver == "psycopg" else None

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
            .values(self.under_workers_lease(local, lease_seconds, token))
            .returning(*columns, *self.not_awaited())
        )
        queues, priorities = zip(*wanted, strict=True)
        parameters = {"wanted_queues": list(queues), "wanted_priorities": list(priorities)}
        return connection.execute(taken, parameters).all()

    def insert(
        self,
        connection: Connection,
        table: Table,
        rows: Sequence[Mapping[str, Any]],
        channel: str | None,
    ) -> None:
        if not takes_raw(connection):
            super().insert(connection, table, rows, channel)
            return
        is_large = any(len(row["body"]) > _LARGE for row in rows)
        first = 0
        with raw_cursors(connection):
            while first < len(rows):
                left = 1 if is_large else len(rows) - first
                # Few sizes, for each is a statement that is kept and prepared.
                size = _MANY if left >= _MANY else min(left, _FEW)
                if (insert_rows := self._inserts.get((table, channel, size))) is None:
                    statement = self._insert_of(table, list(rows[0]), channel, size)
                    insert_rows = RawInsert(connection, statement, size)
                    self._inserts[table, channel, size] = insert_rows
                insert_rows.execute(connection, rows[first : first + size])
                first += size

    def _insert_of(
        self, table: Table, names: Sequence[str], channel: str | None, size: int
    ) -> Insert:
        given = [table.c[name] for name in names if name in table.c]

        def row(number: int) -> dict[str, ColumnElement[Any]]:
            values = {
                each.name: bindparam(f"{each.name}__{number}", type_=each.type) for each in given
            }
            return {**values, **self.of_the_database(f"__{number}")}

        values = [row(number) for number in range(size)]
        statement = insert(table).values(values)
        return statement if channel is None else self.notifying(statement, channel)

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
            .execution_options(preserve_rowcount=True)
        )

    def change(
        self, connection: Connection, statement: Executable, values: Mapping[str, Any]
    ) -> int:
        if not takes_raw(connection):
            return super().change(connection, statement, values)
        if (raw := self._changes.get(statement)) is None:
            raw = self._changes[statement] = RawStatement(connection, statement)
        return raw.execute(connection, values)

    def change_with_commit(
        self, connection: Connection, statement: Update, values: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        if not FinalStatement.suits(connection):
            return super().change_with_commit(connection, statement, values)
        if (final := self._final_changes.get(statement)) is None:
            final = self._final_changes[statement] = FinalStatement(connection, statement)
        return final.with_commit(connection, values)

    def is_sound(self, connection: Connection) -> bool:
        # libpq knows from the database's last answer.
        driver: Any = connection.connection.dbapi_connection
        return connection.dialect.driver == "psycopg" and driver.info.transaction_status == _OPEN
