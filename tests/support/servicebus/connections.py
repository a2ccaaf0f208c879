"""Connections: SASL, claims (``$cbs``), and what comes in frame by frame."""

from __future__ import annotations

import asyncio
import logging
import struct
import time
import uuid
from types import SimpleNamespace
from typing import TYPE_CHECKING

from tests.support.servicebus.frames import (
    Request,
    error,
    frame,
    parse_performative,
    performative,
    response,
)
from tests.support.servicebus.links import entity_of
from tests.support.servicebus.management import manage
from tests.support.servicebus.queues import BrokerError
from tests.support.servicebus.rights import Denied
from tests.support.servicebus.sessions import WINDOW, Session
from tests.support.servicebus.values import (
    Array,
    DecodeError,
    Int,
    Symbol,
    UByte,
    UInt,
    UShort,
)

if TYPE_CHECKING:
    from tests.support.servicebus.emulator import Emulator

__all__ = ["Connection"]

logger = logging.getLogger("tests.support.servicebus")

_SASL = b"AMQP\x03\x01\x00\x00"
_AMQP = b"AMQP\x00\x01\x00\x00"
_EMPTY_FRAME = b"\x00\x00\x00\x08\x02\x00\x00\x00"
_MAX_FRAME = 65536
_MECHANISMS = ("MSSBCBS", "PLAIN", "ANONYMOUS", "EXTERNAL")


class Connection:
    """One client's connection."""

    def __init__(
        self, emulator: Emulator, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.emulator = emulator
        self.peer_max_frame = 512
        self.closed = False
        self.sessions: dict[int, Session] = {}
        self._reader, self._writer = reader, writer
        #: What has been proved: entity → until when, by which policy. "" is all of the namespace.
        self._claims: dict[str, tuple[float, str]] = {}
        self._beating: asyncio.TimerHandle | None = None

    def write(self, channel: int, said: bytes, payload: bytes = b"", kind: int = 0) -> None:
        """Send a frame."""
        if not self.closed and not self._writer.is_closing():
            self._writer.write(frame(channel, said, payload, kind))

    async def run(self, head: bytes) -> None:
        """Serve the client until either side has had enough."""
        self.emulator.connections.add(self)
        try:
            if head == _SASL:
                await self._sasl()
                head = await self._reader.readexactly(8)
            self._writer.write(_AMQP)
            while head == _AMQP and not self.closed:
                channel, said = await self._read_frame()
                if said:
                    self._dispatch(channel, parse_performative(said))
                await self._writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception:
            logger.exception("a connection failed")
        finally:
            self.closed = True
            self.emulator.connections.discard(self)
            if self._beating is not None:
                self._beating.cancel()
            self._writer.close()

    async def _read_frame(self) -> tuple[int, bytes]:
        size, offset, _, channel = struct.unpack(">IBBH", await self._reader.readexactly(8))
        if not 8 <= size <= 4 * 1024 * 1024:
            raise DecodeError(f"a frame of {size} bytes")
        content = await self._reader.readexactly(size - 8)
        return channel, content[offset * 4 - 8 :]

    async def _sasl(self) -> None:
        self._writer.write(_SASL)
        names = Array([Symbol(name) for name in _MECHANISMS])
        self.write(0, performative("sasl_mechanisms", mechanisms=names), kind=1)
        _, said = await self._read_frame()
        init = parse_performative(said)
        good = True
        if init.mechanism == "PLAIN":
            _, user, key = bytes(init.initial_response or b"\0\0").split(b"\0")
            good = self.emulator.policies.keys.get(user.decode()) == key.decode()
            self._claims[""] = (float("inf"), user.decode())
        self.write(0, performative("sasl_outcome", code=UByte(0 if good else 1)), kind=1)

    def _dispatch(self, channel: int, said: SimpleNamespace) -> None:
        match said.kind:
            case "open":
                self._open(said)
            case "begin":
                self.sessions[channel] = Session(self, channel, said)
                answer = performative(
                    "begin",
                    remote_channel=UShort(channel),
                    next_outgoing_id=UInt(1),
                    incoming_window=UInt(WINDOW),
                    outgoing_window=UInt(WINDOW),
                    handle_max=UInt(4999),
                )
                self.write(channel, answer)
            case "end":
                if self.sessions.pop(channel, None) is not None:
                    self.write(channel, performative("end"))
            case "close":
                self.write(0, performative("close"))
                self.closed = True
            case kind:
                getattr(self.sessions[channel], f"on_{kind}")(said)

    def _open(self, said: SimpleNamespace) -> None:
        self.peer_max_frame = min(int(said.max_frame_size or 2**32 - 1), _MAX_FRAME)
        self.emulator.stats["connections"] += 1
        answer = performative(
            "open",
            container_id=uuid.uuid4().hex,
            max_frame_size=UInt(_MAX_FRAME),
            channel_max=UShort(4999),
            idle_time_out=UInt(120_000),
        )
        self.write(0, answer)
        if said.idle_time_out:
            self._beat(int(said.idle_time_out) / 2000)

    def _beat(self, seconds: float) -> None:
        if not self.closed:
            self._writer.write(_EMPTY_FRAME)
            self._beating = self.emulator.loop.call_later(seconds, self._beat, seconds)

    # What a test may do to a connection

    def close(self, condition: str, description: str = "") -> None:
        """End it with an error, as the service does with idle ones."""
        self.write(0, performative("close", error=error(condition, description)))
        self.closed = True
        self.emulator.loop.call_later(0.2, self._writer.close)

    def cut(self) -> None:
        """End it without a word."""
        self.closed = True
        self._writer.transport.abort()

    # Claims, and requests

    def authorize(self, entity: str, right: str, *, is_node: bool) -> None:
        """Raise `BrokerError` unless the client has proved that it has the right.

        Who has any right to an entity may talk to its management node.
        """
        wanted = entity.lower()
        for scope, (until, policy) in self._claims.items():
            covers = not scope or wanted == scope or wanted.startswith(scope + "/")
            allowed = is_node or self.emulator.policies.allow(policy, right)
            if covers and allowed and until > time.time():
                return
        raise BrokerError(
            "amqp:unauthorized-access",
            f"Unauthorized access. '{right}' claim(s) are required. Resource: '{entity}'.",
        )

    def answer(self, node: str, request: Request) -> bytes:
        """Answer a request of ``$cbs``, or of an entity's management node."""
        if node.lower() == "$cbs":
            status, text = self._put_token(request)
            properties = {"status-code": Int(status), "status-description": text}
            return response(request.message_id, properties)
        operation = str(request.properties.get("operation", ""))
        self.emulator.stats[operation] += 1
        return manage(self.emulator.broker, node, operation, request)

    def _put_token(self, request: Request) -> tuple[int, str]:
        entity = entity_of(str(request.properties.get("name", "")))
        fault = self.emulator.faults.take("cbs", entity)
        if fault is not None:
            return fault.status, fault.description
        try:
            policy, until = self.emulator.policies.of_token(str(request.value or ""))
        except Denied as exc:
            return 401, str(exc)
        self._claims[entity.lower()] = (until, policy)
        return 202, "Accepted"
