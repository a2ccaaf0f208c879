"""A message of a local queue, as kombu has it and as it is stored."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any

from celery.utils.time import maybe_iso8601, maybe_make_aware

from celery_outbox.envelope import Envelope, message_key
from celery_outbox.storage.local import Delivery
from celery_outbox.storage.rows import row_of
from celery_outbox.storage.tables import HIGHEST_PRIORITY

__all__ = ["delivered", "envelope_of", "id_of", "queued"]

Row = Mapping[str, Any]


def queued(envelope: Envelope, queue: str, *, hold_scheduled: bool) -> Row:
    """Return an envelope as a row of a local queue."""
    priority = max(0, min(envelope.priority or 0, HIGHEST_PRIORITY))
    row = {**row_of(envelope), "queue": queue, "priority": priority}
    return row if hold_scheduled else {**row, "not_before": None}


def envelope_of(message: Mapping[str, Any], time_zone: tzinfo) -> Envelope:
    """Return a message that kombu publishes as an envelope. It need not be a task's."""
    headers, properties = message["headers"], dict(message["properties"])
    address = properties.pop("delivery_info", {})
    for name in ("body_encoding", "delivery_tag"):
        properties.pop(name, None)
    body, task = message["body"], str(headers.get("task") or "")
    task_id = str(headers.get("id") or properties.get("correlation_id") or "")
    is_task = bool(task and headers.get("id"))
    expires_at = due_at = None
    if is_task and headers.get("eta"):
        due_at = _time(headers["eta"], time_zone)
    if milliseconds := properties.get("expiration"):
        expires_at = datetime.now(timezone.utc) + timedelta(milliseconds=int(milliseconds))
    return Envelope(
        task=task,
        task_id=task_id,
        key=message_key({**headers, "properties": properties}) if is_task else uuid.uuid4().hex,
        body=body.encode() if isinstance(body, str) else bytes(body),
        is_text=isinstance(body, str),
        content_type=message["content-type"],
        content_encoding=message["content-encoding"],
        priority=properties.pop("priority", None),
        headers=headers,
        properties=properties,
        exchange=address.get("exchange") or "",
        routing_key=address.get("routing_key") or "",
        mandatory=False,
        due_at=due_at,
        expires_at=expires_at,
    )


def delivered(delivery: Delivery, envelope: Envelope) -> dict[str, Any]:
    """Return what kombu makes its `Message` of."""
    priority = envelope.priority or 0
    return {
        "body": envelope.body.decode() if envelope.is_text else envelope.body,
        "content-type": envelope.content_type,
        "content-encoding": envelope.content_encoding,
        "headers": dict(envelope.headers),
        "properties": {
            **envelope.properties,
            "priority": priority,
            "delivery_tag": f"{delivery.id}.{delivery.number}",
            "delivery_info": {
                "exchange": envelope.exchange,
                "routing_key": envelope.routing_key,
                "priority": priority,
                "redelivered": delivery.number > 1,
            },
        },
    }


def id_of(delivery_tag: str) -> int:
    """Return the row of a delivery."""
    return int(delivery_tag.partition(".")[0])


def _time(eta: datetime | str, time_zone: tzinfo) -> datetime:
    aware: datetime = maybe_make_aware(maybe_iso8601(eta), time_zone)
    return aware
