"""Routing: which local queues a message is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kombu import Queue
from kombu.transport.virtual import BrokerState

from celery_outbox.declaration import thaw

if TYPE_CHECKING:
    from celery_outbox.envelope import Envelope

__all__ = ["Routing"]


class Routing:
    """The local queues of one app, and the exchanges that lead to them.

    `names` are the queues that are local; None: every queue is, for the app has no broker. `queues`
    gives those that the app's settings define, and `channel` one to ask for bindings, without
    connecting.

    What is bound is known to this process alone, by the app's settings and by the declarations that
    come with a message, as in kombu's own embedded transports.
    """

    def __init__(
        self,
        names: frozenset[str] | None,
        queues: Callable[[], Mapping[str, Queue]],
        channel: Callable[[], Any],
    ) -> None:
        self.names = names
        #: Exchanges and bindings, also of the app's connections (see `celery_outbox.local.transport`).
        self.state = BrokerState()
        self._queues = queues
        self._make_channel = channel
        self._channel: Any = None
        self._declared: set[str] = set()

    @property
    def has_everything(self) -> bool:
        """Whether the app has no other broker."""
        return self.names is None

    def has(self, queue: str | None) -> bool:
        """Whether the queue is local."""
        return queue is not None and (self.names is None or queue in self.names)

    def queues_of(self, envelope: Envelope) -> list[str]:
        """Return the local queues that a message is for."""
        if not envelope.exchange:
            return [envelope.routing_key] if self.has(envelope.routing_key) else []
        if self.names is not None and not self.names:
            return []
        for entity in envelope.declare:
            if entity["kind"] == "queue" and self.has(entity["name"]):
                self._declare(repr(entity), thaw(entity))
        return self._bound(envelope.exchange, envelope.routing_key)

    def is_local(self, options: Mapping[str, Any], default: str | None) -> bool:
        """Whether a message is for a local queue, by the options that Celery's sender is given."""
        queue, exchange = options.get("queue"), options.get("exchange")
        name, routing_key = getattr(exchange, "name", exchange), options.get("routing_key")
        # Celery adds its default queue to an exchange, and uses the exchange.
        if name and routing_key:
            return bool(self._bound(name, routing_key))
        if queue is not None:
            return self.has(getattr(queue, "name", queue))
        return self.has(default if exchange is None else routing_key)

    def _bound(self, exchange: str, routing_key: str) -> list[str]:
        for name, queue in self._queues().items():
            if self.has(name):
                self._declare(name, queue)
        found = self._ask()._lookup(exchange, routing_key)
        return sorted(name for name in found if self.has(name))

    def _declare(self, known_as: str, queue: Any) -> None:
        if known_as not in self._declared and queue.exchange:
            queue(self._ask()).declare(nowait=True)
            self._declared.add(known_as)

    def _ask(self) -> Any:
        if self._channel is None:
            self._channel = self._make_channel()
        return self._channel
