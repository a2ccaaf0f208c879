"""Backlog: how much work is still to be done, asked of the database and of the broker."""

import time
from dataclasses import dataclass

from celery import Celery
from kombu import Connection, Queue
from shop.models import Base
from shop.settings import Settings
from sqlalchemy import Engine

from celery_outbox import Outbox

__all__ = ["Backlog", "Books"]


@dataclass(frozen=True)
class Backlog:
    """Messages by where they wait."""

    outbox: int
    dead: int
    queue: int

    @property
    def total(self) -> int:
        """How many messages wait to be handled."""
        return self.outbox + self.queue


class Books:
    """Looks into the shop's database and queue from outside, without a part in its work."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._app = Celery("books", set_as_current=False)
        self._app.conf.update(settings.celery(), outbox_relay_tick_seconds=0)
        self._outbox = Outbox(self._app, engine) if settings.outbox else None
        self._queue: Queue = self._app.amqp.queues[self._app.conf.task_default_queue]
        self._connection: Connection = self._app.connection_for_write()

    def declare_queue(self) -> None:
        """Declare the queue before several processes do so at once."""
        self._queue(self._connection.default_channel).declare()

    def clear(self, engine: Engine) -> None:
        """Drop the tables and the queue with all that is in them."""
        self._queue(self._connection.default_channel).delete()
        Base.metadata.drop_all(engine)
        if self._outbox is not None:
            self._outbox.drop_schema()

    def backlog(self) -> Backlog:
        """Count what waits."""
        # Declared once more, not passively: an empty queue does not exist in Redis.
        name = self._queue.name
        declared = self._connection.default_channel.queue_declare(
            name, durable=True, auto_delete=False
        )
        queue = declared.message_count
        if self._outbox is None:
            return Backlog(0, 0, queue)
        counts = self._outbox.store.counts()
        stored = sum(counts[name] for name in ("outgoing", "scheduled", "in_flight", "published"))
        return Backlog(stored, counts["dead"], queue)

    def await_relay(self, seconds: float) -> None:
        """Return at the moment when a relay has claimed messages, or when the time is over."""
        deadline = time.monotonic() + seconds
        while self._outbox is not None and time.monotonic() < deadline:
            if self._outbox.store.counts()["in_flight"]:
                return
            time.sleep(0.001)

    def close(self) -> None:
        """Close the connection to the broker."""
        self._connection.release()
