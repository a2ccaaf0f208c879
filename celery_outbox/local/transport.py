"""Transport: ``outbox://``, the local queues of an app's Outbox as a broker."""

from __future__ import annotations

import time
from typing import Any

from kombu.transport import virtual
from kombu.transport.virtual import Channel as VirtualChannel
from sqlalchemy import select
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_outbox.local.channel import Channel
from celery_outbox.local.hosts import URL, Host, host_of
from celery_outbox.local.looking import Bell, LoopBell, Pause
from celery_outbox.storage.notifications import Listener

__all__ = ["Transport"]

#: How long a worker's own loop may be kept while its tasks run: before 5.7 it acknowledges only there.
_LONGEST_WAIT = 0.05


class Transport(virtual.Transport):
    """The database of an app's Outbox, in place of a broker.

    Which Outbox is in the transport options (see `celery_outbox.local.hosts`). There is no fanout,
    so that workers start without remote control, mingle and gossip.

    A worker looks for messages in kombu's event loop, or, with a pool of greenlets, in one of its own
    (`drain_events`).
    """

    Channel: type[VirtualChannel] = Channel
    driver_type = "outbox"
    driver_name = "celery_outbox"
    implements = virtual.Transport.implements.extend(asynchronous=True)
    connection_errors = (
        *virtual.Transport.connection_errors,
        OSError,
        OperationalError,
        InterfaceError,
        InternalError,
        PoolTimeout,
    )

    def __init__(self, client: Any, **options: Any) -> None:
        super().__init__(client, **options)
        self.host: Host = host_of(client.transport_options)
        self.state = self.host.routing.state
        self._pause = Pause(self.host.config.poll_seconds)
        self._bell: Bell | LoopBell = Bell()

    def establish_connection(self) -> Any:
        """Ask the database whether it is there."""
        with self.host.local_store.engine.connect() as connection:
            connection.execute(select(1))
        return super().establish_connection()

    def close_connection(self, connection: Any) -> None:
        """Close all channels."""
        self.unregister_from_event_loop(connection, None)
        super().close_connection(connection)

    def ring(self) -> None:
        """Something has changed: look again. By any thread."""
        self._bell.ring()

    def _drain(self) -> int:
        """Deliver what there is; return how much it was."""
        delivered = 0
        for channel in list(self.channels):
            delivered += channel.drain(self._deliver)
        if delivered:
            self._pause.found()
        return delivered

    def _has_room(self) -> bool:
        return any(channel.has_room for channel in self.channels)

    # In kombu's event loop

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Let the loop look for messages."""
        self.unregister_from_event_loop(connection, loop)
        self._bell = LoopBell(loop, self._look, self._listen)

    def _listen(self) -> Listener | None:
        return self.host.local_store.listen() if self.host.config.notify else None

    def unregister_from_event_loop(self, connection: Any, loop: Any) -> None:
        """Let no loop look any more."""
        if isinstance(self._bell, LoopBell):
            self._bell.close()
            self._bell = Bell()

    def _look(self) -> float:
        if self._drain():
            return 0.0
        # Room comes with an acknowledgement, which rings.
        return self._pause.next() if self._has_room() else self.host.config.poll_seconds

    # In a loop of one's own

    def drain_events(self, connection: Any, timeout: float | None = None) -> None:
        """Deliver what there is, or wait for it; raise `TimeoutError` if nothing comes."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._drain():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise TimeoutError
            busy = any(channel.is_holding for channel in self.channels)
            pause = self._pause.next() if self._has_room() else self.host.config.poll_seconds
            if busy:
                pause = min(pause, _LONGEST_WAIT)
            if deadline is not None:
                pause = min(pause, deadline - now)
            bell = self._bell
            if isinstance(bell, Bell) and bell.wait(pause):
                self._pause.found()
            elif busy and deadline is not None:
                raise TimeoutError

    @property
    def default_connection_params(self) -> dict[str, Any]:
        """None: the address has no parts."""
        return {}

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        """Return the address as it is shown."""
        return URL
