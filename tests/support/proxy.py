"""A TCP proxy that fails on demand: cut connections, refused ones, replies that never arrive."""

import contextlib
import socket
import threading
from types import TracebackType

from typing_extensions import Self

from tests.support.ports import free_port


class TcpProxy:
    """Listens on a free port of 127.0.0.1 and passes everything on, until told otherwise.

    ``with TcpProxy("127.0.0.1", server.port) as proxy:`` and connect to ``proxy.port``.
    """

    host = "127.0.0.1"

    def __init__(self, target_host: str, target_port: int) -> None:
        """Listen at once; connect to the target for each connection that arrives."""
        self.target = (target_host, target_port)
        self.connections = 0
        """How many connections arrived so far."""
        self.passed = 0
        """How many bytes went on to the server so far."""
        self.swallowed = 0
        """How many bytes were dropped so far, in either direction."""
        self.port = free_port()
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._swallow_replies = False
        self._swallow_requests = False
        self._listener: socket.socket | None = None
        self.accept()

    def cut(self) -> None:
        """Close every open connection; new ones are welcome."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.cut()

    def refuse(self) -> None:
        """Refuse new connections, as if no server were there; open ones go on (see `cut`)."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which a close would not
            self._acceptor.join()
            listener.close()

    def accept(self) -> None:
        """Accept new connections again, on the same port."""
        if self._listener is not None:
            return
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, self.port))
        listener.listen(128)
        self._listener = listener
        self._acceptor = threading.Thread(target=self._serve, args=(listener,), daemon=True)
        self._acceptor.start()

    def swallow_replies(self) -> None:
        """Pass what goes to the server and drop what comes back: a publish without its confirm."""
        self._swallow_replies = True

    def swallow_requests(self) -> None:
        """Drop what goes to the server; with `swallow_replies` too, a network that fell silent."""
        self._swallow_requests = True

    def heal(self) -> None:
        """Work as at first. Connections that lost bytes are cut: their streams are torn."""
        self._swallow_replies = self._swallow_requests = False
        with self._lock:
            torn = [link for link in self._links if link.torn]
        for link in torn:
            link.cut()
        self.accept()

    def close(self) -> None:
        """Refuse new connections and cut the open ones."""
        self.refuse()
        self.cut()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # shut down by refuse()
                return
            self.connections += 1
            try:
                server = socket.create_connection(self.target, timeout=10)
            except OSError:
                client.close()
                continue
            link = _Link(self, client, server)
            with self._lock:
                self._links.add(link)
            link.start()

    def _passes(self, link: "_Link", size: int, to_server: bool) -> bool:
        """Count what was read, and say whether it goes on."""
        with self._lock:
            if self._swallow_requests if to_server else self._swallow_replies:
                link.torn.add(to_server)
            if to_server in link.torn:  # once it lost bytes, a stream stays silent until it is cut
                self.swallowed += size
                return False
            if to_server:
                self.passed += size
            return True

    def _forget(self, link: "_Link") -> None:
        with self._lock:
            self._links.discard(link)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Link:
    """One connection through the proxy: two sockets, and a thread for each way."""

    def __init__(self, proxy: TcpProxy, client: socket.socket, server: socket.socket) -> None:
        self.torn: set[bool] = set()
        """The directions that lost bytes (True: towards the server)."""
        self._proxy = proxy
        self._client = client
        self._server = server
        for sock in (client, server):
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._requests = threading.Thread(target=self._run, daemon=True)
        self._replies = threading.Thread(target=self._pump, args=(False,), daemon=True)

    def start(self) -> None:
        self._replies.start()
        self._requests.start()

    def cut(self) -> None:
        self._wake()
        self._requests.join()

    def _run(self) -> None:
        """Pump the requests, and clear up when both ways have ended."""
        self._pump(True)
        self._replies.join()
        self._client.close()
        self._server.close()
        self._proxy._forget(self)

    def _pump(self, to_server: bool) -> None:
        source, target = (self._client, self._server) if to_server else (self._server, self._client)
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self._proxy._passes(self, len(data), to_server):
                    target.sendall(data)
        self._wake()

    def _wake(self) -> None:
        """End both streams, which also ends both threads."""
        for sock in (self._client, self._server):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
