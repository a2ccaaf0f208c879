"""psycopg: what is asked of the driver itself, because SQLAlchemy has no way, or a dear one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import itemgetter
from typing import Any

from sqlalchemy import (
    Connection,
    Engine,
    Executable,
    Insert,
    Integer,
    Update,
    func,
    literal_column,
    select,
)
from sqlalchemy.exc import OperationalError

__all__ = [
    "FinalStatement",
    "NotificationListener",
    "RawInsert",
    "RawStatement",
    "raw_cursors",
    "takes_raw",
]


def takes_raw(connection: Connection) -> bool:
    """Whether `raw_cursors` can be had."""
    # Not of async connections. A user may have had a reason for another kind of cursor. The names of
    # translated schemas are SQLAlchemy's parameters in the text.
    if connection.get_execution_options().get("schema_translate_map"):
        return False
    driver: Any = connection.connection.dbapi_connection
    psycopg: Any = connection.dialect.loaded_dbapi
    return getattr(driver, "cursor_factory", None) is psycopg.Cursor


@contextmanager
def raw_cursors(connection: Connection) -> Iterator[None]:
    """Let psycopg take statements with the server's own parameters, ``$1``, and no others.

    It need not look for parameters in the text then. SQLAlchemy's part, with its events and errors, is
    what it always is.
    """
    driver: Any = connection.connection.dbapi_connection
    psycopg: Any = connection.dialect.loaded_dbapi
    driver.cursor_factory = psycopg.RawCursor
    try:
        yield
    finally:
        driver.cursor_factory = psycopg.Cursor


def _with_servers_parameters(connection: Connection, statement: Executable) -> Any:
    dialect: Any = type(connection.dialect)
    compile_: Any = statement.compile  # type: ignore[attr-defined]
    return compile_(dialect=dialect(paramstyle="numeric_dollar"))


class RawInsert:
    """An insert of `size` rows in one statement for `raw_cursors`.

    `statement` has the parameters ``NAME__0``, ``NAME__1`` and so on for what a row has under NAME.
    """

    def __init__(self, connection: Connection, statement: Insert, size: int) -> None:
        compiled = _with_servers_parameters(connection, statement)
        names: list[str] = compiled.positiontup
        of_first = [name.removesuffix("__0") for name in names if name.endswith("__0")]
        self._text = str(compiled)
        self._values: Callable[[Mapping[str, Any]], tuple[Any, ...]] = itemgetter(*of_first)
        # They come last, with what the statement returns.
        self._constants = [compiled.params[name] for name in names[len(of_first) * size :]]

    def execute(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert `size` rows."""
        parameters = [value for row in rows for value in self._values(row)]
        connection.exec_driver_sql(self._text, (*parameters, *self._constants))


class RawStatement:
    """A statement of one row for `raw_cursors`; all its parameters are given when it is executed."""

    def __init__(self, connection: Connection, statement: Executable) -> None:
        compiled = _with_servers_parameters(connection, statement)
        self._text = str(compiled)
        self._values: Callable[[Mapping[str, Any]], tuple[Any, ...]] = itemgetter(
            *compiled.positiontup
        )

    def given(self, values: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]]:
        """Return the text, and its parameters in their order."""
        return self._text, self._values(values)

    def execute(self, connection: Connection, values: Mapping[str, Any]) -> int:
        """Return how many rows it has inserted or updated; if it begins a transaction, none returned.

        SQLAlchemy has no part in a statement that begins one, unless its engine logs statements.
        """
        # Those who work with another driver may not have psycopg.
        from celery_outbox.storage.dialects.round_trip import Command, begin_with

        command = Command(*self.given(values))
        if not connection.in_transaction():
            # SQLAlchemy does so by itself, before a statement that it knows of.
            connection.begin()
        if not connection.engine.logger.isEnabledFor(logging.INFO):
            driver: Any = connection.connection.dbapi_connection
            if (changed := begin_with(driver, command)) is not None:
                return changed
        with raw_cursors(connection):
            return connection.exec_driver_sql(*command, {"preserve_rowcount": True}).rowcount


class FinalStatement:
    """An update of one row that goes to the server with COMMIT, and keeps it from being one if there
    is no such row.
    """

    def __init__(self, connection: Connection, statement: Update) -> None:
        changed = statement.returning(literal_column("1")).cte("changed")
        checked = select(literal_column("1", Integer).op("/")(func.count())).select_from(changed)
        self._statement = RawStatement(connection, checked)

    @staticmethod
    def suits(connection: Connection) -> bool:
        """Whether the transaction can be committed so."""
        if not takes_raw(connection):
            return False
        from celery_outbox.storage.dialects.round_trip import commits_plainly

        driver: Any = connection.connection.dbapi_connection
        return commits_plainly(driver)

    def with_commit(
        self, connection: Connection, values: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """Execute it with the commit that the block asks for."""
        from celery_outbox.storage.dialects.round_trip import Command, committing_with

        driver: Any = connection.connection.dbapi_connection
        return committing_with(driver, Command(*self._statement.given(values)))


class NotificationListener:
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
