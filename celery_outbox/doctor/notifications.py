"""Whether a notification of the database arrives, so that a commit can wake a relay."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from celery_outbox.doctor.finding import Finding, fine, warning

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from celery_outbox.plugin import Outbox

__all__ = ["check_notifications"]

#: How long one may take.
_ARRIVAL_SECONDS = 2.0
_PAUSE = 0.02


def check_notifications(outbox: Outbox) -> Iterator[Finding]:
    """What one connection notifies, another one hears. Only PostgreSQL has such a thing."""
    engine = outbox.engine
    if engine.dialect.name != "postgresql" or engine.dialect.driver != "psycopg":
        yield fine(f"{engine.dialect.name} has no notifications: relays poll")
        return
    if _arrives(engine, f"celery_outbox_doctor_{uuid.uuid4().hex}"):
        yield fine("a notification has arrived on another connection")
        return
    yield warning(
        "a notification did not arrive: something between here and PostgreSQL swallows LISTEN",
        "A pooler in transaction mode does. Give relays a URL that leads to the server itself; until "
        "then they poll, which costs up to outbox_poll_seconds for each message.",
    )


def _arrives(engine: Engine, channel: str) -> bool:
    heard: list[str] = []
    with engine.connect() as ear, engine.connect() as mouth:
        for connection in (ear, mouth):
            connection.execution_options(isolation_level="AUTOCOMMIT")
        driver: Any = ear.connection.driver_connection

        def hear(notification: Any) -> None:
            heard.append(notification.channel)

        ear.exec_driver_sql(f'LISTEN "{channel}"')
        driver.add_notify_handler(hear)
        try:
            mouth.exec_driver_sql(f'NOTIFY "{channel}"')
            deadline = time.monotonic() + _ARRIVAL_SECONDS
            while channel not in heard and time.monotonic() < deadline:
                # What has arrived is handed over with the answer to any statement.
                ear.exec_driver_sql("SELECT 1")
                time.sleep(0 if heard else _PAUSE)
        finally:
            driver.remove_notify_handler(hear)
            ear.exec_driver_sql(f'UNLISTEN "{channel}"')
    return channel in heard
