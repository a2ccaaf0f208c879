"""Parking: a delivery whose first execution still runs waits in the worker's main process.

There it holds no slot, and is not counted in what the worker may fetch: other deliveries are handled
meanwhile. Given back at once it would come again at once, hundreds of times a second, and on RabbitMQ
before everything else.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from celery.exceptions import Reject

if TYPE_CHECKING:
    from collections.abc import Callable

    from celery import Celery

__all__ = ["Busy", "Parking", "park"]

#: More than so many are not fetched beside those that the worker may hold by itself.
_PLACES = 100

#: On the app itself, as its installation is.
_ATTRIBUTE = "_celery_outbox_parking"


class Busy(Reject):
    """The tracer's answer for a delivery that waits. Pickled on its way to the main process."""


class Parking(bootsteps.StartStopStep):
    """Lets deliveries wait in a worker, which is this step's parent: Celery's ``Consumer``."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._consumer = consumer
        self._taken = 0
        setattr(consumer.app, _ATTRIBUTE, self)

    def take(self, give_back: Callable[[], None], seconds: float) -> None:
        """Call `give_back` in `seconds`, in the worker's own loop. From any thread."""
        # After a reconnection there is another one, which never knew of this delivery.
        qos = self._consumer.qos
        has_place = self._taken < _PLACES
        if has_place:
            self._taken += 1
            qos.increment_eventually()

        def leave() -> None:
            if has_place:
                self._taken -= 1
                qos.decrement_eventually()
            give_back()

        consumer = self._consumer
        # A hub's timer is of the loop's own thread; without a hub it has a thread of its own.
        if consumer.hub:
            consumer.call_soon(consumer.timer.call_after, seconds, leave)
        else:
            consumer.timer.call_after(seconds, partial(consumer.call_soon, leave))


def park(app: Celery, give_back: Callable[[], None], seconds: float) -> None:
    """Let a delivery wait in the app's worker, if it has one; else give it back now."""
    parking: Parking | None = getattr(app, _ATTRIBUTE, None)
    if parking is None:
        give_back()
    else:
        parking.take(give_back, seconds)
