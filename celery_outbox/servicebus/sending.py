"""Sending: one queue's sender of the SDK, in a thread of its own, and what it was told to send."""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Thread

from azure.servicebus import ServiceBusMessage, ServiceBusMessageBatch, ServiceBusSender
from azure.servicebus.exceptions import MessageSizeExceededError, OperationTimeoutError

from celery_outbox.servicebus.errors import Concern, verdict_on

__all__ = ["Dispatch", "Lane", "Sendable"]

logger = logging.getLogger("celery_outbox.relay")

#: What the SDK does not count of a batch: the id that it copies to the envelope.
_UNCOUNTED = 1024
#: The service takes 4,500 messages in a batch.
_MOST = 4000


@dataclass(frozen=True, slots=True)
class Sendable:
    """A message ready to send, with the caller's number."""

    number: int
    message: ServiceBusMessage
    #: The bytes of its body.
    size: int


@dataclass(slots=True)
class Dispatch:
    """Messages for one queue, and what is known of them. The lane writes, its owner reads."""

    queue: str
    deadline: float
    #: Send each by itself, to find the one for which the broker ends the connection.
    singly: bool = False
    messages: list[Sendable] = field(default_factory=list)
    confirmed: set[int] = field(default_factory=set)
    refused: dict[int, str] = field(default_factory=dict)
    #: Why the others were not sent, or are in doubt.
    failure: Exception | None = None
    #: Whether the queue has taken or refused anything, or let us in.
    answered: bool = False
    #: Whether anything was written that it may have stored.
    under_way: bool = False
    #: Its owner's word that no more is to be sent.
    go_on: bool = True
    done: Event = field(default_factory=Event)

    def share_of_time(self, most: float) -> float:
        """Return how long to wait for an answer now: until the deadline, and not longer than `most`."""
        return max(0.0, min(most, self.deadline - time.monotonic()))

    @property
    def seconds_left(self) -> float:
        """How long an answer may take; raises rather than be nothing, which the SDK can't wait."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise OperationTimeoutError(message="there was no time left to send it")
        return left


class Lane:
    """The way to one queue.

    The SDK's senders are not safe for threads, and can hang for ever while they connect. So each has
    a thread, and who waits for it waits until a deadline; then it is abandoned, and its connection
    cut, which ends the thread sooner or later.
    """

    def __init__(self, queue: str, make: Callable[[], ServiceBusSender]) -> None:
        self.queue = queue
        self.used_at = time.monotonic()
        self._make = make
        self._sender = make()
        self._orders: SimpleQueue[Dispatch | None] = SimpleQueue()
        self._opened = self._abandoned = False
        self._thread = Thread(target=self._run, name=f"servicebus {queue}", daemon=True)
        self._thread.start()

    def take(self, dispatch: Dispatch) -> None:
        """Send in the background; the dispatch says when it is done. An empty one only connects."""
        self.used_at = time.monotonic()
        self._orders.put(dispatch)

    def close(self) -> None:
        """End when what was taken is done."""
        self._orders.put(None)

    def abandon(self) -> None:
        """End at once, in the middle of whatever it hangs in."""
        self._abandoned = True
        self._orders.put(None)
        for found in _sockets_of(self._sender, self._thread):
            with suppress(OSError, ValueError):
                found.shutdown(socket.SHUT_RDWR)

    @property
    def is_alive(self) -> bool:
        """Whether the thread has not ended yet."""
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        """Wait for the end."""
        self._thread.join(seconds)

    # In the thread

    def _run(self) -> None:
        while not self._abandoned and (dispatch := self._orders.get()) is not None:
            try:
                self._open(dispatch)
                if dispatch.singly:
                    self._send_singly(dispatch)
                else:
                    self._send(dispatch)
            except Exception as exc:
                dispatch.failure = exc
            finally:
                dispatch.done.set()
            if dispatch.failure is not None:
                break
        self._close_sender()

    def _open(self, dispatch: Dispatch) -> None:
        if not self._opened:
            # Connects, for it has to know what the link takes.
            self._sender.create_message_batch()
            self._opened = dispatch.answered = True

    def _send(self, dispatch: Dispatch) -> None:
        rest: Sequence[Sendable] = dispatch.messages
        while rest and dispatch.go_on:
            batch, rest, content = self._fill(rest)
            try:
                self._send_one(dispatch, batch, content)
            except Exception as exc:
                if verdict_on(exc).concern is not Concern.MESSAGE:
                    raise
                # One of them spoils the batch, which is refused as a whole.
                for each in batch:
                    if dispatch.go_on:
                        self._send_or_refuse(dispatch, each)

    def _fill(
        self, messages: Sequence[Sendable]
    ) -> tuple[Sequence[Sendable], Sequence[Sendable], ServiceBusMessageBatch | ServiceBusMessage]:
        """Return as many as go in one batch, one at least, then the rest, and what to send."""
        room = self._sender.create_message_batch().max_size_in_bytes - _UNCOUNTED
        batch = self._sender.create_message_batch(room)
        for count, each in enumerate(messages[:_MOST]):
            try:
                batch.add_message(each.message)
            except MessageSizeExceededError:
                if not count:
                    # A link may take a larger message than a batch.
                    return messages[:1], messages[1:], each.message
                return messages[:count], messages[count:], batch
        return messages[:_MOST], messages[_MOST:], batch

    def _send_one(
        self,
        dispatch: Dispatch,
        messages: Sequence[Sendable],
        content: ServiceBusMessageBatch | ServiceBusMessage,
    ) -> None:
        """Send messages in one delivery, and wait for the answer."""
        for each in messages:
            self._check_size(each)
        seconds = dispatch.seconds_left
        dispatch.under_way = True
        self._sender.send_messages(content, timeout=seconds)
        dispatch.answered = True
        dispatch.confirmed.update(each.number for each in messages)

    def _check_size(self, each: Sendable) -> None:
        # A service that ends the link for it would look as if it went away.
        limit = self._sender._max_message_size_on_link
        if each.size > limit:
            raise MessageSizeExceededError(
                message=f"its body has {each.size} bytes, and the queue takes {limit} in all"
            )

    def _send_or_refuse(self, dispatch: Dispatch, each: Sendable) -> None:
        """Send one message; a failure that is not its own is raised."""
        try:
            self._send_one(dispatch, [each], each.message)
        except Exception as exc:
            if verdict_on(exc).concern is not Concern.MESSAGE:
                raise
            dispatch.answered = True
            dispatch.refused[each.number] = _said(exc)

    def _send_singly(self, dispatch: Dispatch) -> None:
        """Send one by one; what lost the connection is to blame if others go through after it."""
        suspects: dict[int, Exception] = {}
        for each in dispatch.messages:
            if not dispatch.go_on:
                break
            try:
                self._send_or_refuse(dispatch, each)
            except Exception as exc:
                if not verdict_on(exc).in_doubt or isinstance(exc, OperationTimeoutError):
                    raise
                suspects[each.number] = exc
                self._close_sender()
                self._sender, self._opened = self._make(), False
                self._open(dispatch)
                continue
            for number, error in suspects.items():
                dispatch.refused[number] = f"the broker ended the connection for it: {_said(error)}"
            suspects.clear()
        for error in suspects.values():
            raise error

    def _close_sender(self) -> None:
        try:
            self._sender.close()
        except Exception as exc:
            logger.debug("closing a sender of %s: %s", self.queue, exc)


def _sockets_of(sender: ServiceBusSender, thread: Thread) -> Iterator[socket.socket]:
    """Find the sockets under a sender, and those that its thread has in hand.

    During TLS's handshake, which has no time limit, no object but the stack holds the socket.
    """
    found: object = sender
    for name in ("_handler", "_connection", "_transport", "sock"):
        found = getattr(found, name, None)
    if isinstance(found, socket.socket):
        yield found
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        yield from (each for each in frame.f_locals.values() if isinstance(each, socket.socket))
        frame = frame.f_back


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]
