"""Publishers: a batch goes to the broker, and an outcome comes back for each message."""

from __future__ import annotations

from collections.abc import Callable

from kombu import Connection
from kombu.transport import pyamqp
from kombu.transport.virtual import Transport as VirtualTransport

from celery_outbox.errors import ConfigurationError
from celery_outbox.relay.publishers.base import Publisher
from celery_outbox.relay.publishers.confirming import ConfirmingPublisher
from celery_outbox.relay.publishers.virtual import VirtualPublisher

__all__ = [
    "ConfirmingPublisher",
    "Publisher",
    "VirtualPublisher",
    "is_servicebus",
    "publisher_for",
]

#: kombu's transports of which it is known what a publish that returned means.
_KNOWN = ("redis", "filesystem", "sql", "memory", "outbox")


def publisher_for(
    connect: Callable[[], Connection], confirm_timeout: float, *, trust_broker: bool = False
) -> Publisher:
    """Return the publisher for the transport of `connect()`, without connecting.

    Raises `ConfigurationError` for a transport whose answer to a publish means nothing, or is not
    known to mean that it has the message, unless `trust_broker`.
    """
    connection = connect()
    if isinstance(connection.transport, pyamqp.Transport):
        return ConfirmingPublisher(connect, confirm_timeout)
    kind = connection.transport.driver_type
    if is_servicebus(connection):
        return _servicebus_publisher(connect, confirm_timeout)
    if isinstance(connection.transport, VirtualTransport) and (kind in _KNOWN or trust_broker):
        return VirtualPublisher(connect, confirm_timeout)
    raise ConfigurationError(
        f"broker_url: it is not known that a publish by the transport {kind!r} "
        f"({connection.transport.driver_name}) means that the broker has the message, so that "
        "nothing could leave the outbox safely; use amqp:// (py-amqp) or redis://"
        + ("" if trust_broker else ", or insist with outbox_trust_broker = True")
    )


def is_servicebus(connection: Connection) -> bool:
    """Return whether a connection is one to Azure Service Bus; without importing its SDK."""
    kinds = type(connection.transport).__mro__
    return any(kind.__module__ == "kombu.transport.azureservicebus" for kind in kinds)


def _servicebus_publisher(connect: Callable[[], Connection], confirm_timeout: float) -> Publisher:
    # Here, for it needs the SDK.
    from celery_outbox.relay.publishers.servicebus import ServiceBusPublisher

    return ServiceBusPublisher(connect, confirm_timeout)
