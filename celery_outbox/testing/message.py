"""Message: what a test sees of a message that was staged, and what it expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

from kombu.compression import decompress
from kombu.serialization import loads

from celery_outbox.envelope import Envelope

__all__ = ["Expected", "Message", "expected"]


class _Any:
    """Stands for what a test has not said."""

    def __repr__(self) -> str:
        return "..."


ANY: Any = _Any()


@dataclass(frozen=True, eq=False)
class Message:
    """A message, decoded. Equal to what `expected` returns if all that is said there holds."""

    task: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    eta: datetime | None = None
    queue: str = ""
    headers: Mapping[str, Any] = field(default_factory=dict, repr=False)
    task_id: str = field(default="", repr=False)
    #: What tells this sending from others, in the outbox and the inbox.
    key: str = field(default="", repr=False)

    @classmethod
    def of(cls, envelope: Envelope) -> Message:
        """Decode an envelope as the worker would."""
        args, kwargs = _arguments(envelope)
        return cls(
            task=envelope.task,
            args=args,
            kwargs=kwargs,
            eta=envelope.due_at,
            queue=_queue(envelope),
            headers=dict(envelope.headers),
            task_id=envelope.task_id,
            key=envelope.key,
        )

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Expected):
            return other.matches(self)
        if isinstance(other, Message):
            return self.key == other.key
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, eq=False)
class Expected:
    """What a test says of a message; what it does not say may be anything."""

    task: str
    args: Sequence[Any] = ANY
    kwargs: Mapping[str, Any] = ANY
    eta: datetime | None = ANY
    queue: str = ANY
    #: These headers are among the message's.
    headers: Mapping[str, Any] = ANY

    def matches(self, message: Message) -> bool:
        """Whether all that is said holds for the message."""
        return not self.differences(message)

    def differences(self, message: Message) -> list[str]:
        """Say where the message is another one."""
        found = []
        for name, wanted in self.said().items():
            real = getattr(message, name)
            if name == "headers":
                real = {header: real.get(header) for header in wanted}
            if _plain(real) != _plain(wanted):
                found.append(f"{name}: expected {wanted!r}, staged {real!r}")
        return found

    def said(self) -> dict[str, Any]:
        """Return what the test has said."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not ANY}

    def __eq__(self, other: object) -> bool:
        return self.matches(other) if isinstance(other, Message) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        # As a message's, so that a diff of two lists shows what differs and nothing else.
        said = ", ".join(f"{name}={value!r}" for name, value in self.said().items())
        return f"expected({said})"


def expected(
    task: Any,
    args: Sequence[Any] = ANY,
    kwargs: Mapping[str, Any] = ANY,
    *,
    eta: datetime | None = ANY,
    queue: str = ANY,
    headers: Mapping[str, Any] = ANY,
) -> Expected:
    """Describe a message: `task` is a task or its name; what is left out may be anything.

    Lists and tuples are equal, as the serializer makes lists of both.
    """
    name = task if isinstance(task, str) else task.name
    return Expected(name, args, kwargs, eta, queue, headers)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _arguments(envelope: Envelope) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    body = envelope.body
    if compression := envelope.headers.get("compression"):
        body = decompress(body, compression)
    # What the test's own app has written, in whatever serializer.
    content = loads(
        body.decode() if envelope.is_text and not compression else body,
        envelope.content_type,
        envelope.content_encoding,
        accept={envelope.content_type},
    )
    if isinstance(content, Mapping):  # Celery's first protocol
        return tuple(content.get("args") or ()), content.get("kwargs") or {}
    args, kwargs, _embedded = content
    return tuple(args), kwargs


def _queue(envelope: Envelope) -> str:
    for declared in envelope.declare:
        if declared.get("kind") == "queue" and declared.get("routing_key") == envelope.routing_key:
            return str(declared["name"])
    return envelope.routing_key
