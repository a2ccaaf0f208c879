"""Everything that celery_outbox raises.

::

    OutboxError
    ├── ConfigurationError       a setting or an argument is wrong
    │   └── NotInstalled         a durable task belongs to an app without an Outbox
    ├── SchemaError              the tables are missing, or of another version
    ├── EnvelopeError            a message can't be stored, or a stored one can't be read
    ├── TransactionError         a message can't be staged where it was sent
    │   ├── NoTransaction        no transaction is current
    │   ├── AmbiguousTransaction more than one transaction is current
    │   └── UnusableTransaction  the current transaction can't keep the promise
    ├── TransactionLost          the database has rolled a durable task back under it
    └── CommitRefused            the database refused the commit of a durable task
"""

from __future__ import annotations

from kombu.exceptions import EncodeError

__all__ = [
    "AmbiguousTransaction",
    "CommitRefused",
    "ConfigurationError",
    "EnvelopeError",
    "NoTransaction",
    "NotInstalled",
    "OutboxError",
    "SchemaError",
    "TransactionError",
    "TransactionLost",
    "UnusableTransaction",
]


class OutboxError(Exception):
    """Something went wrong in celery_outbox."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class ConfigurationError(OutboxError):
    """A setting or an argument is wrong."""


class NotInstalled(ConfigurationError):
    """A durable task belongs to an app without an Outbox."""


class SchemaError(OutboxError):
    """The tables are missing, or of another version."""


class EnvelopeError(OutboxError):
    """A message can't be stored, or a stored one can't be read."""


class TransactionError(OutboxError):
    """A message can't be staged where it was sent."""


class NoTransaction(TransactionError):
    """No transaction is current: send inside one, or name it with ``outbox.using(session)``."""


class AmbiguousTransaction(TransactionError):
    """More than one transaction is current: name one with ``outbox.using(session)``."""


class UnusableTransaction(TransactionError):
    """The current transaction can't keep the promise that the message shares its fate."""


class TransactionLost(OutboxError):
    """The database has rolled the transaction back, and somebody has gone on as if it had not."""


class CommitRefused(OutboxError, EncodeError):
    """The database refused the commit of a durable task.

    Also kombu's ``EncodeError``, the one exception that every supported Celery turns into a
    failure of the task when it comes out of ``backend.mark_as_done``.
    """
