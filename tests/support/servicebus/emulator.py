"""Emulator: one port on loopback that speaks AMQP, AMQP over TLS, and HTTPS."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from typing_extensions import Self

from tests.support.servicebus import admin, controls
from tests.support.servicebus.certificate import make_certificate
from tests.support.servicebus.connections import Connection
from tests.support.servicebus.faults import FaultPlan
from tests.support.servicebus.queues import Broker, Options
from tests.support.servicebus.rights import Policies

__all__ = ["POLICY", "Emulator", "kombu_url"]

POLICY, _KEY = "RootManageSharedAccessKey", "emulator-key="
_STANDARD_BYTES = 256 * 1024
_TLS_HELLO = b"\x16"
_IDLE = "The connection was inactive for more than the allowed 300000 milliseconds."

_Value = TypeVar("_Value")


class Emulator:
    """A namespace in memory, served by a thread, for the time of a ``with`` block.

    The SDK insists on port 5671 with TLS: then every emulator needs an address of its own, of which
    loopback has many. Without TLS (``UseDevelopmentEmulator=true``) any port will do.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        folder: Path,
        max_message_bytes: int = _STANDARD_BYTES,
        max_batch_bytes: int | None = None,
        ack_seconds: float = 0.0,
    ) -> None:
        if not host.startswith("127."):
            raise ValueError("the emulator serves on loopback only")
        self.host, self.port = host, port
        self.max_message_bytes = max_message_bytes
        self.max_batch_bytes = max_batch_bytes
        #: How long each acknowledgement of a send takes.
        self.ack_seconds = ack_seconds
        self.policies = Policies({POLICY: _KEY})
        self.faults = FaultPlan()
        self.stats: Counter[str] = Counter()
        self.connections: set[Connection] = set()
        self.loop = asyncio.new_event_loop()
        self.broker = Broker(self.loop)
        self._folder = folder
        self._tasks: set[asyncio.Task[None]] = set()

    # Life

    def __enter__(self) -> Self:
        self.certificate, key = make_certificate(self._folder, self.host)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self.certificate, key)
        self._listener = socket.create_server((self.host, self.port), backlog=128)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="servicebus", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        accepting = self.loop.create_task(self._accept())
        self.loop.run_forever()
        for task in (accepting, *self._tasks):
            task.cancel()
        gathered = asyncio.gather(accepting, *self._tasks, return_exceptions=True)
        self.loop.run_until_complete(gathered)
        self._listener.close()
        self.loop.close()

    async def _accept(self) -> None:
        while True:
            client, _ = await self.loop.sock_accept(self._listener)
            task = self.loop.create_task(self._serve(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: socket.socket) -> None:
        try:
            reader, writer = await self._take(client)
        except OSError:
            client.close()
            return
        # From here on the socket is asyncio's to close.
        try:
            head = await reader.readexactly(8)
            if head.startswith(b"AMQP"):
                await Connection(self, reader, writer).run(head)
            else:
                await self._serve_http(head, reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _take(
        self, client: socket.socket
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Look at the first byte without taking it: TLS, or AMQP or HTTP as it is."""
        client.setblocking(False)
        readable = asyncio.Event()
        self.loop.add_reader(client, readable.set)
        try:
            await readable.wait()
        finally:
            self.loop.remove_reader(client)
        context = self._context if client.recv(1, socket.MSG_PEEK) == _TLS_HELLO else None
        reader = asyncio.StreamReader(limit=2**21)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await self.loop.connect_accepted_socket(
            lambda: protocol, client, ssl=context
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, self.loop)

    async def _serve_http(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.closing(writer):
            while True:
                lines = (head + await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                head = b""
                method, target, _ = lines[0].split(" ", 2)
                pairs = (line.partition(":") for line in lines[1:] if line)
                headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                if target.startswith(controls.PATH):
                    status, answer = controls.control(self, target, content)
                else:
                    status, answer = admin.handle(self, method, target, headers, content)
                body = answer.encode()
                writer.write(
                    f"HTTP/1.1 {status} -\r\nDate: {formatdate(usegmt=True)}\r\n"
                    "Content-Type: application/atom+xml;type=entry;charset=utf-8\r\n"
                    f"Content-Length: {len(body)}\r\n\r\n".encode()
                    + body
                )
                await writer.drain()

    # For tests

    def call(self, function: Callable[[], _Value]) -> _Value:
        """Call `function` on the emulator's loop, and return its answer."""

        async def called() -> _Value:
            return function()

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result(10)

    def create_queue(self, name: str, **options: Any) -> None:
        """Create a queue; see `Options`."""
        self.call(lambda: self.broker.create(name, Options(**options)))

    def counts(self, name: str) -> Counter[str]:
        """Return how many messages a queue has, and what it has done so far."""
        return self.call(lambda: self._counts(name))

    def _counts(self, name: str) -> Counter[str]:
        queue = self.broker.find(name)
        return queue.stats + Counter(queue.counts())

    def drop_queue(self, name: str) -> None:
        """Delete a queue, on the emulator's loop; its links end."""
        queue = self.broker.delete(name)
        for connection in list(self.connections):
            for session in connection.sessions.values():
                for link in list(session.links.values()):
                    if link.entity.lower() == queue.name.lower():
                        link.detach("amqp:not-found", f"'{queue.name}' was deleted.")

    def end_connections(self, condition: str | None = "amqp:connection:forced") -> None:
        """Close all connections, on the emulator's loop; without a condition: cut them."""
        for connection in list(self.connections):
            if condition is None:
                connection.cut()
            else:
                connection.close(condition, _IDLE)

    def state(self) -> dict[str, Any]:
        """Return what there is, on the emulator's loop."""
        return {
            "queues": {
                queue.name: self._counts(queue.name) for queue in self.broker.queues.values()
            },
            "hits": self.faults.hits,
            "planned": sum(max(fault.times, 0) for fault in self.faults.planned),
            "stats": self.stats,
            "connections": len(self.connections),
        }

    @property
    def connection_string(self) -> str:
        """How the SDK reaches it without TLS."""
        return (
            f"Endpoint=sb://{self.host}:{self.port};SharedAccessKeyName={POLICY};"
            f"SharedAccessKey={_KEY};UseDevelopmentEmulator=true"
        )


def kombu_url(host: str, port: int) -> str:
    """Return how kombu reaches an emulator, with TLS.

    kombu appends Azure's suffix to a name that does not end in ``.net``; the SDK drops the path.
    """
    return f"azureservicebus://{POLICY}:{_KEY}@{host}:{port}/.net"
