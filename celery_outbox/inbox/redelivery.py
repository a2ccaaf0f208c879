"""Redelivery: for how long after a delivery the broker may deliver the same message again.

The inbox has to remember what it handled for longer than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery import Celery

    from celery_outbox.config import Config

__all__ = ["Window", "redelivery_window"]

#: What these transports of kombu do when they are told nothing, in seconds.
_VISIBILITY = {"redis": 3600.0, "sqs": 1800.0}
#: RabbitMQ's consumer_timeout unless rabbitmq.conf says otherwise, which no client can ask.
_CONSUMER_TIMEOUT = 1800.0


@dataclass(frozen=True, slots=True)
class Window:
    """So many seconds, and what says so."""

    seconds: float
    reason: str
    #: False: the broker's default, which its administrator may have changed.
    is_certain: bool = True


def redelivery_window(app: Celery, config: Config) -> Window | None:
    """Return the app's window without asking the broker; None where nothing is known of one.

    A message that is redelivered may have to wait for a worker as well: the window is the least.
    """
    if config.redelivery_window_seconds is not None:
        return Window(config.redelivery_window_seconds, "outbox_redelivery_window_seconds")
    with app.connection_for_read() as connection:
        kind = connection.transport.driver_type
    if kind == "amqp":
        return _of_rabbitmq(app)
    if kind in _VISIBILITY:
        options: dict[str, Any] = app.conf.broker_transport_options or {}
        seconds = float(options.get("visibility_timeout") or _VISIBILITY[kind])
        return Window(seconds, "broker_transport_options['visibility_timeout']")
    return None


def _of_rabbitmq(app: Celery) -> Window:
    """A queue's own timeout, which is in milliseconds, or else the broker's."""
    longest = Window(_CONSUMER_TIMEOUT, "consumer_timeout (RabbitMQ's default)", is_certain=False)
    for queue in app.amqp.queues.values():
        timeout = (queue.queue_arguments or {}).get("x-consumer-timeout")
        if isinstance(timeout, int) and timeout / 1000 > longest.seconds:
            longest = Window(timeout / 1000, f"x-consumer-timeout of the queue {queue.name!r}")
    return longest
