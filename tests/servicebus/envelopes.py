"""Envelopes as the relay hands them to its publisher."""

from typing import Any

from celery_outbox.envelope import Envelope


def envelope(number: int, queue: str = "q", size: int = 100, **fields: Any) -> Envelope:
    """Return a message for a queue, by the default exchange."""
    task_id = f"id-{number}"
    values: dict[str, Any] = {
        "task": "task",
        "task_id": task_id,
        "key": f"{task_id}:0:0:",
        "body": b"[" + b"1" * size + b"]",
        "is_text": True,
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "priority": 0,
        "headers": {"id": task_id, "task": "task", "origin": "gen1@host"},
        "properties": {"correlation_id": task_id, "reply_to": "me", "delivery_mode": 2},
        "exchange": "",
        "routing_key": queue,
        "mandatory": True,
    }
    return Envelope(**{**values, **fields})


def batch(count: int, queue: str = "q") -> list[tuple[int, Envelope]]:
    """Return so many messages, with the numbers of their rows."""
    return [(number, envelope(number, queue)) for number in range(count)]
