"""Dialect: the few points on which databases differ, with the defaults that most share."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from hashlib import sha256
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    CompoundSelect,
    Connection,
    Engine,
    Executable,
    Float,
    Insert,
    Integer,
    Row,
    Select,
    String,
    Table,
    Update,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal,
    literal_column,
    select,
    union_all,
    update,
)

from celery_outbox.errors import TransactionLost
from celery_outbox.storage.low_water import Mark
from celery_outbox.storage.notifications import Listener
from celery_outbox.storage.types import UTCDateTime

__all__ = ["CLAIMED", "RECEIVED", "Dialect", "lock_of"]

#: What a claim returns of a row, besides the database's time.
CLAIMED = (
    "id",
    "key",
    "task",
    "task_id",
    "destination",
    "body",
    "message",
    "created_at",
    "due_at",
    "expires_at",
    "attempts",
    "ordering_key",
)

#: What the worker says of an execution that it begins; the time is the database's.
RECEIVED = ("key", "task", "task_id", "state")


class Dialect:
    """What PostgreSQL does; the others say where they differ."""

    #: SQLAlchemy's name of the database.
    name: str

    def __init__(self) -> None:
        # Built once: that costs as much as to execute one.
        self._statements: dict[tuple[Table, str | None], Insert] = {}

    def now(self) -> ColumnElement[datetime]:
        """The database's clock. Only it decides about leases: no two machines agree on the time."""
        raise NotImplementedError

    def after(self, seconds: ColumnElement[float] | float) -> ColumnElement[datetime]:
        """The database's clock, `seconds` from now."""
        raise NotImplementedError

    def skip_locked(self, rows: Select[Any]) -> Select[Any]:
        """Lock `rows`, passing over those that another transaction has locked."""
        return rows.with_for_update(skip_locked=True)

    def lock(self, rows: Select[Any]) -> Select[Any]:
        """Lock `rows`, after waiting for who has locked them."""
        return rows.with_for_update()

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
        """Take up to `limit` available rows under a lease, and return them with the time.

        Of the rows with an ordering key only the first of each key may go, and only once it is
        available itself; they get half of the places, so that neither kind starves the other.

        Rows without a key before `start` are passed over, where `begins_at` knows how.

        The rows are locked in a CTE: an IN over a bare subquery with LIMIT may be planned as a loop
        that locks more than the limit.
        """
        ordered = self.ordered(outbox, limit).cte("ordered")
        places_left = limit - select(func.count()).select_from(ordered).scalar_subquery()
        # Twice limited: of a limit that it does not know the planner expects a tenth of the table, and
        # compiles a plan as expensive as that. The outer one ends it: no row more is locked.
        found = self.unordered(outbox, limit, start).subquery("found")
        others = select(found.c.id).limit(places_left).cte("others")
        due = union_all(select(ordered.c.id), select(others.c.id))
        taken = self._taken(outbox, due, lease_seconds, token)
        return connection.execute(taken).all()

    def claim_freshest(
        self,
        connection: Connection,
        outbox: Table,
        *,
        limit: int,
        lease_seconds: float,
        token: str,
    ) -> Sequence[Row[Any]]:
        """Do as `claim` does, beginning with the rows that are available since the shortest time.

        Those with an ordering key are left to `claim`.
        """
        if self._freshest is None:
            columns = outbox.c
            due = self.skip_locked(
                select(columns.id)
                .where(columns.ordering_key.is_(None), columns.available_at <= self.now())
                .order_by(columns.available_at.desc(), columns.id.desc())
                .limit(bindparam("places", type_=Integer))
            ).cte("due")
            self._freshest = self._taken(
                outbox,
                select(due.c.id),
                bindparam("lease", type_=Float),
                bindparam("token", type_=String),
            )
        values = {"places": limit, "lease": lease_seconds, "token": token}
        return connection.execute(self._freshest, values).all()

    #: Built once: it runs with each commit of an app, and building costs as much as asking.
    _freshest: Executable | None = None

    def _taken(
        self,
        outbox: Table,
        due: Select[Any] | CompoundSelect[Any],
        lease_seconds: ColumnElement[float] | float,
        token: ColumnElement[str] | str,
    ) -> Executable:
        """The statement that takes the rows of these ids under a lease, and returns them."""
        columns = outbox.c
        return (
            update(outbox)
            .where(columns.id.in_(due))
            .values(self.under_lease(outbox, lease_seconds, token))
            .returning(
                *(columns[name] for name in CLAIMED), self.now().label("now"), *self.not_awaited()
            )
        )

    def under_lease(
        self,
        table: Table,
        lease_seconds: ColumnElement[float] | float,
        token: ColumnElement[str] | str,
    ) -> dict[str, Any]:
        """What a claim writes into a row: the lease, and one attempt more."""
        return {
            "lease_token": token,
            "attempts": table.c.attempts + 1,
            "available_at": self.after(lease_seconds),
        }

    def under_workers_lease(self, local: Table, lease_seconds: float, token: str) -> dict[str, Any]:
        """What a take writes into a row: as `under_lease`, and who has had it and is lost, if any.

        The error stands before the lease in the table, and so in the statement: MySQL assigns in order.
        """
        columns = local.c
        lost = literal("its worker was lost: ").concat(columns.lease_token)
        return {
            **self.under_lease(local, lease_seconds, token),
            "last_error": case((columns.lease_token.is_not(None), lost), else_=columns.last_error),
        }

    def not_awaited(self) -> Sequence[ColumnElement[Any]]:
        """What to select so that the transaction's COMMIT does not wait for the disk.

        A claim that a crash of the database undoes is as good as one that another relay repeats: its
        batch is published twice at worst, and the lease token is gone.
        """
        return ()

    def begins_at(self, outbox: Table, start: Mark | None) -> Sequence[ColumnElement[bool]]:
        """The conditions by which a claim begins at `start`; none where dead rows hold nobody up."""
        return ()

    def ordered(self, outbox: Table, limit: int) -> Select[Any]:
        """Lock the rows with an ordering key that may go: half of the limit."""
        return self.skip_locked(self._ordered(outbox, limit))

    def _ordered(self, outbox: Table, limit: int) -> Select[Any]:
        columns = outbox.c
        first = self.first_of_each_key(outbox)
        return (
            select(columns.id)
            .where(columns.id.in_(first), self._due(outbox))
            .order_by(columns.available_at, columns.id)
            # Of a single place, each kind gets half.
            .limit((limit + random.getrandbits(1)) // 2)
        )

    def unordered(
        self, outbox: Table, limit: int | ColumnElement[int], start: Mark | None = None
    ) -> Select[Any]:
        """Lock the rows without one that may go."""
        columns = outbox.c
        return self.skip_locked(
            select(columns.id)
            .where(
                columns.ordering_key.is_(None), self._due(outbox), *self.begins_at(outbox, start)
            )
            .order_by(columns.available_at, columns.id)
            .limit(limit)
        )

    def _due(self, outbox: Table) -> ColumnElement[bool]:
        return outbox.c.available_at <= self.now()

    def first_of_each_key(self, outbox: Table) -> Select[Any]:
        """The ids of the rows before which none with the same ordering key waits."""
        key = outbox.c.ordering_key
        return select(func.min(outbox.c.id)).where(key.is_not(None)).group_by(key)

    @contextmanager
    def transaction(self, engine: Engine) -> Iterator[Connection]:
        """A short transaction of the outbox's own, with settings of its own."""
        with engine.begin() as connection:
            yield connection

    def delete(
        self,
        connection: Connection,
        key: Column[Any],
        keys: Sequence[Any],
        *conditions: ColumnElement[bool],
    ) -> int:
        """Delete rows by their primary keys, those that meet the conditions; return how many.

        It must wait for no other row: a transaction of the app may hold it for long.
        """
        table: Any = key.table
        gone = delete(table).where(self.among(key, keys), *conditions)
        return connection.execute(gone).rowcount

    def among(self, column: ColumnElement[Any], keys: Sequence[Any]) -> ColumnElement[bool]:
        """Whether a column is one of many values."""
        return column.in_(keys)

    def lock_keys(self, connection: Connection, inbox: Table, keys: Sequence[str]) -> None:
        """Let transactions that stage under the same ordering key commit one after the other.

        Only then is the order of their ids that of their commits. Nothing to do where there is but
        one writer. `inbox` is for databases that have only rows to lock.
        """

    def notifying(self, stage: Insert, channel: str) -> Insert:
        """Return `stage`, so that its commit tells those who listen to `channel`, if there is a way."""
        return stage

    def notify(self, connection: Connection, channel: str) -> None:
        """Tell those who listen to `channel`, at the commit."""

    def listen(self, engine: Engine, channel: str) -> Listener | None:
        """Listen to `channel` on a connection of its own; None where nobody would tell."""
        return None

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
        """Take up to `limit` queued messages that are due under a lease, and return them.

        `wanted` are queues and priorities in the order in which they are looked through. Each look is
        an index search, whatever is scheduled for later, and none writes where nothing is due.
        """
        columns = local.c
        rows: list[Row[Any]] = []
        due = (
            select(columns.id)
            .where(
                columns.queue == bindparam("wanted_queue"),
                columns.priority == bindparam("wanted_priority"),
                columns.available_at <= self.now(),
            )
            .order_by(columns.available_at, columns.id)
        )
        for queue, priority in wanted:
            found = self.skip_locked(due.limit(limit - len(rows)))
            parameters = {"wanted_queue": queue, "wanted_priority": priority}
            if ids := connection.execute(found, parameters).scalars().all():
                taken = (
                    update(local)
                    # Another one may have been faster, where nothing locks what is read.
                    .where(columns.id.in_(ids), columns.available_at <= self.now())
                    .values(self.under_workers_lease(local, lease_seconds, token))
                )
                connection.execute(taken)
                # Read again: not every database returns what it has written.
                ours = select(*columns).where(columns.id.in_(ids), columns.lease_token == token)
                rows.extend(connection.execute(ours))
            if len(rows) >= limit:
                break
        return rows

    @contextmanager
    def without_waiting(self, connection: Connection) -> Iterator[None]:
        """Let no statement of the block wait for another writer, where only one can be.

        What then fails is `is_busy`.
        """
        yield

    def is_busy(self, error: BaseException) -> bool:
        """Whether `error` says no more than that another writer was there first."""
        return False

    def insert(
        self,
        connection: Connection,
        table: Table,
        rows: Sequence[Mapping[str, Any]],
        channel: str | None,
    ) -> None:
        """Insert messages, as `row_of` gives them; with `channel`, as `notifying` says."""
        if (statement := self._statements.get((table, channel))) is None:
            statement = insert(table).values(self.of_the_database())
            if channel is not None:
                statement = self.notifying(statement, channel)
            self._statements[table, channel] = statement
        connection.execute(statement, list(rows))

    def of_the_database(self, suffix: str = "") -> dict[str, ColumnElement[Any]]:
        """What the sender of a new message doesn't say; has the parameter ``not_before`` + `suffix`."""
        not_before = bindparam(f"not_before{suffix}", type_=UTCDateTime)
        return {
            "attempts": literal_column("0"),
            "created_at": self.now(),
            "available_at": func.coalesce(not_before, self.now()),
        }

    def receive(self, inbox: Table) -> Executable:
        """The statement that inserts an inbox row, or none.

        Its parameters are the row's columns, but for the time, and ``lock``. Nothing is inserted
        when the key is there, or when another transaction is about to insert it: `lock` is a number
        made of the key, for databases that would wait for that transaction.
        """
        raise NotImplementedError

    def received(
        self, connection: Connection, statement: Executable, values: Mapping[str, Any]
    ) -> bool:
        """Execute what `receive` returned; say whether a row was inserted."""
        return self.change(connection, statement, values) > 0

    def change(
        self, connection: Connection, statement: Executable, values: Mapping[str, Any]
    ) -> int:
        """Execute a statement that was built once; return how many rows it inserted or updated."""
        return connection.execute(statement, values).rowcount

    def change_with_commit(
        self, connection: Connection, statement: Update, values: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """Execute an update of one row now, or with the commit that the block asks for.

        Raises `TransactionLost` if there is no such row, and lets nothing be committed then.
        """
        if not self.change(connection, statement, values):
            raise TransactionLost
        return nullcontext()

    def forget(self, connection: Connection, outbox: Table, key: str) -> int:
        """Delete the envelopes of a key, in a transaction of the app."""
        return connection.execute(delete(outbox).where(outbox.c.key == key)).rowcount

    def is_sound(self, connection: Connection) -> bool:
        """Whether it is known, without asking the database, that a COMMIT will not be a roll-back."""
        return False

    def waiting_briefly(self, connection: Connection) -> AbstractContextManager[None]:
        """Let no statement of the block wait for long for another transaction.

        Nothing to do where `receive`, for which it is, never waits.
        """
        return nullcontext()

    def before_savepoint(self, connection: Connection) -> None:
        """Let a savepoint that is set now be one even where it is a transaction's first statement."""

    def check(self, engine: Engine) -> None:
        """Raise `ConfigurationError` if the database can't be what the outbox needs."""

    def prepare(self, engine: Engine) -> None:
        """Do what must be done once for a new database, outside any transaction."""


def lock_of(kind: str, key: str) -> int:
    """Return the number of an advisory lock: 64 bits of a digest."""
    digest = sha256(f"celery_outbox:{kind}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
