"""Reason: why a message is where it is."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from celery_outbox.cli.output import ago

__all__ = ["why"]


def why(row: dict[str, Any]) -> str:
    """Say why a row is not with the broker, not handled, or not gone."""
    return _why_queued(row) if row.get("queue") is not None else _why_stored(row)


def _why_queued(row: dict[str, Any]) -> str:
    wait = ago(abs((row["available_at"] - row["now"]).total_seconds()))
    match row["state"]:
        case "taken":
            return f"taken by {row['lease_token']}; the lease ends in {wait}"
        case "scheduled" if row["due_at"] is None or row["due_at"] < row["available_at"]:
            return f"its worker gave it back; again in {wait}"
        case "scheduled":
            return f"due in {wait}"
    if row["lease_token"] is not None:
        return f"{row['lease_token']} is lost, its lease has been over for {wait}"
    return f"has waited for a worker of {row['queue']} for {wait}"


def _why_stored(row: dict[str, Any]) -> str:
    now: datetime = row["now"]
    available: datetime = row["available_at"]
    wait = ago(abs((available - now).total_seconds()))
    error = row["last_error"]
    match row["state"]:
        case "in_flight":
            return f"a relay has claimed it; the lease ends in {wait}"
        case "published" if available > now:
            return f"published, and kept until a worker handles it; again in {wait}"
        case "published":
            return f"published, not handled in time; due to be published again for {wait}"
        case "scheduled":
            return f"due in {ago((row['due_at'] - now).total_seconds())}"
    if available > now:
        if error is None:
            return f"the broker was away; again in {wait}"
        return f"the broker did not take it; again in {wait}: {error}"
    if row["lease_token"] is not None:
        return f"its relay did not end the batch; the lease has been over for {wait}"
    return f"has waited for a relay for {wait}"
