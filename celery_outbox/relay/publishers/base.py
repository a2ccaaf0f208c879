"""Publisher: one connection to the broker, and what became of each message."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from kombu import Connection

from celery_outbox.declaration import thaw
from celery_outbox.envelope import Envelope
from celery_outbox.relay.outcome import Outcome

__all__ = ["Meanwhile", "Publisher", "nothing", "said"]

#: What the caller has to do while the broker works; whether to go on.
Meanwhile: TypeAlias = Callable[[], bool]


def nothing() -> bool:
    """There is nothing to do meanwhile."""
    return True


class Publisher(ABC):
    """One connection to the broker, made when it is needed and again after an error."""

    def __init__(self, connect: Callable[[], Connection], confirm_timeout: float) -> None:
        self._connect = connect
        self._confirm_timeout = confirm_timeout
        self._connection: Connection | None = None
        self._channel: Any = None
        self._declared: set[str] = set()
        #: The same by address, for the common case that an address has one declaration.
        self._declared_for: dict[tuple[str, str], Sequence[Mapping[str, Any]]] = {}

    @abstractmethod
    def publish(
        self, batch: Sequence[tuple[int, Envelope]], meanwhile: Meanwhile = nothing
    ) -> dict[int, Outcome]:
        """Publish the envelopes, each under a number of the caller's, and return what became of each.

        Never raises for what the broker says, or for its absence. Calls `meanwhile` now and then:
        between messages that go one by one, and while the broker works; at False it sends no more.
        """

    def late(self) -> dict[int, Outcome]:
        """Return what became of messages of which `publish` said that they were under way."""
        return {}

    def open(self) -> None:
        """Connect if need be. Raises what the transport raises when the broker is away."""
        self._ensure_connection()

    def _ensure_connection(self) -> None:
        if self._connection is None:
            connection = self._connect()
            connection.ensure_connection(
                max_retries=1, interval_start=0, timeout=self._confirm_timeout
            )
            self._connection = connection

    def close(self) -> None:
        """Drop the connection. Safe when there is none, or a broken one."""
        connection, self._connection = self._connection, None
        self._channel = None
        self._forget_declarations()
        if connection is not None:
            connection.collect(socket_timeout=1)

    def _open_channel(self) -> Any:
        self._ensure_connection()
        assert self._connection is not None
        if self._channel is None:
            self._channel = self._connection.channel()
        return self._channel

    def _declare(self, channel: Any, envelope: Envelope) -> None:
        """Declare what was not yet declared on this connection."""
        address = (envelope.exchange, envelope.routing_key)
        if self._declared_for.get(address) == envelope.declare:
            return
        for entity in envelope.declare:
            known = repr(entity)
            if known not in self._declared:
                thaw(entity)(channel).declare()
                self._declared.add(known)
        self._declared_for[address] = envelope.declare

    def _forget_declarations(self) -> None:
        self._declared.clear()
        self._declared_for.clear()

    @staticmethod
    def _message(channel: Any, envelope: Envelope) -> Any:
        return channel.prepare_message(
            envelope.body.decode() if envelope.is_text else envelope.body,
            envelope.priority,
            envelope.content_type,
            envelope.content_encoding,
            dict(envelope.headers),
            dict(envelope.properties),
        )


def said(error: BaseException) -> str:
    """Return an error as the tables keep it: its kind and its words, cut."""
    return f"{type(error).__name__}: {error}"[:2000]
