"""Envelope: one message with its address, ready to publish."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any

from kombu.utils.json import JSONEncoder, loads

from celery_outbox.declaration import json_of
from celery_outbox.errors import EnvelopeError

__all__ = ["Envelope", "application_id", "message_key", "ordering_key"]

#: The form in which `Envelope.dump` writes. A reader refuses what is newer than itself.
FORMAT = 1

#: Longest key that the tables hold; longer ones are replaced by their digest.
KEY_LENGTH = 200

#: Celery's native delayed delivery (quorum queues) writes the delay as 28 bits into the routing key.
_DELAYED_EXCHANGE = "celery_delayed_27"
_DELAY_BITS = 28
_DELAYED_KEY = re.compile(rf"(?:[01]\.){{{_DELAY_BITS}}}")

# `kombu.utils.json.dumps` makes an encoder for each text.
_encode: Callable[[Any], str] = JSONEncoder().encode


def message_key(headers: Mapping[str, Any], part: str = "") -> str:
    """Return what tells one execution of a task from another.

    The task id alone does not: the same id runs again by right as a retry (``retries``), as its own
    replacement (``replaced_task_nesting``), in a group that holds one frozen signature twice
    (``group_index``), and where one frozen signature is applied twice (the AMQP property
    ``message_id``, which capture sets). `part` is for what belongs to an execution and is committed
    by itself.
    """
    index = headers.get("group_index")
    application = application_id(headers)
    key = ":".join(
        (
            str(headers["id"]),
            str(headers.get("retries") or 0),
            str(headers.get("replaced_task_nesting") or 0),
            "" if index is None else str(index),
            *([application] if application else ()),
            *([part] if part else ()),
        )
    )
    return key if len(key) <= KEY_LENGTH else "sha256:" + sha256(key.encode()).hexdigest()


def application_id(request: Mapping[str, Any]) -> str | None:
    """Return what tells one application of a signature from another, if the message says so."""
    given = (request.get("properties") or {}).get("message_id")
    return None if given is None else str(given)


def ordering_key(value: object) -> str | None:
    """Return a user's ordering key as it is stored; raise `EnvelopeError` for what can't be one."""
    if value is None:
        return None
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise EnvelopeError(f"outbox_ordering_key={value!r} is wrong: it takes a text or a number")
    key = str(value)
    return key if len(key) <= KEY_LENGTH else "sha256:" + sha256(key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message exactly as stock Celery would have published it, and when and where to.

    Only time differs from the wire: ``expires_at`` is absolute, where AMQP's ``expiration`` counts
    from the publish, and ``due_at`` is when the message may leave the outbox.
    """

    task: str
    task_id: str
    key: str
    body: bytes
    is_text: bool
    content_type: str
    content_encoding: str
    priority: int | None
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    exchange: str
    routing_key: str
    mandatory: bool
    #: Queues and exchanges to declare before the publish (see `celery_outbox.declaration`).
    declare: tuple[Mapping[str, Any], ...] = field(default=())
    #: Whether a worker will record that it has handled the message, so that it may be kept until then.
    keep: bool = False
    due_at: datetime | None = None
    expires_at: datetime | None = None
    #: Messages with the same one leave the outbox in the order in which they were committed.
    ordering_key: str | None = None

    @property
    def destination(self) -> str:
        """The queue, or ``exchange/routing key``, as operators know it."""
        return f"{self.exchange}/{self.routing_key}" if self.exchange else self.routing_key

    def at(self, now: datetime) -> Envelope:
        """Return the envelope with its relative times counted from `now` (time zone aware).

        An expired message keeps an expiration of 0, as Celery itself sends it.
        """
        changed = self
        if self.expires_at is not None and "expiration" in self.properties:
            left = max(timedelta(0), self.expires_at - now)
            milliseconds = str(int(left.total_seconds() * 1000))
            changed = replace(self, properties={**self.properties, "expiration": milliseconds})
        if self.exchange == _DELAYED_EXCHANGE and self.due_at is not None:
            seconds = max(0, int((self.due_at - now).total_seconds()))
            bits = ".".join(f"{seconds:0{_DELAY_BITS}b}") + "."
            changed = replace(changed, routing_key=_DELAYED_KEY.sub(bits, self.routing_key, 1))
        return changed

    def dump(self) -> str:
        """Return all but the body and the times as JSON text.

        kombu's JSON keeps datetime, Decimal, UUID and bytes, as message headers may hold them.
        """
        try:
            message = _encode(
                {
                    "format": FORMAT,
                    "text": self.is_text,
                    "content_type": self.content_type,
                    "content_encoding": self.content_encoding,
                    "priority": self.priority,
                    "headers": self.headers,
                    "properties": self.properties,
                    "exchange": self.exchange,
                    "routing_key": self.routing_key,
                    "mandatory": self.mandatory,
                    "keep": self.keep,
                }
            )
            declare = ", ".join([json_of(entity) for entity in self.declare])
            return f'{message[:-1]}, "declare": [{declare}]}}'
        except (TypeError, ValueError) as exc:
            raise EnvelopeError(
                f"task {self.task}[{self.task_id}]: a header or property of its message can't be "
                f"stored as JSON: {exc}"
            ) from exc

    @classmethod
    def load(
        cls,
        message: str,
        *,
        task: str,
        task_id: str,
        key: str,
        body: bytes,
        due_at: datetime | None,
        expires_at: datetime | None,
        ordering_key: str | None = None,
    ) -> Envelope:
        """Read back what `dump` wrote; raise `EnvelopeError` for what a newer version wrote."""
        try:
            # kombu's reader looks into every object for its own types, at three times the cost.
            data = loads(message) if "__type__" in message else json.loads(message)
            if data["format"] > FORMAT:
                raise EnvelopeError(
                    f"task {task}[{task_id}]: stored in format {data['format']}, this version reads "
                    f"up to {FORMAT}: upgrade celery_outbox here"
                )
            return cls(
                task=task,
                task_id=task_id,
                key=key,
                body=bytes(body),
                is_text=data["text"],
                content_type=data["content_type"],
                content_encoding=data["content_encoding"],
                priority=data["priority"],
                headers=data["headers"],
                properties=data["properties"],
                exchange=data["exchange"],
                routing_key=data["routing_key"],
                mandatory=data["mandatory"],
                declare=tuple(data["declare"]),
                keep=data["keep"],
                due_at=due_at,
                expires_at=expires_at,
                ordering_key=ordering_key,
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise EnvelopeError(f"task {task}[{task_id}]: can't be read: {exc!r}") from exc
