"""ServiceBusPublisher: Azure Service Bus, by its SDK."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from azure.servicebus import ServiceBusMessage, ServiceBusSender
from azure.servicebus.exceptions import OperationTimeoutError
from kombu import Connection

from celery_outbox.envelope import Envelope
from celery_outbox.relay.outcome import (
    Confirmed,
    Outcome,
    Refused,
    Stalled,
    Undecided,
    Unknown,
)
from celery_outbox.relay.publishers.base import Meanwhile, Publisher, nothing, said
from celery_outbox.servicebus.errors import Concern, verdict_on
from celery_outbox.servicebus.messages import Routing, body_of, message_id
from celery_outbox.servicebus.sending import Dispatch, Lane, Sendable

__all__ = ["ServiceBusPublisher"]

#: The service ends links that were idle for ten minutes, and connections after five.
_IDLE = 240.0
#: After so many losses of a queue's connection in a row, a message is suspected to be the reason.
_SUSPICIOUS = 2
#: So many abandoned threads may hang; then no new ones are started until one has ended.
_MOST_HANGING = 8
#: How often the caller may do something else while the broker works, in seconds.
_LOOK = 0.2
#: How long the lanes may take to end when the connection is dropped.
_GOODBYE = 2.0


class ServiceBusPublisher(Publisher):
    """Azure Service Bus: batches through the SDK, as kombu's transport would write the messages.

    A message is confirmed when the service has settled its batch. What is in doubt is undecided, and
    goes out again under the same message id, by which a queue with duplicate detection drops it; one
    without has it twice, for the inbox to absorb. The SDK repeats nothing by itself.

    Each queue has a connection and a thread; who does not answer in time is abandoned. Nothing is
    declared at the broker, so that the right to send is enough. A missing queue, a wrong key or a
    missing right are no fault of the messages, which wait.
    """

    def __init__(self, connect: Callable[[], Connection], confirm_timeout: float) -> None:
        super().__init__(connect, confirm_timeout)
        self._lanes: dict[str, Lane] = {}
        self._hanging: list[Lane] = []
        #: Queue → how often in a row its connection was lost with messages under way.
        self._losses: dict[str, int] = {}
        #: Through which queue the broker was last seen to be away.
        self._away: str | None = None
        #: Until when a namespace that throttles is left alone.
        self._peace = 0.0

    def open(self) -> None:
        """Connect if need be; to a broker that was away, really. Raises while it is away, or busy."""
        self._ensure_connection()
        if (left := self._peace - time.monotonic()) > 0:
            raise ConnectionRefusedError(f"the namespace is throttled; again in {left:.1f} s")
        if self._away is not None:
            self._knock(self._away)
            self._away = None

    def _knock(self, queue: str) -> None:
        """Connect to a queue; raise if the broker, not the queue, is why that fails."""
        dispatch = Dispatch(queue, time.monotonic() + self._confirm_timeout)
        self._exchange([dispatch])
        self._remember([dispatch])
        failure = dispatch.failure
        if failure is not None and verdict_on(failure).concern is Concern.BROKER:
            raise failure

    def _ensure_connection(self) -> None:
        if self._connection is None:
            # Nothing to reach yet: it reads the URL, and makes the credential.
            connection = self._connect()
            options = {**connection.transport_options, "retry_total": 0}
            connection.transport_options = options
            self._connection = connection

    def _open_channel(self) -> Any:
        if self._channel is None:
            self._channel = super()._open_channel()
            self._routing = Routing(self._channel)
        return self._channel

    def publish(
        self, batch: Sequence[tuple[int, Envelope]], meanwhile: Meanwhile = nothing
    ) -> dict[int, Outcome]:
        outcomes: dict[int, Outcome] = {}
        try:
            dispatches = self._sort(batch, outcomes)
            self._exchange(dispatches, meanwhile)
        except Exception as exc:
            self.close()
            return {number: Undecided(said(exc)) for number, _ in batch} | outcomes
        self._remember(dispatches)
        answered = {dispatch.queue for dispatch in dispatches if dispatch.answered}
        for dispatch in dispatches:
            alone = not answered - {dispatch.queue}
            for number, outcome in _outcomes(dispatch, alone=alone):
                outcomes[number] = _worse(outcomes.get(number), outcome)
        return outcomes

    def _sort(
        self, batch: Sequence[tuple[int, Envelope]], outcomes: dict[int, Outcome]
    ) -> list[Dispatch]:
        """Return what is to be sent, queue by queue; refuse what can't be."""
        channel = self._open_channel()
        deadline = time.monotonic() + self._confirm_timeout
        dispatches: dict[str, Dispatch] = {}
        for number, envelope in batch:
            try:
                queues = self._routing.queues(envelope)
                body = body_of(channel, self._message(channel, envelope), envelope)
                found = message_id(number, envelope)
                message = ServiceBusMessage(body, message_id=found)
            except Exception as exc:
                outcomes[number] = Refused(said(exc))
                continue
            for queue in queues:
                dispatch = dispatches.get(queue)
                if dispatch is None:
                    singly = self._losses.get(queue, 0) >= _SUSPICIOUS
                    dispatch = dispatches[queue] = Dispatch(queue, deadline, singly)
                dispatch.messages.append(Sendable(number, message, len(body.encode())))
        return list(dispatches.values())

    def _exchange(self, dispatches: Sequence[Dispatch], meanwhile: Meanwhile = nothing) -> None:
        """Send all, each queue in its thread, and wait for the answers until the deadline."""
        for dispatch in dispatches:
            self._lane(dispatch.queue).take(dispatch)
        self._attend(dispatches, meanwhile)
        for dispatch in dispatches:
            while (left := dispatch.share_of_time(_LOOK)) and not dispatch.done.wait(left):
                self._attend(dispatches, meanwhile)
            if not dispatch.done.is_set():
                lane = self._lanes.pop(dispatch.queue)
                lane.abandon()
                self._hanging.append(lane)
                dispatch.failure = OperationTimeoutError(
                    message=f"the broker did not answer within {self._confirm_timeout:g} s"
                )
            elif dispatch.failure is not None:
                # Its lane has ended by itself.
                del self._lanes[dispatch.queue]

    @staticmethod
    def _attend(dispatches: Sequence[Dispatch], meanwhile: Meanwhile) -> None:
        """Let the caller do something else, and heed what it says."""
        if not meanwhile():
            for dispatch in dispatches:
                dispatch.go_on = False

    def _lane(self, queue: str) -> Lane:
        self._close_idle_lanes()
        lane = self._lanes.get(queue)
        if lane is None:
            self._hanging = [each for each in self._hanging if each.is_alive]
            if len(self._hanging) >= _MOST_HANGING:
                raise TimeoutError(
                    f"{len(self._hanging)} connections hang; no new one until one of them ends"
                )
            channel = self._open_channel()

            def make() -> ServiceBusSender:
                sender: ServiceBusSender = channel.queue_service.get_queue_sender(
                    queue, keep_alive=channel.uamqp_keep_alive_interval
                )
                return sender

            lane = self._lanes[queue] = Lane(queue, make)
        return lane

    def _close_idle_lanes(self) -> None:
        oldest = time.monotonic() - _IDLE
        for queue in [name for name, lane in self._lanes.items() if lane.used_at < oldest]:
            self._lanes.pop(queue).close()

    def _remember(self, dispatches: Sequence[Dispatch]) -> None:
        """Draw the conclusions for the next time."""
        for dispatch in dispatches:
            failure = dispatch.failure
            if failure is None:
                self._losses.pop(dispatch.queue, None)
                continue
            verdict = verdict_on(failure)
            if verdict.peace:
                self._peace = time.monotonic() + verdict.peace
            # Silence says nothing about a message, an end of the connection may.
            silent = isinstance(failure, OperationTimeoutError)
            if verdict.in_doubt and dispatch.under_way and not silent:
                self._losses[dispatch.queue] = self._losses.get(dispatch.queue, 0) + 1
            if verdict.concern is Concern.BROKER and not dispatch.answered:
                self._away = dispatch.queue
        if any(dispatch.answered for dispatch in dispatches):
            self._away = None

    def close(self) -> None:
        """Drop the connections. Safe when there is none, or a broken one."""
        lanes, self._lanes = list(self._lanes.values()), {}
        for lane in lanes:
            lane.close()
        deadline = time.monotonic() + _GOODBYE
        for lane in lanes:
            lane.join(max(0.0, deadline - time.monotonic()))
        super().close()


def _outcomes(dispatch: Dispatch, *, alone: bool) -> list[tuple[int, Outcome]]:
    """Return what became of each message; `alone`: no queue but this one has answered."""
    # A lane that was abandoned may still write.
    confirmed, refused = set(dispatch.confirmed), dict(dispatch.refused)
    failure = dispatch.failure
    found: list[tuple[int, Outcome]] = []
    for each in dispatch.messages:
        if each.number in confirmed:
            found.append((each.number, Confirmed()))
        elif (error := refused.get(each.number)) is not None:
            found.append((each.number, Refused(error)))
        elif failure is None:
            found.append((each.number, Unknown()))
        else:
            found.append((each.number, _failed(dispatch.queue, failure, alone=alone)))
    return found


def _failed(queue: str, failure: Exception, *, alone: bool) -> Outcome:
    error = f"queue {queue}: {said(failure)}"
    verdict = verdict_on(failure)
    if verdict.concern is Concern.QUEUE or not (alone or verdict.peace):
        return Stalled(error)
    return Undecided(error)


def _worse(one: Outcome | None, other: Outcome) -> Outcome:
    """Return what is to be said of a message that goes to several queues."""
    ranks: tuple[type, ...] = (Confirmed, Refused, Stalled, Unknown, Undecided)
    if one is None:
        return other
    return max(one, other, key=lambda outcome: ranks.index(type(outcome)))
