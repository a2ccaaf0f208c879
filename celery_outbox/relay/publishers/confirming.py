"""ConfirmingPublisher: RabbitMQ, by py-amqp."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from amqp.exceptions import FrameSyntaxError
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp

from celery_outbox.envelope import Envelope
from celery_outbox.relay.outcome import Confirmed, Outcome, Refused, Undecided
from celery_outbox.relay.publishers.base import Publisher, said
from celery_outbox.relay.publishers.frames import frames

__all__ = ["ConfirmingPublisher"]

_AWAY = (*pyamqp.Transport.connection_errors, OperationalError)
_CLOSED = pyamqp.Transport.channel_errors
#: After so many losses of the connection in a row, a message is suspected to be the reason.
_SUSPICIOUS = 2
#: What probes are addressed to; no queue should have this name.
_PROBE = "celery-outbox-probe"
#: How long one probe may be under way, and how long a call waits for it.
_PROBE_SECONDS = 60.0
_LISTEN_SECONDS = 1.0
#: How many bytes are written at a time.
_PIECE = 64 * 1024


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
                outcomes[left[0][0]] = Refused(said(exc))
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
                outcomes[entry[0]] = Refused(said(exc))
            except _AWAY as exc:
                if self._losses < _SUSPICIOUS or isinstance(exc, TimeoutError):
                    self._count_loss(exc)
                    self._give_up(batch, outcomes, exc)
                    return
                self.close()
                outcomes[entry[0]] = Refused(f"the broker ended the connection for it: {said(exc)}")
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
        self._forget_declarations()

    def _give_up(
        self,
        batch: Sequence[tuple[int, Envelope]],
        outcomes: dict[int, Outcome],
        error: BaseException,
    ) -> None:
        self.close()
        for number, _ in batch:
            outcomes.setdefault(number, Undecided(said(error)))

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
            self._write(channel, batch, confirms)
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

    def _write(
        self, channel: Any, batch: Sequence[tuple[int, Envelope]], confirms: _Confirms
    ) -> None:
        """Write the whole batch, in a few pieces."""
        connection = channel.connection
        pending: list[bytes] = []
        size = 0
        for number, envelope in batch:
            try:
                self._declare(channel, envelope)
                data = frames(envelope, channel=channel.channel_id, frame_max=connection.frame_max)
            except Exception as exc:
                if isinstance(exc, (*_AWAY, *_CLOSED)) and not _is_our_own(exc):
                    raise
                # AMQP can't say this argument of a queue, this header or this property. Nothing was
                # written, so the broker has not counted the message either.
                confirms.outcomes[number] = Refused(said(exc))
                continue
            self._tag += 1
            confirms.pending[self._tag] = (number, envelope)
            pending.append(data)
            size += len(data)
            if size >= _PIECE:
                connection.transport.write(b"".join(pending))
                pending, size = [], 0
        if pending:
            connection.transport.write(b"".join(pending))

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
                    f"unroutable, the broker returned it: {said(error)} (exchange {exchange!r}, "
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
