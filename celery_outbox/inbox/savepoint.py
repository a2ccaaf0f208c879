"""FirstSavepoint: the savepoint that a task's transaction need not set.

Sessions in a task's transaction work in a savepoint of it, so that their ``rollback()`` undoes what
is theirs. Before the first of them the transaction holds nothing but the inbox row. So to go back to
it is to roll the whole transaction back and to claim the execution again, and to set it and to
release it, as every task does, is to do nothing.

SQLAlchemy believes in the savepoint: its sessions, and whoever watches them, behave as with one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection

__all__ = ["FirstSavepoint"]

#: libpq's number of a transaction in which a statement has failed.
_IN_ERROR = 3

#: What SQLAlchemy's Connection calls to set, release and go back to a savepoint.
_METHODS = ("_savepoint_impl", "_release_savepoint_impl", "_rollback_to_savepoint_impl")
_KNOWN = all(hasattr(Connection, method) for method in _METHODS)


class FirstSavepoint:
    """Takes the place of the first savepoint on `connection`, whose transaction has just begun.

    `claim` is called before the next use of the transaction when it was rolled back for a session's
    sake, and raises if the execution can't be had any more.
    """

    NAME = "celery_outbox_first"

    def __init__(self, connection: Connection, claim: Callable[[], None]) -> None:
        # A Connection is what one execution takes out of the pool: nobody else meets these methods.
        self._connection: Any = connection
        self._claim = claim
        self._is_set = self._is_undone = self._is_over = False
        self._begin, self._release, self._go_back = (
            getattr(self._connection, method) for method in _METHODS
        )
        for method, own in zip(
            _METHODS, (self._on_begin, self._on_release, self._on_go_back), strict=True
        ):
            setattr(connection, method, own)

    @staticmethod
    def suits(connection: Connection) -> bool:
        """Whether the database and its driver can do without.

        On SQLite another writer could come in between, and savepoints cost nothing.
        """
        return _KNOWN and connection.dialect.driver == "psycopg"

    def claim_again(self) -> None:
        """Claim the execution again if that was undone."""
        if self._is_undone:
            self._is_undone = False
            self._claim()

    def end(self) -> None:
        """The transaction is about to end: there is nothing to go back to."""
        self._is_over = True

    def detach(self) -> None:
        """Leave the connection as it was."""
        for method in _METHODS:
            vars(self._connection).pop(method, None)

    def _on_begin(self, name: str | None = None) -> str:
        self.claim_again()
        if self._is_set:
            return str(self._begin(name))
        self._is_set = True
        return self.NAME

    def _on_release(self, name: str) -> None:
        # PostgreSQL refuses to release a savepoint after an error that somebody has swallowed.
        if name != self.NAME or self._in_error():
            self._release(name)

    def _on_go_back(self, name: str) -> None:
        if name != self.NAME:
            self._go_back(name)
            return
        connection = self._connection
        connection.dispatch.rollback_savepoint(connection, name, None)
        if self._is_over or connection.closed or connection.invalidated:
            return
        try:
            connection.dialect.do_rollback(connection.connection)
        except BaseException as exc:
            connection.invalidate(exc)
            raise
        self._is_set, self._is_undone = False, True

    def _in_error(self) -> bool:
        driver: Any = self._connection.connection.dbapi_connection
        return bool(driver.info.transaction_status == _IN_ERROR)
