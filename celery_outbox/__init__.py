"""Durable messaging for Celery apps: a transactional outbox and an idempotent inbox."""

from celery_outbox.errors import (
    AmbiguousTransaction,
    CommitRefused,
    ConfigurationError,
    EnvelopeError,
    NotInstalled,
    NoTransaction,
    OutboxError,
    SchemaError,
    TransactionError,
    TransactionLost,
    UnusableTransaction,
)
from celery_outbox.inbox.decorator import durable_task
from celery_outbox.inbox.task import DurableTask, current_session
from celery_outbox.outbox.bypass import Bypassed
from celery_outbox.plugin import Outbox
from celery_outbox.relay.loop import Tally

__all__ = [  # noqa: RUF022 (by subject)
    # What users create and write
    "Outbox",
    "durable_task",
    "current_session",
    "DurableTask",
    # What comes back
    "Tally",
    # Errors
    "OutboxError",
    "ConfigurationError",
    "NotInstalled",
    "SchemaError",
    "EnvelopeError",
    "TransactionError",
    "NoTransaction",
    "AmbiguousTransaction",
    "UnusableTransaction",
    "TransactionLost",
    "CommitRefused",
    "Bypassed",
]

__version__ = "0.1.0"
