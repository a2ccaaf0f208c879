"""The outbox's tables between tests: made anew once, emptied often."""

from __future__ import annotations

from typing import Any

from kombu.transport import memory
from sqlalchemy import delete, text

from celery_outbox.plugin import Outbox

__all__ = ["empty", "rebuild"]

#: How long a transaction that a test has left open may hold up the next one, on PostgreSQL.
_PATIENCE = "10s"


def rebuild(outbox: Outbox) -> None:
    """Drop the outbox's tables, with everything in them, and create them. No other table is touched."""
    outbox.drop_schema()
    outbox.create_schema()


def empty(outbox: Outbox) -> None:
    """Delete all messages and records, and what lies in a broker in memory."""
    with outbox.engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SET LOCAL lock_timeout = '{_PATIENCE}'"))
        for table in outbox.tables.all():
            if table is not outbox.tables.version:
                connection.execute(delete(table))
    _empty_memory(outbox)


def _empty_memory(outbox: Outbox) -> None:
    with outbox.app.connection_for_write() as broker:
        if not isinstance(broker.transport, memory.Transport):
            return
        queues: dict[str, Any] = memory.Channel.queues
        for queue in queues.values():
            queue.queue.clear()
