"""Scope: the span in which a transaction is current, and what is staged in it.

Which scope is current is a hint in a context variable and the truth in the session or connection:
``async with session.begin()`` may leave in another context than it entered, so an entry can be
stale, and every read asks the transaction itself.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Connection, Engine, Table
from sqlalchemy.exc import InvalidRequestError, UnboundExecutionError

from celery_outbox import events
from celery_outbox.errors import UnusableTransaction

if TYPE_CHECKING:
    from sqlalchemy.engine import NestedTransaction
    from sqlalchemy.orm import Session, SessionTransaction

    from celery_outbox.storage.store import Store

__all__ = [
    "ConnectionScope",
    "NamedSession",
    "Scope",
    "SessionScope",
    "enter",
    "leave",
    "named_scope",
    "naming",
    "open_scopes",
]

logger = logging.getLogger("celery_outbox")

Row = Mapping[str, Any]


class Scope(Protocol):
    """A transaction that a message can share the fate of."""

    def is_open(self) -> bool:
        """Whether what is staged now will be written when the transaction commits."""

    def stage(self, store: Store, row: Row) -> None:
        """Let `row` be stored if and only if the transaction commits."""


# Weak: a session that nobody holds any more must give its connection back, as it would without us.
_open: ContextVar[tuple[ref[Scope], ...]] = ContextVar("celery_outbox_open", default=())
_named: ContextVar[Scope | None] = ContextVar("celery_outbox_named", default=None)


def enter(scope: Scope) -> None:
    """Make `scope` current in this context."""
    _open.set((*(other for other in _open.get() if other() not in (scope, None)), ref(scope)))


def leave(scope: Scope) -> None:
    """End `scope` in this context; elsewhere its own state ends it."""
    _open.set(tuple(other for other in _open.get() if other() not in (scope, None)))


def open_scopes() -> list[Scope]:
    """Return the scopes of this context that still are open, the outermost first."""
    scopes = (other() for other in _open.get())
    return [scope for scope in scopes if scope is not None and scope.is_open()]


def named_scope() -> Scope | None:
    """Return the scope that the caller has named, whether it still is open or not."""
    return _named.get()


@contextmanager
def naming(scope: Scope | None) -> Iterator[None]:
    """Make `scope` the one that messages go with, whatever else is open."""
    token = _named.set(scope)
    try:
        yield
    finally:
        _named.reset(token)


class SessionScope:
    """The root transaction of a session.

    Rows are kept with the session until its root commit and then inserted in one statement, on the
    session's own connection. Each is tagged with the session's innermost transaction: a savepoint
    that rolls back takes its rows along, one that is released hands them to its parent.
    """

    def __init__(self, session: Session) -> None:
        self._session = ref(session)
        self._staged: list[tuple[SessionTransaction, Store, Row]] = []
        self._written: list[str] = []
        self._savepoints: dict[SessionTransaction, NestedTransaction | None] = {}
        self._connection: ref[Connection] | None = None
        self._released: SessionTransaction | None = None
        self._committing = False
        self._finished = False
        #: Takes what is staged when the session is closed without a commit.
        self.heir: Callable[[list[Row]], None] | None = None

    @property
    def session(self) -> Session | None:
        """The session, as long as somebody else holds it."""
        return self._session()

    @property
    def connection(self) -> Connection | None:
        """The connection on which the session works, once it has one."""
        return None if self._connection is None else self._connection()

    def bind_for(self, table: Table) -> Engine | Connection | None:
        """Return the bind of the session on which it would write to `table`."""
        session = self.session
        if session is None:
            return None
        try:
            return session.get_bind(clause=table)
        except UnboundExecutionError:
            # One that is bound for the app's own classes alone works on some connection all the same.
            return self.connection

    def is_open(self) -> bool:
        # in_transaction() stays true in after_commit, when nothing can be written any more.
        session = self.session
        return session is not None and not self._finished and session.in_transaction()

    def stage(self, store: Store, row: Row) -> None:
        session = self.session
        assert session is not None
        transaction = session.get_nested_transaction() or session.get_transaction()
        if transaction is not None and transaction is self._released:
            transaction = transaction.parent
        assert transaction is not None
        if self.connection is not None:
            _refuse_autocommit(self.connection, row)
            _refuse_textual_savepoint(self.connection, row)
            self._refuse_foreign_savepoint(transaction, self.connection, row)
        self._staged.append((transaction, store, row))
        if self._committing:
            # By another listener of before_commit, after our own, or after prepare().
            try:
                self.write()
            except InvalidRequestError as exc:
                raise UnusableTransaction(
                    f"{row['task']} was sent into a session that is prepared to commit: {exc}"
                ) from exc

    def _refuse_foreign_savepoint(
        self, transaction: SessionTransaction, connection: Connection, row: Row
    ) -> None:
        """A savepoint that the session does not know of could roll back, and the row would stay."""
        innermost: SessionTransaction | None = transaction
        while innermost is not None and innermost not in self._savepoints:
            innermost = innermost.parent
        expected = self._savepoints.get(innermost) if innermost is not None else None
        if connection.get_nested_transaction() is not expected:
            raise UnusableTransaction(
                f"{row['task']} was sent inside a savepoint of session.connection(), of which its "
                "session does not know: use session.begin_nested()"
            )

    # What the session tells (see `celery_outbox.outbox.tracking`).

    def began(self, transaction: SessionTransaction, connection: Connection) -> None:
        """The session has begun, or set a savepoint, on `connection`."""
        self._savepoints[transaction] = connection.get_nested_transaction()
        self._connection = ref(connection)

    def before_commit(self) -> None:
        """The session is about to commit."""
        session = self.session
        assert session is not None
        # Mapper events may send, too, and the flush of the commit comes after this event.
        session.flush()
        self.write()
        self._committing = True

    def write(self) -> None:
        """Insert what is staged."""
        session = self.session
        if not self._staged or session is None:
            return
        staged, self._staged = self._staged, []
        store = staged[0][1]
        try:
            connection = session.connection(bind_arguments={"clause": store.tables.outbox})
        except UnboundExecutionError:
            if self.connection is None:
                raise
            connection = self.connection
        for _, _, row in staged:
            _refuse_autocommit(connection, row)
            self._written.append(row["task"])
        store.stage(connection, [row for _, _, row in staged])
        events.emit(events.STAGED, count=len(staged))

    def savepoint_released(self, savepoint: SessionTransaction) -> None:
        """The database has released `savepoint`: what it contains is its parent's now."""
        parent = savepoint.parent
        assert parent is not None
        self._released = savepoint
        self._staged = [
            (parent if tag is savepoint else tag, store, row) for tag, store, row in self._staged
        ]

    def savepoint_ended(self, savepoint: SessionTransaction) -> None:
        """`savepoint` is over. What it still contains was not released: it was rolled back."""
        self._staged = [entry for entry in self._staged if not _is_inside(entry[0], savepoint)]

    def rolled_back(self) -> None:
        """The root transaction is undone: somebody meant it, or the transaction around it is over."""
        self._staged.clear()
        self._finished = True

    def committed(self) -> None:
        """The session's root transaction has committed."""
        self._finished = True

    def ended(self) -> None:
        """The session's root transaction is over."""
        if not self._finished:
            if self.heir is None:
                _warn_uncommitted([*self._written, *(row["task"] for _, _, row in self._staged)])
            elif sys.exc_info()[0] is None:
                # Closed, as sessions are that only read; an exception in flight means a roll-back.
                self.heir(self.hand_over())
        self._staged.clear()
        self._finished = True

    def hand_over(self) -> list[Row]:
        """Give away what is staged and not yet written."""
        staged, self._staged = self._staged, []
        return [row for _, _, row in staged]


class NamedSession:
    """A session that the caller has named, whether it has begun or not."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def is_open(self) -> bool:
        return True

    def stage(self, store: Store, row: Row) -> None:
        if not self._session.in_transaction():
            # As session.add() would; its events make the scope.
            self._session.begin()
        scope = self._session.info.get(SessionScope)
        if scope is None or not scope.is_open():
            raise UnusableTransaction(
                f"{row['task']} was sent into a session whose transaction is over, or began before "
                "there was an Outbox"
            )
        scope.stage(store, row)


class ConnectionScope:
    """The root transaction of a connection.

    Rows are inserted when the transaction commits, or before a savepoint is set: the database then
    keeps or forgets them as it does the app's own rows.
    """

    _all: ClassVar[WeakKeyDictionary[Connection, ConnectionScope]] = WeakKeyDictionary()

    def __init__(self, connection: Connection) -> None:
        self._connection = ref(connection)
        self._staged: list[tuple[Store, Row]] = []
        self._written: list[str] = []
        self._finished = False
        self.textual_savepoint = False
        self.prepared = False
        self._all[connection] = self

    @classmethod
    def of(cls, connection: Connection) -> ConnectionScope | None:
        """Return the scope of the connection's transaction, if its engine is watched."""
        return cls._all.get(connection)

    @property
    def connection(self) -> Connection | None:
        """The connection, as long as somebody else holds it."""
        return self._connection()

    def is_open(self) -> bool:
        connection = self.connection
        return connection is not None and not self._finished and connection.in_transaction()

    def stage(self, store: Store, row: Row) -> None:
        connection = self.connection
        assert connection is not None
        _refuse_autocommit(connection, row)
        _refuse_textual_savepoint(connection, row)
        if self.prepared:
            raise UnusableTransaction(
                f"{row['task']} was sent on a connection that is prepared to commit: send before"
            )
        self._staged.append((store, row))

    # What the engine tells (see `celery_outbox.outbox.tracking`).

    def write(self) -> None:
        """Insert what is staged: a commit or a savepoint is next."""
        connection = self.connection
        if not self._staged or connection is None:
            return
        staged, self._staged = self._staged, []
        self._written.extend(row["task"] for _, row in staged)
        staged[0][0].stage(connection, [row for _, row in staged])
        events.emit(events.STAGED, count=len(staged))

    def savepoint_rolled_back(self) -> None:
        """Forget what was staged since: the innermost savepoint, or one around it, is undone."""
        self._staged.clear()

    def ended(self, *, committed: bool) -> None:
        """The transaction is over."""
        # The engine's event is the same for rollback() and for close(). An exception in flight
        # means that somebody meant it.
        if not committed and not self._finished and sys.exc_info()[0] is None:
            _warn_uncommitted([*self._written, *(row["task"] for _, row in self._staged)])
        self._staged.clear()
        self._finished = True


def _refuse_textual_savepoint(connection: Connection, row: Row) -> None:
    scope = ConnectionScope.of(connection)
    if scope is not None and scope.textual_savepoint:
        raise UnusableTransaction(
            f"{row['task']} was sent in a transaction with a SAVEPOINT written as text, whose "
            "roll-back nobody would see: use begin_nested()"
        )


def _is_inside(transaction: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while transaction is not None and transaction is not outer:
        transaction = transaction.parent
    return transaction is outer


def _warn_uncommitted(tasks: list[str]) -> None:
    if tasks:
        logger.warning(
            "a transaction ended without commit, and %d message(s) with it: %s",
            len(tasks),
            ", ".join(sorted(set(tasks))),
        )


def _refuse_autocommit(connection: Connection, row: Row) -> None:
    level = connection.get_execution_options().get("isolation_level")
    if level is None:
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)
    try:
        driver = connection.connection.dbapi_connection
    except InvalidRequestError:
        driver = None
    # psycopg's own flag; sqlite3's is a number.
    if level == "AUTOCOMMIT" or (level is None and getattr(driver, "autocommit", None) is True):
        raise UnusableTransaction(
            f"{row['task']} was sent on a connection in AUTOCOMMIT mode, which has no transaction "
            "to share: use an engine without it, or send outside the session"
        )
