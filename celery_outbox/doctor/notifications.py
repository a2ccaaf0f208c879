"""Whether a notification of the database arrives, so that a commit can wake a relay."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from celery_outbox.doctor.finding import Finding, fine, warning

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox
    from celery_outbox.storage.notifications import Listener
    from celery_outbox.storage.store import Store

__all__ = ["check_notifications"]

#: How long one may take.
_ARRIVAL_SECONDS = 2.0


def check_notifications(outbox: Outbox) -> Iterator[Finding]:
    """What one connection notifies, another one hears, as a relay does. It wakes the relays."""
    listener = outbox.store.listen()
    if listener is None:
        yield fine(f"{outbox.engine.dialect.name} has no notifications: relays poll")
        return
    try:
        arrives = _arrives(outbox.store, listener)
    finally:
        listener.close()
    if arrives:
        yield fine("a notification has arrived on another connection")
        return
    yield warning(
        "a notification did not arrive: something between here and PostgreSQL swallows LISTEN",
        "A pooler in transaction mode does. Give relays a URL that leads to the server itself; until "
        "then they poll, which costs up to outbox_poll_seconds for each message.",
    )


def _arrives(store: Store, listener: Listener) -> bool:
    store.notify()
    deadline = time.monotonic() + _ARRIVAL_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        select.select([listener], [], [], left)
        if listener.heard():
            return True
    return False
