"""Channel: kombu's virtual channel, on the local queues of an outbox."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from queue import Empty
from typing import TYPE_CHECKING, Any

from amqp.protocol import queue_declare_ok_t
from kombu.transport import virtual

from celery_outbox.inbox.parking import Busy
from celery_outbox.local.holding import Holding
from celery_outbox.local.message import delivered, envelope_of, id_of, queued
from celery_outbox.storage.local import Delivery

if TYPE_CHECKING:
    from celery_outbox.local.hosts import Host

__all__ = ["Channel"]

logger = logging.getLogger("celery_outbox.local")

#: The most that is taken at once by who sets no limit.
_LARGEST = 100
#: How long a take may be put off until there is room for more, in seconds.
_LONGEST_DELAY = 0.1


class QoS(virtual.QoS):
    """Which deliveries are not acknowledged yet, and how many there may be."""

    def __init__(self, channel: Channel, prefetch_count: int = 0) -> None:
        # Not kombu's: it registers what must be put back when the interpreter ends. Leases end by
        # themselves.
        self.channel = channel
        self.prefetch_count = prefetch_count or 0
        self._delivered: OrderedDict[str, Any] = OrderedDict()
        self._dirty: set[str] = set()
        self._quick_ack = self._dirty.add
        self._quick_append = self._delivered.__setitem__

    @property
    def room(self) -> int:
        """How many more messages may be delivered now."""
        estimate = self.can_consume_max_estimate()
        return _LARGEST if estimate is None else min(estimate, _LARGEST)

    def ack(self, delivery_tag: str) -> None:
        """The message is handled."""
        self._quick_ack(delivery_tag)
        self.channel.holding.handled(id_of(delivery_tag))

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """The message is for another consumer, or for nobody."""
        self._quick_ack(delivery_tag)
        if requeue:
            message = self._delivered.get(delivery_tag)
            error = _why_back(getattr(message, "given_back_for", None))
            self.channel.holding.give_back(id_of(delivery_tag), error=error)
        else:
            self.channel.holding.handled(id_of(delivery_tag))

    def restore_unacked(self) -> list[Any]:
        """Give everything back."""
        self._flush()
        for tag in list(self._delivered):
            self.reject(tag, requeue=True)
        self._flush()
        return []

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Give everything back, for the channel is closed."""
        self.channel.holding.close()
        self._dirty.clear()
        self._delivered.clear()


def _why_back(reason: BaseException | None) -> str | None:
    """Say why a worker gave a message back; None where that does not count, for it will be handled."""
    if isinstance(reason, Busy):
        return None
    return "its worker gave it back" + ("" if reason is None else f": {reason}"[:2000])


class Channel(virtual.Channel):
    """A channel to local queues. A message that is published is there with its own commit."""

    QoS = QoS
    #: Bodies are stored as they are.
    body_encoding = None

    def __init__(self, connection: Any, **options: Any) -> None:
        super().__init__(connection, **options)
        self.host: Host = connection.host
        self.holding = Holding(
            self.host.local_store,
            self.host.config.local_lease_seconds,
            self.host.config.local_max_attempts,
            changed=connection.ring,
            keep_house=self.host.keep_house,
        )
        self._no_ack: set[str] = set()
        self._taken_at = 0.0

    # Publishing

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> None:
        envelope = envelope_of(message, self.host.time_zone)
        row = queued(envelope, queue, hold_scheduled=self.host.config.hold_scheduled)
        store = self.host.local_store
        with store.engine.begin() as connection:
            store.put(connection, [row])

    # Consuming

    def basic_consume(
        self,
        queue: str,
        no_ack: bool,
        callback: Callable[[Any], Any],
        consumer_tag: str,
        **options: Any,
    ) -> None:
        """Consume from a queue."""
        if no_ack:
            self._no_ack.add(queue)
        super().basic_consume(queue, no_ack, callback, consumer_tag, **options)

    def drain(self, deliver: Callable[[Any, str], Any]) -> int:
        """Deliver what there is and may be delivered; return how much that was."""
        room = self.qos.room if self._consumers else 0
        if not room or self._has_enough(room):
            # What is handled is deleted by the holding's keeper, or with the next take.
            return 0
        self._taken_at = time.monotonic()
        taken = self.holding.take(self._active_queues, room)
        left = list(reversed(taken))
        try:
            while left:
                delivery = left.pop()
                if (message := self._message(delivery)) is None:
                    continue
                if delivery.queue in self._no_ack:
                    self.holding.handled(delivery.id)
                deliver(message, delivery.queue)
        finally:
            # A callback has failed: those behind it were not delivered.
            for delivery in left:
                self.holding.give_back(delivery.id)
        return len(taken)

    def _has_enough(self, room: int) -> bool:
        """Whether to wait for more room: a take for each message would cost as much as its task.

        Where a worker takes ahead, all its slots are busy while half of that is in hand.
        """
        return (
            self.host.takes_ahead
            and room < self.qos.prefetch_count // 2
            and time.monotonic() - self._taken_at < _LONGEST_DELAY
        )

    @property
    def has_room(self) -> bool:
        """Whether a message that comes now would be delivered."""
        return bool(self._consumers) and self.qos.room > 0

    @property
    def is_holding(self) -> bool:
        """Whether a delivery is not acknowledged yet."""
        return bool(self.qos._delivered)

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        for delivery in self.holding.take([queue], 1):
            if (message := self._message(delivery)) is not None:
                return message
        raise Empty

    def basic_get(self, queue: str, no_ack: bool = False, **options: Any) -> Any:
        """Take one message, or none."""
        message = super().basic_get(queue, no_ack, **options)
        if message is not None and no_ack:
            self.holding.handled(id_of(message.delivery_tag))
        return message

    def _message(self, delivery: Delivery) -> dict[str, Any] | None:
        if delivery.envelope is None:
            # By a newer version, most likely; its own workers will take it.
            logger.error("%s", delivery.error)
            self.holding.give_back(delivery.id, self.host.config.backoff_cap_seconds)
            return None
        return delivered(delivery, delivery.envelope)

    # Queues: they are there as long as they have rows

    def queue_declare(
        self,
        queue: str | None = None,
        passive: bool = False,
        nowait: bool = False,
        **options: Any,
    ) -> Any:
        """Declare a queue: only this process remembers it. Counts its messages, unless `nowait`."""
        if nowait and queue:
            return queue_declare_ok_t(queue, 0, 0)
        return super().queue_declare(queue, passive, **options)

    def _size(self, queue: str) -> int:
        return self.host.local_store.size(queue)

    def _purge(self, queue: str) -> int:
        return self.host.local_store.purge(queue)
