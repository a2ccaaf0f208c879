"""Tracking: what SQLAlchemy tells of its transactions, turned into scopes.

Sessions are watched through their class, for a session's first transaction must be seen; engines
one by one, for a listener makes each statement of an engine a little slower.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.orm import Session, SessionTransaction

from celery_outbox.outbox.scope import ConnectionScope, SessionScope, enter, leave

__all__ = ["watch_engine", "watch_every_engine", "watch_sessions"]

_watched: WeakSet[Engine | type[Engine]] = WeakSet()


def watch_sessions() -> None:
    """Follow the transactions of every ORM session of this process. Safe to repeat."""
    for name, listener in _SESSION_EVENTS.items():
        if not event.contains(Session, name, listener):
            event.listen(Session, name, listener)


def watch_engine(engine: Engine) -> None:
    """Follow the transactions of this engine's connections. Safe to repeat."""
    if Engine in _watched:
        return
    # An engine.execution_options() hears what its engine hears: listening to both is hearing twice.
    while isinstance(engine, OptionEngine):
        engine = engine._proxied
    if engine not in _watched:
        _watched.add(engine)
        for name, listener in _ENGINE_EVENTS.items():
            event.listen(engine, name, listener)


def watch_every_engine() -> None:
    """Follow the connections of all engines, where it is not known yet which is the outbox's."""
    if Engine not in _watched:
        for name, listener in _ENGINE_EVENTS.items():
            for engine in _watched:
                event.remove(engine, name, listener)
            event.listen(Engine, name, listener)
        _watched.clear()
        _watched.add(Engine)


def _scope_of(session: Session) -> SessionScope | None:
    scope: SessionScope | None = session.info.get(SessionScope)
    return scope


def _transaction_created(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        scope = session.info[SessionScope] = SessionScope(session)
        enter(scope)


def _transaction_began(
    session: Session, transaction: SessionTransaction, connection: Connection
) -> None:
    if scope := _scope_of(session):
        scope.began(transaction, connection)
        enter(scope)  # the session may have been made in another thread or context


def _before_commit(session: Session) -> None:
    # Also told for a savepoint that is about to be released.
    if (scope := _scope_of(session)) and not session.in_nested_transaction():
        scope.before_commit()


def _after_rollback(session: Session) -> None:
    # Also told for a savepoint; and not told for a session that is closed.
    if (scope := _scope_of(session)) and not session.in_nested_transaction():
        scope.rolled_back()


def _after_commit(session: Session) -> None:
    # Also told for a released savepoint.
    if scope := _scope_of(session):
        if savepoint := session.get_nested_transaction():
            scope.savepoint_released(savepoint)
        else:
            scope.committed()


def _transaction_ended(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is not None:
        # However it ended: a savepoint that is closed, or whose flush failed, is told of only here.
        if transaction.nested and (scope := _scope_of(session)):
            scope.savepoint_ended(transaction)
    elif scope := session.info.pop(SessionScope, None):
        scope.ended()
        leave(scope)


_SESSION_EVENTS: dict[str, Any] = {
    "after_transaction_create": _transaction_created,
    "after_begin": _transaction_began,
    "before_commit": _before_commit,
    "after_rollback": _after_rollback,
    "after_commit": _after_commit,
    "after_transaction_end": _transaction_ended,
}


def _begin(connection: Connection, _xid: object = None) -> None:
    enter(ConnectionScope(connection))


def _write(connection: Connection, *_: object) -> None:
    if scope := ConnectionScope.of(connection):
        scope.write()


def _savepoint(connection: Connection, _name: str) -> None:
    _write(connection)
    connection.info["celery_outbox_savepoint"] = True


def _rollback_savepoint(connection: Connection, *_: object) -> None:
    if scope := ConnectionScope.of(connection):
        scope.savepoint_rolled_back()


def _prepare(connection: Connection, _xid: object) -> None:
    if scope := ConnectionScope.of(connection):
        scope.write()
        scope.prepared = True


def _commit(connection: Connection) -> None:
    _write(connection)
    _end(connection, committed=True)


def _commit_twophase(connection: Connection, _xid: object, is_prepared: bool) -> None:
    if not is_prepared:
        _write(connection)
    _end(connection, committed=True)


def _rollback(connection: Connection, *_: object) -> None:
    _end(connection, committed=False)


def _end(connection: Connection, *, committed: bool) -> None:
    if scope := ConnectionScope.of(connection):
        scope.ended(committed=committed)
        leave(scope)


def _before_cursor_execute(
    connection: Connection, _cursor: object, statement: str, *_: object
) -> None:
    if statement.lstrip()[:9].upper() == "SAVEPOINT":
        announced = connection.info.pop("celery_outbox_savepoint", False)
        if not announced and (scope := ConnectionScope.of(connection)):
            scope.write()
            scope.textual_savepoint = True


_ENGINE_EVENTS: dict[str, Any] = {
    "begin": _begin,
    "begin_twophase": _begin,
    "prepare_twophase": _prepare,
    "savepoint": _savepoint,
    "rollback_savepoint": _rollback_savepoint,
    "commit": _commit,
    "commit_twophase": _commit_twophase,
    "rollback": _rollback,
    "rollback_twophase": _rollback,
    "before_cursor_execute": _before_cursor_execute,
}
