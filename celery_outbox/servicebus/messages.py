"""Messages as Azure Service Bus gets them: where to, under which id, in kombu's form."""

from __future__ import annotations

from collections.abc import Collection
from hashlib import sha256
from typing import Any

from kombu import Exchange
from kombu.utils.json import dumps

from celery_outbox.declaration import thaw
from celery_outbox.envelope import Envelope

__all__ = ["Routing", "body_of", "message_id"]

#: The longest that Service Bus takes.
_LONGEST_ID = 128


def message_id(number: int, envelope: Envelope) -> str:
    """Return the MessageId of the outbox row `number`: the same whenever it is published.

    By it a queue with duplicate detection knows a repeated send. Two rows differ, those of two
    outboxes that share a queue too: the sender's process is part of it.
    """
    sender = f"{envelope.headers.get('origin')} {envelope.properties.get('reply_to')}"
    digest = sha256(f"{envelope.key} {number} {sender} ".encode() + envelope.body).hexdigest()
    readable = f"{envelope.task_id}:{number}:{digest[:16]}"
    return readable if len(readable) <= _LONGEST_ID else digest


def body_of(channel: Any, message: dict[str, Any], envelope: Envelope) -> str:
    """Return a message that kombu's channel has prepared as its transport would write it."""
    channel._inplace_augment_message(message, envelope.exchange, envelope.routing_key)
    return str(dumps(message))


class Routing:
    """Exchanges and bindings, which kombu keeps in the process on this transport.

    They are learnt from what envelopes declare. Nothing is declared at the broker: that would take
    the right to manage it, where the right to send is enough.
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._known: set[str] = set()

    def queues(self, envelope: Envelope) -> Collection[str]:
        """Return the broker's names of the queues that a message is for.

        Raises `LookupError` for an exchange that leads nowhere, or that can't be had here.
        """
        if not envelope.exchange:
            return [self._name(envelope.routing_key)]
        for entity in envelope.declare:
            self._learn(dict(entity))
        if self._channel.typeof(envelope.exchange).type == "fanout":
            raise LookupError("Service Bus queues have no fanout exchange")
        found = self._channel._lookup(envelope.exchange, envelope.routing_key)
        if not found:
            raise LookupError(f"unroutable: no queue is bound for {envelope.destination!r}")
        return sorted({self._name(queue) for queue in found})

    def _learn(self, entity: dict[str, Any]) -> None:
        if (known := repr(entity)) in self._known:
            return
        bound = thaw(entity)(self._channel)
        if isinstance(bound, Exchange):
            bound.declare()
        else:
            if bound.exchange and bound.exchange.name:
                bound.exchange.declare()
                bound.queue_bind()
            bound._create_bindings()
        self._known.add(known)

    def _name(self, queue: str) -> str:
        channel = self._channel
        return str(channel.entity_name(channel.queue_name_prefix + queue))
