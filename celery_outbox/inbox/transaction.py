"""InboxTransaction: what a durable task writes, sends and returns, in one commit.

It begins with the inbox row, by which one execution is told from another, and ends with the outcome
in that row. A failed body is rolled back whole, inbox row included; its failure, its retry message
or its error callbacks are then recorded in a second, short transaction that claims the row again.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from celery._state import get_current_worker_task
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_outbox import events
from celery_outbox.envelope import application_id, message_key
from celery_outbox.errors import CommitRefused
from celery_outbox.inbox.savepoint import FirstSavepoint
from celery_outbox.outbox.scope import SessionScope, naming, open_scopes
from celery_outbox.storage.store import Handled, Store

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from celery_outbox.inbox.installation import Installation
    from celery_outbox.inbox.outcome import Outcome

__all__ = [
    "AnsweredElsewhere",
    "GivenBack",
    "InExecution",
    "InboxTransaction",
    "current_transaction",
    "new_application",
]

_current: ContextVar[InboxTransaction | None] = ContextVar("celery_outbox_inbox", default=None)


def current_transaction() -> InboxTransaction | None:
    """Return the transaction of the durable task that runs in this context."""
    return _current.get()


def new_application(described: Mapping[str, Any]) -> str | None:
    """Return an id for a message that is sent now, or None if it may be sent again by a redelivery.

    What is sent in a durable task's transaction, or by an app outside any task, is sent once, so that
    the same signature sent twice is meant twice. What a stock task sends, or the result backend after
    a commit (the body of a chord), is sent again when its message is redelivered, and then is the
    same by its frozen task id. `described` are the headers of the message.
    """
    transaction = _current.get()
    if transaction is None:
        return None if get_current_worker_task() else uuid.uuid4().hex
    if transaction.state is not None:
        return None
    is_retry = described["id"] == transaction.task_id and described.get("retries")
    return transaction.application if is_retry else uuid.uuid4().hex


class GivenBack(BaseException):
    """The delivery goes back to the broker: the database was away, or the outcome is unknown.

    No `Exception`, so that it passes through Celery's tracer, which would make it a failure.
    """


class InExecution(GivenBack):
    """Another delivery of the same message is executed: this one comes again when it may be over."""


class AnsweredElsewhere(BaseException):
    """A concurrent delivery of the same message has committed: this one is the duplicate."""

    def __init__(self, handled: Handled) -> None:
        self.handled = handled


class InboxTransaction:
    """The transaction of one execution of a durable task. Also the scope of what it sends."""

    def __init__(
        self,
        installation: Installation,
        request: Mapping[str, Any],
        *,
        holds_session: bool,
        part: str = "",
    ) -> None:
        self.key = message_key(request, part)
        self.application = application_id(request)
        self.task_id = str(request["id"])
        self.task = str(request.get("task", ""))
        #: Whether the body has been entered; another task that it calls is part of it.
        self.entered = False
        self._in_body = False
        #: What the body returned, once that is committed.
        self.result: Any = None
        #: The state that was committed.
        self.state: str | None = None
        self._retry_key = message_key({**request, "retries": (request.get("retries") or 0) + 1})
        self._installation = installation
        self._holds_session = holds_session
        self._connection: Connection | None = None
        self._session: Session | None = None
        self._savepoint: FirstSavepoint | None = None
        self._staged: list[Mapping[str, Any]] = []
        self._scopes: list[SessionScope] = []
        self._retry: list[Mapping[str, Any]] = []

    # The journey

    def begin(self) -> Handled | None:
        """Claim the execution, or return the record of it.

        Raises `InExecution` while another delivery of the same message is executed.
        """
        store = self._installation.store
        if not self._holds_session:
            with store.engine.connect() as connection:
                return store.handled(connection, self.key)
        return self._claim(store, briefly=True)

    def _claim(self, store: Store, *, briefly: bool = False) -> Handled | None:
        connection = store.engine.connect()
        try:
            connection.begin()
            # Nothing is lost yet when it begins; at the end a body would have run in vain.
            with store.dialect.waiting_briefly(connection) if briefly else nullcontext():
                handled = self._receive(store, connection)
            if handled is None:
                self._connection = connection
                if FirstSavepoint.suits(connection):
                    self._savepoint = FirstSavepoint(connection, self._claim_again)
                events.emit(events.HANDLING, key=self.key)
        finally:
            if self._connection is None:
                connection.close()
        return handled

    def _receive(self, store: Store, connection: Connection) -> Handled | None:
        if store.receive(connection, self.key, self.task, self.task_id):
            return None
        handled = store.handled(connection, self.key)
        if handled is None:
            raise InExecution(f"{self.task}[{self.task_id}] is being executed by another delivery")
        return handled

    def _claim_again(self) -> None:
        """Claim, in the same connection, what a session of the body has rolled back."""
        assert self._connection is not None
        if handled := self._receive(self._installation.store, self._connection):
            raise AnsweredElsewhere(handled)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the transaction of the task that runs, and of everything that it sends."""
        token = _current.set(self)
        try:
            with naming(self):
                yield
        finally:
            _current.reset(token)
            if self.state is None:
                self.roll_back()
            self._close()

    @property
    def connection(self) -> Connection | None:
        """The connection of the open transaction."""
        return self._connection

    @property
    def session(self) -> Session | None:
        """A session in this transaction: its commits are savepoints, the real one follows the body."""
        if self._session is None and self._connection is not None:
            self._session = self._installation.make_session(self._connection)
        return self._session

    def leave_body(self) -> None:
        """The body has ended well: what its session holds is written now, and may still fail it."""
        if self._session is not None:
            self._session.commit()
        for scope in self._scopes:
            self._staged.extend(scope.hand_over())
        self._scopes.clear()
        self._in_body = False

    def is_open(self) -> bool:
        return True

    def stage(self, store: Store, row: Mapping[str, Any]) -> None:
        if self.state is not None:
            # Sent by a signal handler or the result backend after the commit.
            store.stage_alone(row)
        elif row["key"] == self._retry_key:
            self._retry.append(row)
        elif scope := self._session_scope(store):
            # A session of the body's own, or a savepoint in it, may still be rolled back. If it is
            # only closed, the message goes with the task.
            scope.heir = self._staged.extend
            if scope not in self._scopes:
                self._scopes.append(scope)
            scope.stage(store, row)
        else:
            self._staged.append(row)

    def _session_scope(self, store: Store) -> SessionScope | None:
        """The innermost open session of the body that works in this transaction."""
        if not self._in_body or self._connection is None:
            return None
        sessions = [scope for scope in open_scopes() if isinstance(scope, SessionScope)]
        for scope in reversed(sessions):
            if scope.bind_for(store.tables.outbox) is self._connection:
                return scope
        return None

    def enter_body(self) -> None:
        """The body begins."""
        self.entered = self._in_body = True

    def roll_back(self) -> None:
        """Undo what the body wrote and sent, but for its own retry message."""
        for scope in self._scopes:
            scope.hand_over()
        self._scopes.clear()
        self._staged.clear()
        self._in_body = False
        self._close()

    def commit(self, state: str, outcome: Outcome | None = None) -> None:
        """Write what was sent and the outcome, and commit everything.

        Raises `CommitRefused` if the database refuses, `GivenBack` if it is away or has not answered
        (whether it did commit, the next delivery finds in the inbox), and `AnsweredElsewhere`.
        """
        store = self._installation.store
        try:
            if self._connection is None and (handled := self._claim(store)):
                raise AnsweredElsewhere(handled)
            connection = self._connection
            assert connection is not None
            if self._savepoint is not None:
                self._savepoint.claim_again()
            if rows := [*self._staged, *self._retry]:
                store.stage(connection, rows)
            text = None if outcome is None else outcome.dump()
            with self._recording(store, connection, state, text):
                events.emit(events.COMMITTING, key=self.key, state=state)
                _commit(connection)
        except (OperationalError, InterfaceError, PoolTimeout) as exc:
            raise GivenBack(f"the database did not take the commit: {exc}") from exc
        except DBAPIError as exc:
            if exc.connection_invalidated:
                raise GivenBack(f"the database went away: {exc.orig}") from exc
            raise CommitRefused(
                f"the database refused the commit of {self.task}[{self.task_id}]: {exc.orig}"
            ) from exc
        except Exception as exc:
            # A soft time limit, most likely: it may strike before or after the COMMIT took effect.
            raise GivenBack(f"the commit was interrupted: {exc!r}") from exc
        self.state = state
        self._close()
        events.emit(events.HANDLED, key=self.key, state=state)

    def _recording(
        self, store: Store, connection: Connection, state: str, text: str | None
    ) -> AbstractContextManager[None]:
        """Write the outcome into the inbox row, with the block's commit."""
        keeps = self._installation.config.keep_until_handled
        return store.recording(connection, self.key, state, text, forget=keeps)

    def forget(self) -> None:
        """Undo everything, and let a kept envelope not be sent again: nobody wants the message."""
        self.roll_back()
        store = self._installation.store
        if self._installation.config.keep_until_handled:
            with store.engine.begin() as connection:
                store.forget(connection, self.key)

    def broken(self) -> bool:
        """Whether the connection was lost under the body."""
        return self._connection is not None and self._connection.invalidated

    def _close(self) -> None:
        session, self._session = self._session, None
        connection, self._connection = self._connection, None
        savepoint, self._savepoint = self._savepoint, None
        if savepoint is not None:
            savepoint.end()
        # A broken connection may fail to close or roll back: the database has done it already.
        if session is not None:
            with suppress(DBAPIError):
                session.close()
        if connection is not None:
            # The body may have left a session open, which a traceback still holds.
            for scope in open_scopes():
                if isinstance(scope, SessionScope) and scope.connection is connection:
                    scope.rolled_back()
            with suppress(DBAPIError):
                connection.close()
        if savepoint is not None:
            savepoint.detach()


def _commit(connection: Connection) -> None:
    """Commit, or leave nothing open that the next user of the pooled connection would commit.

    SQLAlchemy takes a transaction for ended when its commit has raised anything: what a listener
    raised, or a soft time limit before the COMMIT was sent.
    """
    try:
        connection.commit()
    except BaseException:
        try:
            connection.dialect.do_rollback(connection.connection)
        except Exception as exc:
            connection.invalidate(exc)
        raise
