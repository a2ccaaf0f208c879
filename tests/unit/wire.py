"""A broker that records the frames which py-amqp would have put on the wire, and confirms them.

``recording://name`` is the URL of such a broker in an app; `broker(name)` is what it has received.
Only the socket is left out: kombu's and py-amqp's own code makes every frame.
"""

import itertools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import kombu.transport
from amqp import spec
from amqp.basic_message import Message
from amqp.serialization import loads
from kombu.transport import pyamqp

kombu.transport.TRANSPORT_ALIASES["recording"] = f"{__name__}:Transport"

_DECLARATIONS = (
    spec.Exchange.Declare,
    spec.Exchange.Bind,
    spec.Queue.Declare,
    spec.Queue.Bind,
)


@dataclass(frozen=True)
class Published:
    """One message as it went over the wire."""

    exchange: str
    routing_key: str
    mandatory: bool
    #: The frame of the properties, as bytes, and the same for people; both without `expiration`.
    frame: bytes
    properties: dict[str, Any]
    body: bytes
    expiration: str | None

    @property
    def task(self) -> str:
        """The task's name."""
        headers = self.properties.get("application_headers") or {}
        return str(headers.get("task", ""))


@dataclass
class Broker:
    """What one broker has received: messages, and with which arguments what was declared."""

    published: list[Published] = field(default_factory=list)
    declared: list[tuple[Any, ...]] = field(default_factory=list)
    connections: list["Connection"] = field(default_factory=list)

    def forget(self) -> None:
        """Begin anew: what was declared before will be declared again."""
        self.published.clear()
        self.declared.clear()
        for connection in self.connections:
            if connection.client is not None:
                connection.client.declared_entities.clear()


_brokers: dict[str, Broker] = {}
_names = itertools.count(1)


def broker(name: str) -> Broker:
    """Return the broker of this name; it exists with its first mention."""
    return _brokers.setdefault(name, Broker())


def new_name() -> str:
    """Return a name that no broker has."""
    return f"broker{next(_names)}"


class Channel(pyamqp.Channel):
    """py-amqp's channel above the frames."""

    def __init__(self, connection: "Connection") -> None:
        super().__init__(connection)
        self.is_open = True
        self._last_tag = 0

    def send_method(
        self,
        sig: tuple[int, int],
        format: str | None = None,  # noqa: A002 (py-amqp's name)
        args: Any = None,
        content: Message | None = None,
        wait: Any = None,
        callback: Any = None,
        returns_tuple: bool = False,
    ) -> Any:
        """Record what would be sent, and answer for the broker."""
        received = self.connection.broker
        if sig == spec.Basic.Publish:
            assert content is not None
            received.published.append(_published(args, content))
            self._last_tag += 1
            self.connection.unconfirmed.append((self, self._last_tag))
        elif sig in _DECLARATIONS:
            received.declared.append((sig, *args))
        return self.wait(wait)

    def wait(self, method: Any, *_: Any, **__: Any) -> Any:
        """Answer for the broker."""
        answers = {spec.Queue.DeclareOk: ("answered", 0, 0), spec.Basic.ConsumeOk: ("answered",)}
        return answers.get(method)

    def close(self, *_: Any, **__: Any) -> None:
        """Nothing is open."""
        self.is_open = False


def _published(args: tuple[Any, ...], content: Message) -> Published:
    _, exchange, routing_key, mandatory, _ = args
    body = content.body
    if isinstance(body, str):
        body = body.encode(content.properties.setdefault("content_encoding", "utf-8"))
    expiration = content.properties.pop("expiration", None)
    frame = content._serialize_properties()
    received = Message()
    received._load_properties(spec.Basic.CLASS_ID, frame, 0)
    return Published(
        exchange, routing_key, bool(mandatory), frame, received.properties, bytes(body), expiration
    )


class _Socket:
    """Reads the frames that a publisher writes by itself."""

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection

    @contextmanager
    def having_timeout(self, timeout: float | None) -> Iterator[None]:
        yield

    def write(self, data: bytes) -> None:
        """Hand whole messages to their channel, as their frames come in."""
        while data:
            kind, number, size = struct.unpack_from(">BHI", data)
            frame, end, data = data[7 : 7 + size], data[7 + size], data[8 + size :]
            assert end == 0xCE
            if kind == 1:
                assert struct.unpack_from(">HH", frame) == spec.Basic.Publish
                args, _ = loads("Bssbb", frame, 4)
                content = Message()
            elif kind == 2:
                _, _, left = struct.unpack_from(">HHQ", frame)
                content._load_properties(spec.Basic.CLASS_ID, frame, 12)
                content.body = b""
            else:
                content.body += frame
                left -= len(frame)
            if kind != 1 and not left:
                channel = self._connection.channels[number]
                channel.send_method(spec.Basic.Publish, None, args, content)


class Connection:
    """py-amqp's connection, as far as its channels and kombu need it."""

    confirm_publish = False
    connected = True
    frame_max = 131072

    def __init__(self, client: Any) -> None:
        self.client: Any = client
        self.broker = broker(client.hostname)
        self.broker.connections.append(self)
        self.channels: dict[int, Any] = {}
        self.client_properties: dict[str, Any] = {}
        self.transport = _Socket(self)
        self.unconfirmed: list[tuple[Channel, int]] = []
        self._ids = itertools.count(1)

    def _get_free_channel_id(self) -> int:
        return next(self._ids)

    def channel(self) -> Channel:
        return Channel(self)

    def drain_events(self, timeout: float | None = None) -> None:
        """Confirm what was published."""
        if not self.unconfirmed:
            raise TimeoutError
        waiting, self.unconfirmed = self.unconfirmed, []
        for channel, tag in waiting:
            for listener in tuple(channel.events["basic_ack"]):
                listener(tag, False)

    def collect(self) -> None:
        self.connected = False

    close = collect


class Transport(pyamqp.Transport):
    """kombu's transport for py-amqp, without the socket."""

    def establish_connection(self) -> Connection:
        return Connection(self.client)

    def close_connection(self, connection: Connection) -> None:
        connection.close()
