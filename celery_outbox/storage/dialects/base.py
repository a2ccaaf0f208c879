"""Dialect: the few points on which databases differ, with the defaults that most share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Row,
    Select,
    Table,
    select,
    update,
)

__all__ = ["RECEIVED", "Dialect"]

#: What the worker says of an execution that it begins; the time is the database's.
RECEIVED = ("key", "task", "task_id", "state")


class Dialect:
    """What PostgreSQL does; the others say where they differ."""

    #: SQLAlchemy's name of the database.
    name: str

    def now(self) -> ColumnElement[datetime]:
        """The database's clock. Only it decides about leases: no two machines agree on the time."""
        raise NotImplementedError

    def after(self, seconds: ColumnElement[float] | float) -> ColumnElement[datetime]:
        """The database's clock, `seconds` from now."""
        raise NotImplementedError

    def skip_locked(self, rows: Select[Any]) -> Select[Any]:
        """Lock `rows`, passing over those that another transaction has locked."""
        return rows.with_for_update(skip_locked=True)

    def claim(
        self,
        connection: Connection,
        outbox: Table,
        *,
        limit: int,
        lease_seconds: float,
        token: str,
    ) -> Sequence[Row[Any]]:
        """Take up to `limit` available rows under a lease, and return them with the time.

        The rows are locked in a CTE: an IN over a bare subquery with LIMIT may be planned as a loop
        that locks more than the limit.
        """
        columns = outbox.c
        due = self.skip_locked(
            select(columns.id)
            .where(columns.available_at <= self.now())
            .order_by(columns.available_at, columns.id)
            .limit(limit)
        ).cte("due")
        taken = (
            update(outbox)
            .where(columns.id.in_(select(due.c.id)))
            .values(
                lease_token=token,
                attempts=columns.attempts + 1,
                available_at=self.after(lease_seconds),
            )
            .returning(*columns, self.now().label("now"))
        )
        return connection.execute(taken).all()

    def receive(self, inbox: Table) -> Executable:
        """The statement that inserts an inbox row, or inserts nothing and returns nothing.

        Its parameters are the row's columns, but for the time, and ``lock``. Nothing is inserted
        when the key is there, or when another transaction is about to insert it: `lock` is a number
        made of the key, for databases that would wait for that transaction.
        """
        raise NotImplementedError

    def is_sound(self, connection: Connection) -> bool:
        """Whether it is known, without asking the database, that a COMMIT will not be a roll-back."""
        return False

    @contextmanager
    def waiting_briefly(self, connection: Connection) -> Iterator[None]:
        """Let no statement of the block wait for long for another transaction.

        Nothing to do where `receive`, for which it is, never waits.
        """
        yield

    def check(self, engine: Engine) -> None:
        """Raise `ConfigurationError` if the database can't be what the outbox needs."""

    def prepare(self, engine: Engine) -> None:
        """Do what must be done once for a new database, outside any transaction."""
