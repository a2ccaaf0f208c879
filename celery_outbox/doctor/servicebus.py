"""Azure Service Bus: the queues are there, and made so that a repeated send is known for one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from celery_outbox.doctor.finding import Finding, error, fine, skipped, warning

if TYPE_CHECKING:
    from kombu import Connection

    from celery_outbox.plugin import Outbox

__all__ = ["queues_of", "repeat_seconds", "sends"]


def sends(connection: Connection) -> Iterator[Finding]:
    """What a send means on this transport."""
    if connection.transport_options.get("use_lock_renewal"):
        yield fine("a send is settled when the service has stored it; workers renew their locks")
    else:
        yield warning(
            "a send is settled when the service has stored it; but workers don't renew their locks",
            'Set broker_transport_options = {"use_lock_renewal": True}: what runs longer than its lock '
            "is delivered again.",
        )


def queues_of(outbox: Outbox, connection: Connection) -> Iterator[Finding]:
    """Each queue of the app is there and as it should be. Needs the right to manage."""
    from azure.core.exceptions import AzureError, ClientAuthenticationError

    from celery_outbox.servicebus.queues import Queues

    names = sorted(outbox.app.amqp.queues)
    is_fine = True
    try:
        queues = Queues(connection)
        for name in names:
            for doubt in queues.verify(name, repeat_seconds(outbox)):
                is_fine = False
                kind = error if doubt.level == "error" else warning
                yield kind(f"queue {doubt.queue}: {doubt.says}", f"{doubt.advice}.".capitalize())
    except ClientAuthenticationError:
        yield skipped("the credentials may not manage the namespace, so its queues can't be seen")
        return
    except AzureError as exc:
        yield error(
            f"the namespace can't be asked for its queues: {type(exc).__name__}: {exc}",
            "Is the name in broker_url right, and the network open?",
        )
        return
    if is_fine:
        yield fine(f"the app's queues are as they should be: {', '.join(names)}")


def repeat_seconds(outbox: Outbox) -> float:
    """Return after how long a relay may repeat a send that is in doubt.

    Its own lease ends first, and its queue may be left alone for the longest pause.
    """
    return outbox.config.lease_seconds + outbox.config.backoff_cap_seconds
