"""Current: which transaction a message goes with that is sent here and now."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, Engine, Table

from celery_outbox.errors import AmbiguousTransaction
from celery_outbox.outbox.scope import (
    ConnectionScope,
    Scope,
    SessionScope,
    named_scope,
    open_scopes,
)

__all__ = ["Current"]


class Current:
    """The open transactions of one outbox's database, in this context.

    `is_ours` tells whether an engine is one of that database, `table` is the outbox's.
    """

    def __init__(self, table: Table, is_ours: Callable[[Engine], bool]) -> None:
        self._table = table
        self._is_ours = is_ours

    def exists(self) -> bool:
        """Whether the caller is in a transaction, or has named one."""
        return named_scope() is not None or bool(self._scopes())

    def scope(self, task: str) -> Scope | None:
        """Return the one that is open; None if there is none.

        Raises `AmbiguousTransaction`, naming the task, if there are several.
        """
        scopes = self._scopes()
        in_sessions = [
            self._connection_of(scope) for scope in scopes if isinstance(scope, SessionScope)
        ]
        candidates = [
            scope
            for scope in scopes
            if not (isinstance(scope, ConnectionScope) and scope.connection in in_sessions)
        ]
        if len(candidates) > 1:
            raise AmbiguousTransaction(
                f"{task} was sent while {len(candidates)} transactions are open: say which one it "
                "goes with, with outbox.using(session)"
            )
        return candidates[0] if candidates else None

    def _scopes(self) -> list[Scope]:
        return [scope for scope in open_scopes() if self._has(scope)]

    def _has(self, scope: Scope) -> bool:
        if isinstance(scope, ConnectionScope):
            bind: Engine | Connection | None = scope.connection
        elif isinstance(scope, SessionScope):
            bind = scope.bind_for(self._table)
        else:
            bind = None
        return bind is not None and self._is_ours(bind.engine)

    def _connection_of(self, scope: SessionScope) -> Connection | None:
        """The connection on which the session works, or on which it will: the one it was given."""
        bind = scope.bind_for(self._table)
        return bind if isinstance(bind, Connection) else scope.connection
