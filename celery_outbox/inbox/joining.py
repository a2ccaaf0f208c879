"""Joining: existing task code that opens its own sessions takes part in the task's transaction.

Its sessionmaker makes sessions that answer ``get_bind()`` with the task's connection. Inside a
durable task their ``commit()`` releases a savepoint; elsewhere they are as they were.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_outbox.inbox.transaction import current_transaction

__all__ = ["join_sessions_of"]


class _Joining:
    """Mixed into the session class of a sessionmaker."""

    def get_bind(self, *args: Any, **kwargs: Any) -> Any:
        bind = super().get_bind(*args, **kwargs)  # type: ignore[misc]
        transaction = current_transaction()
        connection = None if transaction is None else transaction.connection
        if connection is None or connection.engine is not bind.engine:
            return bind
        self.join_transaction_mode = "create_savepoint"
        return connection


def join_sessions_of(target: sessionmaker[Any] | scoped_session[Any]) -> None:
    """Let the sessions of `target` join. Safe to repeat."""
    maker = target.session_factory if isinstance(target, scoped_session) else target
    # A scoped_session may have any callable for a factory.
    if isinstance(maker, sessionmaker) and not issubclass(maker.class_, _Joining):
        kind: type[Session] = maker.class_
        maker.class_ = type(kind.__name__, (_Joining, kind), {})
