"""Values of AMQP 1.0 on the wire: encode, decode, skip."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping
from typing import Any, TypeAlias

Buffer: TypeAlias = "bytes | bytearray | memoryview"


class Symbol(str):
    """An ASCII name that the specification or a vendor gave."""

    __slots__ = ()


class UByte(int):
    """0 to 255."""


class UShort(int):
    """16 bits, unsigned."""


class UInt(int):
    """32 bits, unsigned."""


class ULong(int):
    """64 bits, unsigned; also what describes a section or a performative."""


class Int(int):
    """32 bits, signed."""


class Long(int):
    """64 bits, signed; what a plain int is encoded as, too."""


class Timestamp(int):
    """Milliseconds since the Unix epoch."""


class Raw(bytes):
    """A value in its encoded form, which nobody here looks into."""


class Array(list[Any]):
    """Values of one type, with one constructor."""


class Described:
    """A value with a descriptor, which says what it stands for."""

    __slots__ = ("descriptor", "value")

    def __init__(self, descriptor: Any, value: Any) -> None:
        self.descriptor = descriptor
        self.value = value


class DecodeError(ValueError):
    """These bytes are not AMQP."""


_FIXED: dict[int, tuple[struct.Struct, type]] = {
    code: (struct.Struct(">" + form), kind)
    for code, form, kind in (
        (0x50, "B", UByte),
        (0x51, "b", int),
        (0x60, "H", UShort),
        (0x61, "h", int),
        (0x70, "I", UInt),
        (0x52, "B", UInt),
        (0x80, "Q", ULong),
        (0x53, "B", ULong),
        (0x71, "i", Int),
        (0x54, "b", Int),
        (0x81, "q", Long),
        (0x55, "b", Long),
        (0x72, "f", float),
        (0x82, "d", float),
        (0x83, "q", Timestamp),
    )
}
_CONSTANT = {0x40: None, 0x41: True, 0x42: False, 0x43: UInt(0), 0x44: ULong(0), 0x45: None}
#: char and the decimals, with their widths.
_OPAQUE = {0x73: 4, 0x74: 4, 0x84: 8, 0x94: 16}
_WIDTH = {0x4: 0, 0x5: 1, 0x6: 2, 0x7: 4, 0x8: 8, 0x9: 16}


def decode(buffer: Buffer, at: int = 0) -> tuple[Any, int]:
    """Return the value that starts at `at`, and the position after it."""
    code, at = buffer[at], at + 1
    if code == 0x00:
        descriptor, at = decode(buffer, at)
        value, at = decode(buffer, at)
        return Described(descriptor, value), at
    return _decode(code, buffer, at)


def _decode(code: int, buffer: Buffer, at: int) -> tuple[Any, int]:
    if code == 0x45:
        return [], at
    if code in _CONSTANT:
        return _CONSTANT[code], at
    if code in _FIXED:
        form, kind = _FIXED[code]
        return kind(form.unpack_from(buffer, at)[0]), at + form.size
    if code == 0x56:
        return buffer[at] == 1, at + 1
    if code == 0x98:
        return uuid.UUID(bytes=bytes(buffer[at : at + 16])), at + 16
    if code in _OPAQUE:
        end = at + _OPAQUE[code]
        return Raw(bytes([code]) + bytes(buffer[at:end])), end
    if code >> 4 in (0xA, 0xB):
        return _decode_variable(code, buffer, at)
    if code >> 4 in (0xC, 0xD, 0xE, 0xF):
        return _decode_compound(code, buffer, at)
    raise DecodeError(f"unknown format code 0x{code:02x} at {at - 1}")


def _decode_variable(code: int, buffer: Buffer, at: int) -> tuple[Any, int]:
    if code >> 4 == 0xA:
        size, at = buffer[at], at + 1
    else:
        size, at = struct.unpack_from(">I", buffer, at)[0], at + 4
    found = bytes(buffer[at : at + size])
    match code & 0xF:
        case 0x0:
            return found, at + size
        case 0x1:
            return found.decode(), at + size
        case 0x3:
            return Symbol(found.decode("ascii")), at + size
        case _:
            raise DecodeError(f"unknown format code 0x{code:02x}")


def _decode_compound(code: int, buffer: Buffer, at: int) -> tuple[Any, int]:
    if code >> 4 in (0xC, 0xE):
        count, at = buffer[at + 1], at + 2
    else:
        count, at = struct.unpack_from(">I", buffer, at + 4)[0], at + 8
    if code >> 4 in (0xE, 0xF):
        constructor, at = buffer[at], at + 1
        array = Array()
        for _ in range(count):
            value, at = _decode(constructor, buffer, at)
            array.append(value)
        return array, at
    values = []
    for _ in range(count):
        value, at = decode(buffer, at)
        values.append(value)
    if code & 0xF == 0x0:
        return values, at
    return dict(zip(values[::2], values[1::2], strict=True)), at


def skip(buffer: Buffer, at: int) -> int:
    """Return the position after the value that starts at `at`, without reading it."""
    code, at = buffer[at], at + 1
    if code == 0x00:
        return skip(buffer, skip(buffer, at))
    group = code >> 4
    if group in _WIDTH:
        return at + _WIDTH[group]
    if group in (0xA, 0xC, 0xE):
        return at + 1 + int(buffer[at])
    return at + 4 + int(struct.unpack_from(">I", buffer, at)[0])


def encode(value: Any) -> bytes:
    """Return the value as bytes."""
    out = bytearray()
    _encode(out, value)
    return bytes(out)


def _encode(out: bytearray, value: Any) -> None:
    match value:
        case None:
            out.append(0x40)
        case bool():
            out.append(0x41 if value else 0x42)
        case Raw():
            out += value
        case int():
            out += _number(value)
        case Symbol():
            _encode_variable(out, 0xA3, value.encode("ascii"))
        case str():
            _encode_variable(out, 0xA1, value.encode())
        case bytes() | bytearray() | memoryview():
            _encode_variable(out, 0xA0, bytes(value))
        case uuid.UUID():
            out.append(0x98)
            out += value.bytes
        case float():
            out += struct.pack(">Bd", 0x82, value)
        case Described():
            out.append(0)
            _encode(out, value.descriptor)
            _encode(out, value.value)
        case Array():
            _encode_array(out, value)
        case Mapping():
            flat = [each for pair in value.items() for each in pair]
            _encode_compound(out, 0xC1, flat)
        case list() | tuple():
            if value:
                _encode_compound(out, 0xC0, value)
            else:
                out.append(0x45)
        case _:
            raise TypeError(f"{type(value).__name__} is nothing that AMQP knows")


def _number(value: int) -> bytes:
    match value:
        case Timestamp():
            return struct.pack(">Bq", 0x83, value)
        case UByte():
            return bytes((0x50, value))
        case UShort():
            return struct.pack(">BH", 0x60, value)
        case UInt():
            return bytes((0x52, value)) if value < 256 else struct.pack(">BI", 0x70, value)
        case ULong():
            return bytes((0x53, value)) if value < 256 else struct.pack(">BQ", 0x80, value)
        case Int():
            return struct.pack(">Bi", 0x71, value)
        case _:
            return struct.pack(">Bq", 0x81, value)


def _encode_variable(out: bytearray, small: int, content: bytes) -> None:
    if len(content) < 256:
        out += bytes((small, len(content)))
    else:
        out += struct.pack(">BI", small + 0x10, len(content))
    out += content


def _encode_compound(out: bytearray, small: int, values: list[Any] | tuple[Any, ...]) -> None:
    content = bytearray()
    for each in values:
        _encode(content, each)
    if len(content) + 1 < 256 and len(values) < 256:
        out += bytes((small, len(content) + 1, len(values)))
    else:
        out += struct.pack(">BII", small + 0x10, len(content) + 4, len(values))
    out += content


_CONSTRUCTOR = {Symbol: 0xB3, str: 0xB1, uuid.UUID: 0x98, Long: 0x81, Timestamp: 0x83}


def _encode_array(out: bytearray, values: Array) -> None:
    constructor = _CONSTRUCTOR[type(values[0])] if values else 0xB3
    content = bytearray((constructor,))
    for each in values:
        if constructor in (0xB1, 0xB3):
            text = each.encode()
            content += struct.pack(">I", len(text)) + text
        else:
            content += encode(each)[1:]
    out += struct.pack(">BII", 0xF0, len(content) + 4, len(values)) + content
