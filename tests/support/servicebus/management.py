"""``<entity>/$management``: what is not a delivery, such as the renewal of a lock."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from tests.support.servicebus.frames import Request, response
from tests.support.servicebus.queues import LOCK_LOST, Broker, BrokerError, Queue
from tests.support.servicebus.values import Array, Int, Symbol, Timestamp

__all__ = ["manage"]

_STATUS = {LOCK_LOST: 410, "amqp:not-found": 404}


def manage(broker: Broker, node: str, operation: str, request: Request) -> bytes:
    """Carry out one operation, and return the answer."""
    properties: dict[str, Any] = {"statusCode": Int(200), "statusDescription": "OK"}
    value = None
    try:
        queue = broker.find(node.rpartition("/")[0])
        value = _carry_out(queue, operation, request.value or {})
    except BrokerError as exc:
        properties = {
            "statusCode": Int(_STATUS.get(exc.condition, 400)),
            "statusDescription": exc.description,
            "errorCondition": Symbol(exc.condition),
        }
    return response(request.message_id, properties, value)


def _carry_out(queue: Queue, operation: str, value: Mapping[str, Any]) -> dict[str, Any] | None:
    tokens: list[uuid.UUID] = list(value.get("lock-tokens") or ())
    match operation:
        case "com.microsoft:renew-lock":
            until = [Timestamp(queue.renew(token)) for token in tokens]
            return {"expirations": Array(until)}
        case "com.microsoft:update-disposition":
            for token in tokens:
                _settle(queue, token, value)
            return None
        case _:
            raise BrokerError("amqp:not-implemented", f"operation {operation}")


def _settle(queue: Queue, token: uuid.UUID, value: Mapping[str, Any]) -> None:
    match value["disposition-status"]:
        case "completed":
            queue.complete(token)
        case "abandoned":
            queue.abandon(token)
        case "suspended":
            why = value.get("deadletter-reason"), value.get("deadletter-description")
            queue.bury(token, *why)
        case status:
            raise BrokerError("amqp:not-implemented", f"disposition {status}")
