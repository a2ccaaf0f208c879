"""What can happen to an envelope or a delivery: names, and who listens.

Logs, metrics and fault tests subscribe; nothing in the package depends on a subscriber.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

__all__ = ["Listener", "emit", "listening", "plain", "subscribe", "unsubscribe"]

logger = logging.getLogger("celery_outbox")

Listener = Callable[[str, dict[str, Any]], None]

# Outgoing.
STAGED: Final = (
    "staged"  # count: written, in the caller's transaction if there is one, before its commit
)
LEFT_TO_RELAY: Final = "left_to_relay"  # count: the fast path does not get to them
CLAIMED: Final = "claimed"  # count, rows: taken under a lease
PUBLISHED: Final = "published"  # count, rows, outcomes: by row id; they are not settled yet
SETTLED: Final = "settled"  # tally
LEASE_LOST: Final = "lease_lost"  # count: another relay has taken them since
DEAD: Final = "dead_letter"  # task, task_id, error
STALLED: Final = "stalled"  # destination, error: it takes nothing, and is left alone for a while
BROKER_AWAY: Final = "broker_away"  # error
PRUNED: Final = "pruned"  # table, count
# Local queues.
TAKEN: Final = "taken"  # count: by a worker, under a lease
DROPPED: Final = "dropped"  # count: handled, and deleted
# Incoming.
HANDLING: Final = "handling"  # key: the inbox row is claimed, the body will run
COMMITTING: Final = "committing"  # key, state: just before the one commit
HANDLED: Final = "handled"  # key, state: just after it
DUPLICATE: Final = "duplicate"  # key, state: answered from the record
BUSY: Final = "busy"  # key, error: given back to the broker

_listeners: list[Listener] = []


def subscribe(listener: Listener) -> None:
    """Call `listener(name, details)` for every event of this process, in the thread of the event."""
    _listeners.append(listener)


def unsubscribe(listener: Listener) -> None:
    """Undo `subscribe`."""
    _listeners.remove(listener)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Subscribe for the time of the block."""
    subscribe(listener)
    try:
        yield
    finally:
        unsubscribe(listener)


def emit(event: str, **details: Any) -> None:
    """Tell every listener. What a listener raises is raised here: fault tests rely on that."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s %s", event, plain(details))
    for listener in tuple(_listeners):
        listener(event, details)


def plain(details: dict[str, Any]) -> dict[str, Any]:
    """Return what can be logged of an event: plain values, of a tally its numbers; no message."""
    found: dict[str, Any] = {}
    for name, value in details.items():
        if isinstance(value, str | int | float | bool) or value is None:
            found[name] = value
        elif name == "tally":
            found.update(dataclasses.asdict(value))
    return found
