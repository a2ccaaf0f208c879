"""Durable messaging for Celery apps: a transactional outbox and an idempotent inbox.

Imported at every start of ``celery`` and of pytest, by their entry points: a name is imported when it
is asked for, and what it needs with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

#: The modules of the names that are not in `celery_outbox.errors`.
_MODULES = {
    "Outbox": "plugin",
    "durable_task": "inbox.decorator",
    "current_session": "inbox.task",
    "DurableTask": "inbox.task",
    "Tally": "relay.loop",
    "Bypassed": "outbox.bypass",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES.get(name, 'errors')}")
    found: object = getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
