"""ConfirmingPublisher: RabbitMQ, by py-amqp."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from amqp.exceptions import FrameSyntaxError, RecoverableConnectionError
from kombu import Connection
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp

from celery_outbox.envelope import Envelope
from celery_outbox.relay.outcome import Outcome, Refused, Undecided, UnderWay, Unknown
from celery_outbox.relay.publishers.base import Meanwhile, Publisher, nothing, said
from celery_outbox.relay.publishers.confirms import Confirms, verdict
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
#: How long the broker may be silent about some messages after it has answered for others.
_PATIENCE_SECONDS = 1.0
#: How many bytes are written at a time.
_PIECE = 16 * 1024

_Batch = Sequence[tuple[int, Envelope]]


class ConfirmingPublisher(Publisher):
    """RabbitMQ: publisher confirms, all of a batch in flight at once.

    After any error of the channel the channel is thrown away, for a late ack would be taken for
    another message's; the broker does not say which message it closed the channel for, so what is
    left goes one by one.

    A queue that confirms late, or never, must not hold up the others: what the broker is silent about
    when it has answered for the rest stays under way, and `late` tells of it.

    A broker that is short of memory or disk takes connections, and then reads nothing from those that
    publish; what was written to them arrives when it has recovered. So after a silence it must first
    confirm a probe, and until it does no batch is written to it again.
    """

    def __init__(self, connect: Callable[[], Connection], confirm_timeout: float) -> None:
        super().__init__(connect, confirm_timeout)
        self._confirms: Confirms | None = None
        #: The numbers of the messages that were left under way, and what became of some.
        self._under_way: set[int] = set()
        self._late: dict[int, Outcome] = {}
        #: How often in a row the connection was lost in the middle of a batch.
        self._losses = 0
        #: Whether the broker let the confirm timeout pass, and has not answered since.
        self._silent = False
        self._may_probe = True
        #: The channel on which a probe is under way, and until when.
        self._probed: Any = None
        self._probe_ends = 0.0

    def open(self) -> None:
        """Connect if need be. Raises what the transport raises when the broker is away, or silent."""
        self._ensure_connection()
        if self._silent:
            self._await_probe()

    def publish(self, batch: _Batch, meanwhile: Meanwhile = nothing) -> dict[int, Outcome]:
        outcomes: dict[int, Outcome] = {}
        try:
            self._confirming_channel()
        except _AWAY as exc:
            self._give_up(batch, outcomes, exc)
            return outcomes
        if self._losses >= _SUSPICIOUS:
            self._one_by_one(batch, outcomes, meanwhile)
            return outcomes
        try:
            self._exchange_with(batch, outcomes, meanwhile)
            self._losses = 0
        except _CLOSED as exc:
            self._drop_channel()
            if len(left := [entry for entry in batch if entry[0] not in outcomes]) == 1:
                outcomes[left[0][0]] = verdict(exc)
            else:
                self._one_by_one(left, outcomes, meanwhile)
        except _AWAY as exc:
            self._count_loss(exc)
            self._give_up(batch, outcomes, exc)
        return outcomes

    def late(self) -> dict[int, Outcome]:
        if self._under_way and self._channel is not None:
            try:
                with suppress(TimeoutError):
                    while self._under_way & self._confirms_of(self._channel).open:
                        self._channel.connection.drain_events(timeout=0.001)
            except _CLOSED:
                self._drop_channel()
            except _AWAY as exc:
                self._lose(said(exc))
            else:
                self._confirms_of(self._channel).expire(self._confirm_timeout)
                self._take_late(self._confirms_of(self._channel))
        late, self._late = self._late, {}
        return late

    def _one_by_one(
        self, batch: _Batch, outcomes: dict[int, Outcome], meanwhile: Meanwhile
    ) -> None:
        """Find out for which message the broker closes the channel, or the connection."""
        for entry in batch:
            if not meanwhile():
                outcomes[entry[0]] = Unknown()
                continue
            try:
                self._confirming_channel()
            except _AWAY as exc:
                self._give_up(batch, outcomes, exc)
                return
            try:
                self._exchange_with([entry], outcomes, meanwhile)
            except _CLOSED as exc:
                self._drop_channel()
                outcomes[entry[0]] = verdict(exc)
            except _AWAY as exc:
                if self._losses < _SUSPICIOUS or isinstance(exc, TimeoutError):
                    self._count_loss(exc)
                    self._give_up(batch, outcomes, exc)
                    return
                self._lose(said(exc))
                outcomes[entry[0]] = Refused(f"the broker ended the connection for it: {said(exc)}")
        self._losses = 0

    def _exchange_with(
        self, batch: _Batch, outcomes: dict[int, Outcome], meanwhile: Meanwhile
    ) -> None:
        """Publish all, then wait until the broker has answered for all, or is silent about some.

        What it has answered stands in `outcomes`, also when this raises.
        """
        channel = self._confirming_channel()
        confirms = self._confirms_of(channel)
        numbers = [number for number, _ in batch]
        try:
            self._write(channel, batch, confirms)
            meanwhile()
            self._await(channel, confirms, set(numbers), meanwhile)
        finally:
            for number in numbers:
                if (outcome := confirms.take(number)) is not None:
                    outcomes[number] = outcome
        for number in numbers:
            if number not in outcomes:
                outcomes[number] = UnderWay()
                self._under_way.add(number)

    def _write(self, channel: Any, batch: _Batch, confirms: Confirms) -> None:
        """Write the whole batch, in a few pieces."""
        connection = channel.connection
        if connection is None or connection.transport is None:
            raise RecoverableConnectionError("the connection was closed")
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
            confirms.sent(number, envelope)
            pending.append(data)
            size += len(data)
            if size >= _PIECE:
                connection.transport.write(b"".join(pending))
                pending, size = [], 0
        if pending:
            connection.transport.write(b"".join(pending))

    def _await(
        self, channel: Any, confirms: Confirms, numbers: set[int], meanwhile: Meanwhile
    ) -> None:
        """Wait until the broker has answered for all, or for some and for no other for a while."""
        written_at = time.monotonic()
        has_asked = False
        while not numbers.isdisjoint(confirms.open):
            now = time.monotonic()
            if confirms.answered_at > written_at:
                # It lives, and may take its time with the rest.
                ends = confirms.answered_at + _PATIENCE_SECONDS
                if now >= ends:
                    return
            else:
                ends = written_at + self._confirm_timeout
                if now >= ends:
                    left = len(numbers & confirms.open)
                    raise TimeoutError(f"{left} messages were not confirmed in time")
                if not has_asked and self._may_probe and now >= written_at + _PATIENCE_SECONDS:
                    # Is it the broker that is silent, or the one queue that all of these are for?
                    has_asked = True
                    self._send_probe(channel)
            try:
                with suppress(TimeoutError):
                    channel.connection.drain_events(timeout=min(ends - now, _LISTEN_SECONDS))
            except _CLOSED:
                # For the probe, perhaps: who may not publish it must not lose each batch to it.
                self._may_probe = not has_asked
                raise
            meanwhile()

    def _take_late(self, confirms: Confirms) -> None:
        for number in tuple(self._under_way):
            if (outcome := confirms.take(number)) is not None:
                self._under_way.discard(number)
                self._late[number] = outcome

    # The connection

    def _confirming_channel(self) -> Any:
        if self._channel is None:
            channel = self._open_channel()
            channel.confirm_select()
            self._confirms = Confirms(channel)
        return self._channel

    def _confirms_of(self, channel: Any) -> Confirms:
        assert channel is not None
        assert self._confirms is not None
        return self._confirms

    def close(self) -> None:
        """Drop the connection. Safe when there is none, or a broken one."""
        self._forget_channel(Undecided("the connection was closed"))
        super().close()

    def _lose(self, error: str) -> None:
        """Drop the connection, which broke: so it is not known what became of what is under way."""
        self._forget_channel(Undecided(error))
        super().close()

    def _drop_channel(self) -> None:
        """Drop the channel, which the broker has closed for some message."""
        self._channel = None
        self._forget_declarations()
        self._forget_channel(Unknown())

    def _forget_channel(self, outcome: Outcome) -> None:
        confirms, self._confirms, self._probed = self._confirms, None, None
        if confirms is not None:
            self._take_late(confirms)
        self._late |= dict.fromkeys(self._under_way, outcome)
        self._under_way.clear()

    def _give_up(self, batch: _Batch, outcomes: dict[int, Outcome], error: BaseException) -> None:
        self._lose(said(error))
        for number, _ in batch:
            outcomes.setdefault(number, Undecided(said(error)))

    def _count_loss(self, error: BaseException) -> None:
        # Silence says nothing about a message, an end of the connection may.
        self._silent = isinstance(error, TimeoutError)
        self._losses += not self._silent

    # The probe

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
        self._send_probe(channel)
        self._probed = channel
        self._probe_ends = time.monotonic() + _PROBE_SECONDS

    def _send_probe(self, channel: Any) -> None:
        """Publish what the broker confirms at once, for it leads nowhere."""
        self._confirms_of(channel).skip_tag()
        channel._basic_publish(channel.prepare_message(b"probe"), routing_key=_PROBE)

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


def _is_our_own(error: Exception) -> bool:
    """Whether py-amqp raised this by itself, where the broker's errors name the method at fault."""
    return isinstance(error, FrameSyntaxError) and error.method_sig is None
