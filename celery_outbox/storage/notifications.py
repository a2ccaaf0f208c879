"""Notifications: a database tells at once that something was committed to the outbox."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Protocol

from sqlalchemy import Connection
from sqlalchemy.engine import TwoPhaseTransaction

__all__ = ["Listener", "channel_of", "may_notify"]

#: PostgreSQL's names are cut at 63 bytes.
_FITTING = re.compile(r"[a-z0-9_.]{1,49}")


class Listener(Protocol):
    """A connection on which notifications arrive; ready to be read when one has."""

    def fileno(self) -> int:
        """The connection's socket."""

    def heard(self) -> bool:
        """Take what has arrived; return whether anything has. Raises SQLAlchemy's errors."""

    def close(self) -> None:
        """End the connection."""


def channel_of(table: str) -> str:
    """Return the name of the channel that belongs to an outbox table."""
    if not _FITTING.fullmatch(table):
        table = sha256(table.encode()).hexdigest()[:32]
    return f"celery_outbox.{table}"


def may_notify(connection: Connection) -> bool:
    """Whether the transaction may notify: PostgreSQL prepares none that does."""
    return not isinstance(connection.get_transaction(), TwoPhaseTransaction)
