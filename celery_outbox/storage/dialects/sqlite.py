"""SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Select,
    String,
    Table,
    bindparam,
    cast,
    func,
    literal_column,
    type_coerce,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import OperationalError

from celery_outbox.errors import ConfigurationError
from celery_outbox.storage.dialects.base import RECEIVED, Dialect
from celery_outbox.storage.tables import UTCDateTime

__all__ = ["SQLite"]

_CLOCK = "%Y-%m-%d %H:%M:%f"
#: The longest that `waiting_briefly` waits, in milliseconds: what sqlite3 itself does by default.
_BRIEFLY = 5000
#: The longest that `without_waiting` waits: SQLite looks again after 1, 3, 8, 18, 33, 53 milliseconds.
_ALMOST_NOT = 50


class SQLite(Dialect):
    """SQLite 3.35 and later: one writer at a time.

    A durable task's transaction is a writer from its first statement to its commit, and everybody
    else (the app, the relay) waits for it as long as the connection's ``timeout``. Who waits can't be
    told from a duplicate of what is executed; a delivery waits for five seconds, and then goes back.
    """

    name = "sqlite"

    def now(self) -> ColumnElement[datetime]:
        return self._clock()

    def after(self, seconds: ColumnElement[float] | float) -> ColumnElement[datetime]:
        return self._clock(cast(seconds, String).concat(" seconds"))

    def _clock(self, *modifiers: ColumnElement[str]) -> ColumnElement[datetime]:
        # SQLite's clock has milliseconds; SQLAlchemy reads the fraction as microseconds.
        clock: ColumnElement[str] = literal_column(f"'{_CLOCK}'")
        text = func.strftime(clock, literal_column("'now'"), *modifiers).concat("000")
        return type_coerce(text, UTCDateTime)

    def skip_locked(self, rows: Select[Any]) -> Select[Any]:
        return rows

    def receive(self, inbox: Table) -> Executable:
        # A concurrent first execution holds the one write lock: "database is locked" after the
        # connection's timeout, which the inbox takes as busy.
        values: dict[str, Any] = {name: bindparam(name) for name in RECEIVED}
        values["handled_at"] = self.now()
        received = insert(inbox).values(values).on_conflict_do_nothing()
        return received.execution_options(preserve_rowcount=True)

    def is_busy(self, error: BaseException) -> bool:
        return "locked" in str(getattr(error, "orig", error))

    @contextmanager
    def waiting_briefly(self, connection: Connection) -> Iterator[None]:
        with _waiting_briefly(connection.connection.driver_connection):
            yield

    def before_savepoint(self, connection: Connection) -> None:
        # The driver begins with the first write. To release a savepoint before that is to commit.
        driver: Any = connection.connection.driver_connection
        if not driver.in_transaction:
            connection.exec_driver_sql("BEGIN")

    @contextmanager
    def without_waiting(self, connection: Connection) -> Iterator[None]:
        with _waiting_briefly(connection.connection.driver_connection, _ALMOST_NOT):
            yield

    def check(self, engine: Engine) -> None:
        try:
            with closing(engine.raw_connection()) as raw:
                connection: Any = raw.driver_connection
                with _waiting_briefly(connection):
                    # A driver without autocommit, as SQLite's savepoints want it, has begun already.
                    if not connection.in_transaction:
                        connection.execute("BEGIN IMMEDIATE")
                    # BEGIN alone is content with a file that can only be read.
                    (mark,) = connection.execute("PRAGMA user_version").fetchone()
                    connection.execute(f"PRAGMA user_version = {int(mark)}")
                    connection.rollback()
        except (OperationalError, sqlite3.OperationalError) as exc:
            reason = str(getattr(exc, "orig", exc))
            if "locked" not in reason:
                raise ConfigurationError(
                    f"the SQLite file {engine.url.database!r} can't be written: {reason}; give it "
                    "a folder that exists and that this process may write to"
                ) from exc

    def prepare(self, engine: Engine) -> None:
        # Readers and the one writer do not block each other; the mode stays with the file. It can't
        # change inside a transaction, which a driver without autocommit is always in.
        with closing(engine.raw_connection()) as raw:
            connection: Any = raw.driver_connection
            if had_begun := connection.in_transaction:
                connection.execute("COMMIT")
            try:
                connection.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError as exc:
                raise OperationalError("PRAGMA journal_mode=WAL", None, exc) from exc
            if had_begun:
                connection.execute("BEGIN")


@contextmanager
def _waiting_briefly(driver: Any, longest: int = _BRIEFLY) -> Iterator[None]:
    (before,) = driver.execute("PRAGMA busy_timeout").fetchone()
    # Not longer than the engine has been told to wait.
    driver.execute(f"PRAGMA busy_timeout = {min(before, longest)}")
    try:
        yield
    finally:
        driver.execute(f"PRAGMA busy_timeout = {before}")
