"""Receiving: what a worker needs beyond kombu's transport, and what it should be told."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import wraps
from typing import Any

from kombu import Connection

__all__ = ["doubts", "prepare_worker", "settle_for_good"]

logger = logging.getLogger("celery_outbox")

_OURS = "_celery_outbox_settles"


def prepare_worker(connection: Connection) -> None:
    """Make this process a good consumer of Service Bus, and warn of settings that are not."""
    channel = connection.transport.Channel
    settle_for_good(channel)
    for doubt in doubts(connection.transport_options, renews=hasattr(channel, "use_lock_renewal")):
        logger.warning("Azure Service Bus: %s", doubt)


def settle_for_good(channel: Any) -> None:
    """Let channels of this class end what a worker has acknowledged or rejected; safe to repeat.

    kombu does nothing for a rejection, and forgets an acknowledgement that failed; but its renewal
    holds the lock for an hour, or until the worker ends. Here the lock of such a message runs out, so
    that it is delivered again, and one that is not wanted goes to the queue's dead letters.
    """
    if getattr(channel, _OURS, False):
        return
    setattr(channel, _OURS, True)
    ack, reject = channel.basic_ack, channel.basic_reject

    @wraps(ack)
    def basic_ack(self: Any, delivery_tag: str, multiple: bool = False) -> None:
        delivery = _delivery(self, delivery_tag)
        ack(self, delivery_tag, multiple=multiple)
        _let_go(delivery)

    @wraps(reject)
    def basic_reject(self: Any, delivery_tag: str, requeue: bool = False) -> None:
        delivery = _delivery(self, delivery_tag)
        reject(self, delivery_tag, requeue=requeue)
        if delivery and not requeue:
            _bury(self, delivery)
        _let_go(delivery)

    channel.basic_ack, channel.basic_reject = basic_ack, basic_reject


def _delivery(channel: Any, delivery_tag: str) -> Mapping[str, Any]:
    delivered = channel.qos._delivered.get(delivery_tag)
    return {} if delivered is None else delivered.delivery_info


def _let_go(delivery: Mapping[str, Any]) -> None:
    # Nobody renews the lock of what is settled. Not abandoned: each return counts towards the queue's
    # highest delivery count, and one that is immediate would use it up.
    if (message := delivery.get("azure_message")) is not None:
        message._settled = True


def _bury(channel: Any, delivery: Mapping[str, Any]) -> None:
    try:
        receiver = channel._get_asb_receiver(delivery["azure_queue_name"]).receiver
        message = delivery["azure_message"]
        receiver.dead_letter_message(message, reason="Rejected by a worker")
    except Exception as exc:
        logger.warning("a rejected message comes back when its lock ends: %s", exc)


def doubts(options: Mapping[str, Any], *, renews: bool) -> Iterator[str]:
    """Yield what may go wrong with these ``broker_transport_options``, and what to do."""
    seconds = min(int(options.get("peek_lock_seconds", 60)), 300)
    if not renews:
        yield (
            f"this kombu can't renew locks, so that what a worker holds for more than {seconds} s is "
            "delivered again; use kombu 5.7 or newer"
        )
    elif not options.get("use_lock_renewal"):
        yield (
            f"what a worker holds for more than {seconds} s is delivered again, also while it waits "
            'behind other tasks; set broker_transport_options = {"use_lock_renewal": True}'
        )
