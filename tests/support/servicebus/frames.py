"""Frames of AMQP 1.0, what they say, and the sections of a message."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from tests.support.servicebus.values import (
    Buffer,
    DecodeError,
    Described,
    Symbol,
    ULong,
    decode,
    encode,
    skip,
)

_PERFORMATIVES = {
    0x10: "open container_id hostname max_frame_size channel_max idle_time_out outgoing_locales "
    "incoming_locales offered_capabilities desired_capabilities properties",
    0x11: "begin remote_channel next_outgoing_id incoming_window outgoing_window handle_max "
    "offered_capabilities desired_capabilities properties",
    0x12: "attach name handle role snd_settle_mode rcv_settle_mode source target unsettled "
    "incomplete_unsettled initial_delivery_count max_message_size offered_capabilities "
    "desired_capabilities properties",
    0x13: "flow next_incoming_id incoming_window next_outgoing_id outgoing_window handle "
    "delivery_count link_credit available drain echo properties",
    0x14: "transfer handle delivery_id delivery_tag message_format settled more rcv_settle_mode "
    "state resume aborted batchable",
    0x15: "disposition role first last settled state batchable",
    0x16: "detach handle closed error",
    0x17: "end error",
    0x18: "close error",
    0x40: "sasl_mechanisms mechanisms",
    0x41: "sasl_init mechanism initial_response hostname",
    0x44: "sasl_outcome code additional_data",
}
_FIELDS = {code: (words.split()[0], words.split()[1:]) for code, words in _PERFORMATIVES.items()}
_CODES = {name: (code, fields) for code, (name, fields) in _FIELDS.items()}

ACCEPTED, REJECTED, RELEASED, MODIFIED = 0x24, 0x25, 0x26, 0x27
_OUTCOMES = {
    "amqp:accepted:list": ACCEPTED,
    "amqp:rejected:list": REJECTED,
    "amqp:released:list": RELEASED,
    "amqp:modified:list": MODIFIED,
}

#: Sections of a message.
HEADER, DELIVERY_ANNOTATIONS, MESSAGE_ANNOTATIONS, PROPERTIES, APP_PROPERTIES = range(0x70, 0x75)
DATA, VALUE = 0x75, 0x77


def performative(kind: str, /, **values: Any) -> bytes:
    """Return what a frame says; nulls at its end are left off, as the specification allows."""
    code, fields = _CODES[kind]
    said = [values.pop(field, None) for field in fields]
    assert not values, values
    while said and said[-1] is None:
        said.pop()
    return encode(Described(ULong(code), said))


def parse_performative(content: bytes) -> SimpleNamespace:
    """Read what a frame says: its fields, its `kind`, and the `payload` that follows."""
    described, at = decode(content)
    name, fields = _FIELDS[int(described.descriptor)]
    values = dict.fromkeys(fields)
    values.update(zip(fields, described.value, strict=False))
    return SimpleNamespace(kind=name, payload=content[at:], **values)


def frame(channel: int, said: bytes, payload: bytes = b"", kind: int = 0) -> bytes:
    """Return a frame: of AMQP (0) or of SASL (1)."""
    return struct.pack(">IBBH", 8 + len(said) + len(payload), 2, kind, channel) + said + payload


def error(condition: str, description: str = "") -> Described:
    """Return an error as links, connections and rejections carry it."""
    return Described(ULong(0x1D), [Symbol(condition), description, None])


def outcome(code: int, fields: Sequence[Any] = ()) -> Described:
    """Return the outcome of a delivery."""
    return Described(ULong(code), list(fields))


def outcome_code(state: Described | None) -> int | None:
    """Return which outcome this is."""
    if state is None:
        return None
    name = state.descriptor
    return _OUTCOMES.get(name) if isinstance(name, Symbol) else int(name)


def sections(message: Buffer) -> Iterator[tuple[int, int, int, int]]:
    """Yield each section: its code, its start, the start of its value, its end."""
    at = 0
    while at < len(message):
        start = at
        if message[at] != 0:
            raise DecodeError("a message is made of sections")
        descriptor, at = decode(message, at + 1)
        value_at, at = at, skip(message, at)
        yield int(descriptor), start, value_at, at


def section(code: int, value: Any) -> bytes:
    """Return one section."""
    return encode(Described(ULong(code), value))


def response(correlation_id: Any, properties: Mapping[str, Any], value: Any = None) -> bytes:
    """Return a message that answers a request."""
    return (
        section(PROPERTIES, [None] * 5 + [correlation_id])
        + section(APP_PROPERTIES, properties)
        + section(VALUE, value)
    )


class Request:
    """A message that asks for something: of ``$cbs``, or of ``<entity>/$management``."""

    def __init__(self, message: bytes) -> None:
        self.message_id: Any = None
        self.reply_to: str | None = None
        self.value: Any = None
        self.properties: dict[str, Any] = {}
        for code, _, value_at, _ in sections(message):
            if code == PROPERTIES:
                fields = (decode(message, value_at)[0] + [None] * 5)[:5]
                self.message_id, self.reply_to = fields[0], fields[4]
            elif code == APP_PROPERTIES:
                found = decode(message, value_at)[0] or {}
                self.properties = {str(name): value for name, value in found.items()}
            elif code == VALUE:
                self.value = decode(message, value_at)[0]
