"""Publishers: a batch goes to the broker, and an outcome comes back for each message."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from amqp.exceptions import FrameSyntaxError
from kombu import Connection
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp, virtual

from celery_outbox.declaration import thaw
from celery_outbox.envelope import Envelope
from celery_outbox.errors import ConfigurationError
from celery_outbox.relay.outcome import Confirmed, Outcome, Refused, Undecided

_AWAY = (*pyamqp.Transport.connection_errors, OperationalError)
#: After so many losses of the connection in a row, a message is suspected to be the reason.
_SUSPICIOUS = 2
#: What probes are addressed to; no queue should have this name.
_PROBE = "celery-outbox-probe"
#: How long one probe may be under way, and how long a call waits for it.
_PROBE_SECONDS = 60.0
_LISTEN_SECONDS = 1.0
_CLOSED = pyamqp.Transport.channel_errors

__all__ = ["ConfirmingPublisher", "Publisher", "VirtualPublisher", "publisher_for"]


#: kombu's transports of which it is known what a publish that returned means.
_KNOWN = ("redis", "filesystem", "sql", "memory")


def publisher_for(
    connect: Callable[[], Connection], confirm_timeout: float, *, trust_broker: bool = False
) -> Publisher:
    """Return the publisher for the transport of `connect()`, without connecting.

    Raises `ConfigurationError` for a transport whose answer to a publish means nothing, or is not
    known to mean that it has the message, unless `trust_broker`.
    """
    connection = connect()
    if isinstance(connection.transport, pyamqp.Transport):
        return ConfirmingPublisher(connect, confirm_timeout)
    kind = connection.transport.driver_type
    if isinstance(connection.transport, virtual.Transport) and (kind in _KNOWN or trust_broker):
        return VirtualPublisher(connect, confirm_timeout)
    raise ConfigurationError(
        f"broker_url: it is not known that a publish by the transport {kind!r} "
        f"({connection.transport.driver_name}) means that the broker has the message, so that "
        "nothing could leave the outbox safely; use amqp:// (py-amqp) or redis://"
        + ("" if trust_broker else ", or insist with outbox_trust_broker = True")
    )


class Publisher(ABC):
    """One connection to the broker, made when it is needed and again after an error."""

    def __init__(self, connect: Callable[[], Connection], confirm_timeout: float) -> None:
        self._connect = connect
        self._confirm_timeout = confirm_timeout
        self._connection: Connection | None = None
        self._channel: Any = None
        self._declared: set[str] = set()

    @abstractmethod
    def publish(self, batch: Sequence[tuple[int, Envelope]]) -> dict[int, Outcome]:
        """Publish the envelopes, each under a number of the caller's, and return what became of each.

        Never raises for what the broker says, or for its absence.
        """

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
        self._declared.clear()
        if connection is not None:
            connection.collect(socket_timeout=1)

    def _open_channel(self) -> Any:
        self._ensure_connection()
        assert self._connection is not None
        if self._channel is None:
            self._channel = self._connection.channel()
        return self._channel

    def _declare(self, channel: Any, entities: Sequence[Mapping[str, Any]]) -> None:
        """Declare what was not yet declared on this connection."""
        for entity in entities:
            known = repr(entity)
            if known not in self._declared:
                thaw(entity)(channel).declare()
                self._declared.add(known)

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


class VirtualPublisher(Publisher):
    """Redis and kombu's embedded transports: a publish that returns was written.

    That is the strongest answer that they give. There is no mandatory flag, so whether an exchange
    leads anywhere is looked up before.

    A message that a broker can't take (too large for Redis) may make it end the connection, as if it
    went away. What lost the connection is passed over the next time; if others go through, it is to
    blame.
    """

    def __init__(self, connect: Callable[[], Connection], confirm_timeout: float) -> None:
        super().__init__(connect, confirm_timeout)
        #: The messages with which the connection was lost.
        self._suspects: set[int] = set()

    def publish(self, batch: Sequence[tuple[int, Envelope]]) -> dict[int, Outcome]:
        outcomes: dict[int, Outcome] = {}
        passed_over: dict[int, str] = {}
        for number, envelope in batch:
            try:
                self.open()
            except Exception as exc:
                return self._give_up(batch, outcomes, _said(exc))
            outcome = self._publish_one(envelope)
            if isinstance(outcome, Undecided):
                self.close()
                if number not in self._suspects:
                    self._suspects.add(number)
                    return self._give_up(batch, outcomes, outcome.error)
                passed_over[number] = outcome.error
                continue
            outcomes[number] = outcome
            if isinstance(outcome, Confirmed):
                for guilty, error in passed_over.items():
                    outcomes[guilty] = Refused(f"the broker ended the connection for it: {error}")
                passed_over.clear()
        for number, error in passed_over.items():
            outcomes[number] = Undecided(error)
        self._suspects.intersection_update(passed_over)
        return outcomes

    @staticmethod
    def _give_up(
        batch: Sequence[tuple[int, Envelope]], outcomes: dict[int, Outcome], error: str
    ) -> dict[int, Outcome]:
        for number, _ in batch:
            outcomes.setdefault(number, Undecided(error))
        return outcomes

    def _publish_one(self, envelope: Envelope) -> Outcome:
        assert self._connection is not None
        away = self._connection.connection_errors
        try:
            channel = self._open_channel()
            self._declare(channel, envelope.declare)
            if envelope.mandatory and not self._leads_anywhere(channel, envelope):
                return Refused(f"unroutable: no queue is bound for {envelope.destination!r}")
            channel.basic_publish(
                self._message(channel, envelope),
                exchange=envelope.exchange,
                routing_key=envelope.routing_key,
            )
        except away as exc:
            return Undecided(_said(exc))
        except Exception as exc:
            return Refused(_said(exc))
        return Confirmed()

    @staticmethod
    def _leads_anywhere(channel: Any, envelope: Envelope) -> bool:
        if not envelope.exchange:
            return True
        try:
            return bool(channel._lookup(envelope.exchange, envelope.routing_key))
        except LookupError:
            return False


class ConfirmingPublisher(Publisher):
    """RabbitMQ: publisher confirms, all of a batch in flight at once.

    Each message has its delivery tag; an ack or nack settles its tag, or with ``multiple`` all lower
    ones. A message that came back (``mandatory``) is acked after it was returned. After any error of
    the channel the channel is thrown away, for a late ack would be taken for another message's; the
    broker does not say which message it closed the channel for, so what is left goes one by one.

    A broker that is short of memory or disk takes connections, and then reads nothing from those that
    publish; what was written to them arrives when it has recovered. So after a silence it must first
    confirm a probe, and until it does no batch is written to it again.
    """

    def open(self) -> None:
        """Connect if need be. Raises what the transport raises when the broker is away, or silent."""
        self._ensure_connection()
        if self._silent:
            self._await_probe()

    def publish(self, batch: Sequence[tuple[int, Envelope]]) -> dict[int, Outcome]:
        outcomes: dict[int, Outcome] = {}
        try:
            self._confirming_channel()
        except _AWAY as exc:
            self._give_up(batch, outcomes, exc)
            return outcomes
        if self._losses >= _SUSPICIOUS:
            self._one_by_one(batch, outcomes)
            return outcomes
        try:
            self._exchange_with(batch, outcomes)
            self._losses = 0
        except _CLOSED as exc:
            self._drop_channel()
            if len(left := [entry for entry in batch if entry[0] not in outcomes]) == 1:
                outcomes[left[0][0]] = Refused(_said(exc))
            else:
                self._one_by_one(left, outcomes)
        except _AWAY as exc:
            self._count_loss(exc)
            self._give_up(batch, outcomes, exc)
        return outcomes

    def _one_by_one(
        self, batch: Sequence[tuple[int, Envelope]], outcomes: dict[int, Outcome]
    ) -> None:
        """Find out for which message the broker closes the channel, or the connection."""
        for entry in batch:
            try:
                self._confirming_channel()
            except _AWAY as exc:
                self._give_up(batch, outcomes, exc)
                return
            try:
                self._exchange_with([entry], outcomes)
            except _CLOSED as exc:
                self._drop_channel()
                outcomes[entry[0]] = Refused(_said(exc))
            except _AWAY as exc:
                if self._losses < _SUSPICIOUS or isinstance(exc, TimeoutError):
                    self._count_loss(exc)
                    self._give_up(batch, outcomes, exc)
                    return
                self.close()
                outcomes[entry[0]] = Refused(
                    f"the broker ended the connection for it: {_said(exc)}"
                )
        self._losses = 0

    def _count_loss(self, error: BaseException) -> None:
        # Silence says nothing about a message, an end of the connection may.
        self._silent = isinstance(error, TimeoutError)
        self._losses += not self._silent

    def _await_probe(self) -> None:
        """Return when the broker has confirmed a message that leads nowhere; raise while it has not.

        The probe stays under way from one call to the next, and is replaced now and then: a broker
        that reads nothing keeps each connection that was given up.
        """
        if self._probed is not None and time.monotonic() > self._probe_ends:
            self.close()
        try:
            channel = self._confirming_channel()
            if self._probed is None:
                self._probe(channel)
            self._listen(channel)
        except _CLOSED:
            # No right to publish there, perhaps; but it has answered.
            self._silent = False
            self._drop_channel()
        except _AWAY:
            self.close()
            raise
        if self._silent:
            raise TimeoutError("it takes connections, but confirms nothing (see its alarms)")

    def _probe(self, channel: Any) -> None:
        for name in ("basic_ack", "basic_nack"):
            channel.events[name].add(self._hear)
        self._tag += 1
        channel._basic_publish(channel.prepare_message(b"probe"), routing_key=_PROBE)
        self._probed = channel
        self._probe_ends = time.monotonic() + _PROBE_SECONDS

    def _listen(self, channel: Any) -> None:
        deadline = time.monotonic() + min(_LISTEN_SECONDS, self._confirm_timeout)
        while self._silent and (left := deadline - time.monotonic()) > 0:
            with suppress(TimeoutError):
                channel.connection.drain_events(timeout=left)
        if not self._silent:
            for name in ("basic_ack", "basic_nack"):
                channel.events[name].discard(self._hear)
            self._probed = None

    def _hear(self, _tag: int, _multiple: bool) -> None:
        self._silent = False

    def close(self) -> None:
        """Drop the connection. Safe when there is none, or a broken one."""
        self._probed = None
        super().close()

    def _drop_channel(self) -> None:
        self._channel = self._probed = None
        self._declared.clear()

    def _give_up(
        self,
        batch: Sequence[tuple[int, Envelope]],
        outcomes: dict[int, Outcome],
        error: BaseException,
    ) -> None:
        self.close()
        for number, _ in batch:
            outcomes.setdefault(number, Undecided(_said(error)))

    def _exchange_with(
        self, batch: Sequence[tuple[int, Envelope]], outcomes: dict[int, Outcome]
    ) -> None:
        """Publish all, then wait until the broker has answered for all.

        What it has answered stands in `outcomes`, also when this raises.
        """
        channel = self._confirming_channel()
        confirms = _Confirms(outcomes)
        listeners = {
            "basic_ack": confirms.acked,
            "basic_nack": confirms.nacked,
            "basic_return": confirms.returned,
        }
        for name, listener in listeners.items():
            channel.events[name].add(listener)
        try:
            for number, envelope in batch:
                self._send(channel, number, envelope, confirms)
            deadline = time.monotonic() + self._confirm_timeout
            while confirms.pending:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(
                        f"{len(confirms.pending)} messages were not confirmed in time"
                    )
                with suppress(TimeoutError):
                    channel.connection.drain_events(timeout=left)
        finally:
            for name, listener in listeners.items():
                channel.events[name].discard(listener)

    def _send(self, channel: Any, number: int, envelope: Envelope, confirms: _Confirms) -> None:
        try:
            self._declare(channel, envelope.declare)
        except Exception as exc:
            if isinstance(exc, (*_AWAY, *_CLOSED)) and not _is_our_own(exc):
                raise
            # AMQP can't say this argument of a queue, and nothing was written.
            confirms.outcomes[number] = Refused(_said(exc))
            return
        self._tag += 1
        confirms.pending[self._tag] = (number, envelope)
        try:
            # basic_publish would wait for each confirm where the user's transport options ask for
            # confirm_publish, and take any message's ack for this one's.
            channel._basic_publish(
                self._message(channel, envelope),
                exchange=envelope.exchange,
                routing_key=envelope.routing_key,
                mandatory=envelope.mandatory,
                immediate=False,
            )
        except Exception as exc:
            if isinstance(exc, (*_AWAY, *_CLOSED)) and not _is_our_own(exc):
                raise
            # AMQP can't say this header or property. Nothing was written, so the broker has not
            # counted the message either.
            del confirms.pending[self._tag]
            self._tag -= 1
            confirms.outcomes[number] = Refused(_said(exc))

    def _confirming_channel(self) -> Any:
        if self._channel is None:
            channel = self._open_channel()
            channel.confirm_select()
            self._tag = 0
        return self._channel

    _tag = 0
    #: Whether the broker let the confirm timeout pass, and has not answered since.
    _silent = False
    #: The channel on which a probe is under way, and until when.
    _probed: Any = None
    _probe_ends = 0.0
    #: How often in a row the connection was lost in the middle of a batch.
    _losses = 0


class _Confirms:
    """The delivery tags of one batch, and what the broker answered for them."""

    def __init__(self, outcomes: dict[int, Outcome]) -> None:
        self.outcomes = outcomes
        #: Delivery tag → the message that was published with it.
        self.pending: dict[int, tuple[int, Envelope]] = {}

    def acked(self, tag: int, multiple: bool) -> None:
        for number in self._settle(tag, multiple):
            # A returned message has its outcome already.
            self.outcomes.setdefault(number, Confirmed())

    def nacked(self, tag: int, multiple: bool) -> None:
        for number in self._settle(tag, multiple):
            self.outcomes[number] = Refused("the broker refused the message (nack: queue full?)")

    def returned(self, error: Exception, exchange: str, routing_key: str, message: Any) -> None:
        # It names no tag. Messages of one address and one id share their fate, so the first will do.
        correlation_id = message.properties.get("correlation_id")
        for number, envelope in self.pending.values():
            if (
                number not in self.outcomes
                and envelope.exchange == exchange
                and envelope.routing_key == routing_key
                and envelope.properties.get("correlation_id") == correlation_id
            ):
                self.outcomes[number] = Refused(
                    f"unroutable, the broker returned it: {_said(error)} (exchange {exchange!r}, "
                    f"routing key {routing_key!r})"
                )
                return

    def _settle(self, tag: int, multiple: bool) -> list[int]:
        tags = [known for known in self.pending if known <= tag] if multiple else [tag]
        settled = [self.pending.pop(known, None) for known in tags]
        return [entry[0] for entry in settled if entry is not None]


def _is_our_own(error: Exception) -> bool:
    """Whether py-amqp raised this by itself, where the broker's errors name the method at fault."""
    return isinstance(error, FrameSyntaxError) and error.method_sig is None


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]
