"""Structured log events: one name for each transition, with its details as fields of the log line.

For logs that machines read. The sentences that other loggers of the package write are for people.
"""

from __future__ import annotations

import logging
from typing import Any

from celery_outbox import events

__all__ = ["fields_of", "log_events"]

#: Transitions that somebody should look at; the others are logged at the level that is asked for.
_LEVELS = {
    events.DEAD: logging.ERROR,
    events.BROKER_AWAY: logging.WARNING,
    events.LEASE_LOST: logging.WARNING,
    events.STALLED: logging.WARNING,
}


def log_events(
    logger: logging.Logger | str = "celery_outbox.events", level: int = logging.INFO
) -> events.Listener:
    """Log every event of this process; call it once. Returns the listener, for `events.unsubscribe`.

    The message of a log line is the event's name after ``outbox.``, such as ``outbox.published``; the
    details are attributes of the record that begin with ``outbox_``, as ``extra`` gives them, so that
    formatters for JSON write them by themselves. No message's body or arguments are among them.
    """
    target = logging.getLogger(logger) if isinstance(logger, str) else logger

    def log(event: str, details: dict[str, Any]) -> None:
        weight = max(level, _LEVELS.get(event, level))
        if target.isEnabledFor(weight):
            target.log(weight, "outbox.%s", event, extra=fields_of(event, details))

    events.subscribe(log)
    return log


def fields_of(event: str, details: dict[str, Any]) -> dict[str, Any]:
    """Return the event as fields: plain values, each name with ``outbox_`` before it."""
    fields: dict[str, Any] = {"outbox_event": event}
    for name, value in events.plain(details).items():
        fields[f"outbox_{name}"] = value
    return fields
