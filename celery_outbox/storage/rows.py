"""Rows: an envelope as a row of the outbox or of a local queue, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery_outbox.envelope import Envelope
from celery_outbox.errors import EnvelopeError
from celery_outbox.storage.tables import NAME_LENGTH

__all__ = ["envelope_of", "row_of"]


def row_of(envelope: Envelope) -> Mapping[str, Any]:
    """Return the envelope as a row; raise `EnvelopeError` if its headers can't be stored."""
    return {
        "key": envelope.key,
        "task": envelope.task[:NAME_LENGTH],
        "task_id": envelope.task_id[:NAME_LENGTH],
        "destination": envelope.destination[:NAME_LENGTH],
        "ordering_key": envelope.ordering_key,
        "body": envelope.body,
        "message": envelope.dump(),
        "due_at": envelope.due_at,
        "not_before": envelope.due_at,
        "expires_at": envelope.expires_at,
    }


def envelope_of(row: Any) -> tuple[Envelope | None, str | None]:
    """Return the envelope in a row, or None and the reason why it can't be read."""
    try:
        return (
            Envelope.load(
                row.message,
                task=row.task,
                task_id=row.task_id,
                key=row.key,
                body=row.body,
                due_at=row.due_at,
                expires_at=row.expires_at,
                ordering_key=row.ordering_key,
            ),
            None,
        )
    except EnvelopeError as exc:
        return None, str(exc)
