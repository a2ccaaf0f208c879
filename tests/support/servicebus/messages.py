"""A stored message: header and annotations are read, the rest is kept as it came."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tests.support.servicebus import frames
from tests.support.servicebus.values import Long, Symbol, Timestamp, UInt, decode

if TYPE_CHECKING:
    from asyncio import TimerHandle

__all__ = ["Message", "messages_of", "now_ms"]

_BATCH_FORMAT = 0x80013700


def now_ms() -> int:
    """Return the time in milliseconds, as Service Bus tells it."""
    return int(time.time() * 1000)


class Message:
    """One message in a queue."""

    def __init__(self, payload: bytes) -> None:
        self.header: list[Any] = []
        self.annotations: dict[Any, Any] = {}
        self.message_id: Any = None
        self.size = len(payload)
        self.sequence_number = 0
        self.delivery_count = 0
        self.enqueued_ms = 0
        self.expires_ms: int | None = None
        self.lock_token: uuid.UUID | None = None
        self.locked_until_ms: int | None = None
        self.timer: TimerHandle | None = None
        self._bare = self._read(payload)

    def _read(self, payload: bytes) -> bytes:
        """Read what changes on the way; return what does not."""
        bare = b""
        for code, start, value_at, end in frames.sections(payload):
            if code == frames.HEADER:
                self.header = decode(payload, value_at)[0]
            elif code == frames.MESSAGE_ANNOTATIONS:
                self.annotations = decode(payload, value_at)[0]
            elif code != frames.DELIVERY_ANNOTATIONS:
                bare += payload[start:end]
                if code == frames.PROPERTIES:
                    properties = decode(payload, value_at)[0]
                    self.message_id = properties[0] if properties else None
        return bare

    @property
    def ttl_ms(self) -> int | None:
        """How long its sender lets it live."""
        return self.header[2] if len(self.header) > 2 else None

    def encode(self) -> bytes:
        """Return it as a receiver gets it."""
        header = [*[*self.header, None, None, None, None][:4], UInt(self.delivery_count)]
        notes = {
            **self.annotations,
            Symbol("x-opt-enqueued-time"): Timestamp(self.enqueued_ms),
            Symbol("x-opt-sequence-number"): Long(self.sequence_number),
            Symbol("x-opt-enqueue-sequence-number"): Long(self.sequence_number),
        }
        lock = b""
        if self.lock_token is not None:
            lock = frames.section(
                frames.DELIVERY_ANNOTATIONS, {Symbol("x-opt-lock-token"): self.lock_token}
            )
            notes[Symbol("x-opt-locked-until")] = Timestamp(self.locked_until_ms or 0)
        return (
            frames.section(frames.HEADER, header)
            + lock
            + frames.section(frames.MESSAGE_ANNOTATIONS, notes)
            + self._bare
        )

    def add_properties(self, extra: Mapping[str, str]) -> None:
        """Add to the application's properties: why it is in the dead-letter queue."""
        out, merged = b"", dict(extra)
        rest = b""
        for code, start, value_at, end in frames.sections(self._bare):
            if code == frames.APP_PROPERTIES:
                merged = {**(decode(self._bare, value_at)[0] or {}), **extra}
            elif code < frames.APP_PROPERTIES:
                out += self._bare[start:end]
            else:
                rest += self._bare[start:end]
        self._bare = out + frames.section(frames.APP_PROPERTIES, merged) + rest


def messages_of(payload: bytes, message_format: int | None) -> list[Message]:
    """Return what a transfer brought: a message, or a batch, whose data sections are messages."""
    if (message_format or 0) != _BATCH_FORMAT:
        return [Message(payload)]
    return [
        Message(decode(payload, value_at)[0])
        for code, _, value_at, _ in frames.sections(payload)
        if code == frames.DATA
    ]
