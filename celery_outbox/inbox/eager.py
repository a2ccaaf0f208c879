"""Eager execution: ``task_always_eager`` and ``task.apply()``, by the rules of a worker's transaction.

What a failed attempt has written and sent is rolled back, and only that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from celery import states
from celery.exceptions import Ignore

from celery_outbox.inbox.transaction import GivenBack, InboxTransaction, current_transaction
from celery_outbox.outbox.scope import ConnectionScope, SessionScope, open_scopes
from celery_outbox.storage.engine import is_same_database

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from celery_outbox.inbox.installation import Installation
    from celery_outbox.inbox.outcome import Outcome
    from celery_outbox.storage.store import Handled, Store

__all__ = ["run_eagerly"]


def run_eagerly(
    installation: Installation,
    request: Mapping[str, Any],
    body: Callable[[], Any],
    *,
    holds_session: bool,
) -> Any:
    """Run a body at the call: in a savepoint of the caller's transaction, or in one of its own.

    Not promised: where the caller has several transactions open, or an asyncio one, in which nothing
    may be written here, there is no savepoint, and what a failed body has written stays with them.
    """
    ignored: Ignore | None = None
    returned: Any = None
    with _transaction(installation, request, holds_session=holds_session):
        try:
            returned = body()
        except Ignore as exc:
            # replace() ends like this, and what was written and sent before counts.
            ignored = exc
    if ignored is not None:
        raise ignored
    return returned


def _transaction(
    installation: Installation, request: Mapping[str, Any], *, holds_session: bool
) -> AbstractContextManager[Any]:
    store = installation.store
    if (outer := current_transaction()) is not None:
        session = outer.session
        return nullcontext() if session is None else _savepoint_of(store, session)
    scopes = [scope for scope in open_scopes() if _bind_of(scope, store) is not None]
    if not scopes:
        return _of_its_own(installation, request, holds_session=holds_session)
    sessions = [scope for scope in scopes if isinstance(scope, SessionScope)]
    if len(sessions) > 1 or any(_bind_of(scope, store).dialect.is_async for scope in scopes):
        return nullcontext()
    if sessions:
        session = sessions[0].session
        return nullcontext() if session is None else _savepoint_of(store, session)
    connections = [scope.connection for scope in scopes if isinstance(scope, ConnectionScope)]
    if len(connections) == 1 and connections[0] is not None:
        store.dialect.before_savepoint(connections[0])
        return connections[0].begin_nested()
    return nullcontext()


def _bind_of(scope: Any, store: Store) -> Any:
    """The engine or connection of a scope, if it is of the outbox's database."""
    if isinstance(scope, SessionScope):
        bind: Any = scope.bind_for(store.tables.outbox)
    else:
        bind = getattr(scope, "connection", None)
    return bind if bind is not None and is_same_database(bind.engine, store.engine) else None


@contextmanager
def _savepoint_of(store: Store, session: Session) -> Iterator[None]:
    store.dialect.before_savepoint(
        session.connection(bind_arguments={"clause": store.tables.outbox})
    )
    with session.begin_nested():
        yield


@contextmanager
def _of_its_own(
    installation: Installation, request: Mapping[str, Any], *, holds_session: bool
) -> Iterator[None]:
    transaction = EagerTransaction(installation, request, holds_session=holds_session)
    try:
        with transaction.active():
            transaction.enter_body()
            yield
            transaction.leave_body()
            transaction.commit(states.SUCCESS)
    except GivenBack as exc:
        # There is no broker to give it back to: a failure like any other.
        raise exc.__cause__ or RuntimeError(str(exc)) from exc


class EagerTransaction(InboxTransaction):
    """The transaction of a body that is executed at the call: no delivery, so no row in the inbox.

    It begins with the first use of the database: a body that needs none runs without one.
    """

    @property
    def connection(self) -> Connection | None:
        if self._connection is None and self._in_body and self._holds_session:
            self._claim(self._installation.store)
        return self._connection

    @property
    def session(self) -> Session | None:
        return super().session if self.connection is not None else None

    def commit(self, state: str, outcome: Outcome | None = None) -> None:
        if self._connection is None and not self._staged:
            self.state = state
            return
        super().commit(state, outcome)

    def _receive(self, store: Store, connection: Connection) -> Handled | None:
        # Where a worker's first statement is its inbox row, here it may be a session's savepoint.
        store.dialect.before_savepoint(connection)
        return None

    def _recording(
        self, store: Store, connection: Connection, state: str, text: str | None
    ) -> AbstractContextManager[None]:
        # There is no row.
        return nullcontext()
