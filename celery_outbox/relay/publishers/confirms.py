"""Confirms: the delivery tags of a channel, and what the broker answered for them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from celery_outbox.envelope import Envelope
from celery_outbox.relay.outcome import (
    Confirmed,
    Fault,
    Outcome,
    Refused,
    Stalled,
    fault_of,
)
from celery_outbox.relay.publishers.base import said

__all__ = ["Confirms", "verdict"]


@dataclass(frozen=True, slots=True)
class _Sent:
    number: int
    envelope: Envelope
    at: float


class Confirms:
    """What was sent on one channel, and what came of it.

    Each message has its delivery tag; an ack or nack settles its tag, or with ``multiple`` all lower
    ones. A message that came back (``mandatory``) is acked after it was returned.
    """

    def __init__(self, channel: Any) -> None:
        self._tag = 0
        self._pending: dict[int, _Sent] = {}
        #: What the broker has answered, by the caller's number; whoever reads it takes it out.
        self.outcomes: dict[int, Outcome] = {}
        #: The numbers of which nothing is known yet.
        self.open: set[int] = set()
        #: When the broker last answered.
        self.answered_at = 0.0
        channel.events["basic_ack"].add(self._acked)
        channel.events["basic_nack"].add(self._nacked)
        channel.events["basic_return"].add(self._returned)

    def sent(self, number: int, envelope: Envelope) -> None:
        """A message is about to be written: it has the next tag."""
        self._tag += 1
        self._pending[self._tag] = _Sent(number, envelope, time.monotonic())
        self.open.add(number)

    def skip_tag(self) -> None:
        """A message that nobody waits for is about to be written."""
        self._tag += 1

    def take(self, number: int) -> Outcome | None:
        """Return, once, what was answered for a message; None: nothing yet."""
        return None if number in self.open else self.outcomes.pop(number, None)

    def expire(self, seconds: float) -> None:
        """Give up the messages that were sent `seconds` ago; what is answered for them is ignored."""
        old = time.monotonic() - seconds
        for tag in [tag for tag, sent in self._pending.items() if sent.at <= old]:
            sent = self._pending.pop(tag)
            self._answer(sent.number, Stalled(f"it was not confirmed within {seconds:g} s"))

    def _acked(self, tag: int, multiple: bool) -> None:
        for sent in self._settled(tag, multiple):
            # A returned message has its outcome already.
            self._answer(sent.number, self.outcomes.get(sent.number, Confirmed()))

    def _nacked(self, tag: int, multiple: bool) -> None:
        for sent in self._settled(tag, multiple):
            self._answer(sent.number, Stalled("the broker refused it (nack: is the queue full?)"))

    def _returned(self, error: Any, exchange: str, routing_key: str, message: Any) -> None:
        # It names no tag. Messages of one address and one id share their fate, so the first will do.
        correlation_id = message.properties.get("correlation_id")
        for sent in self._pending.values():
            if (
                sent.number not in self.outcomes
                and sent.envelope.exchange == exchange
                and sent.envelope.routing_key == routing_key
                and sent.envelope.properties.get("correlation_id") == correlation_id
            ):
                self.outcomes[sent.number] = Refused(
                    f"unroutable, the broker returned it: {said(error)} (exchange {exchange!r}, "
                    f"routing key {routing_key!r})"
                )
                return

    def _answer(self, number: int, outcome: Outcome) -> None:
        self.outcomes[number] = outcome
        self.open.discard(number)

    def _settled(self, tag: int, multiple: bool) -> list[_Sent]:
        self.answered_at = time.monotonic()
        if multiple:
            # In the order of the tags: all lower ones come first.
            tags = []
            for known in self._pending:
                if known > tag:
                    break
                tags.append(known)
        else:
            tags = [tag] if tag in self._pending else []
        return [self._pending.pop(known) for known in tags]


def verdict(error: Any) -> Outcome:
    """What an error that ends a channel, or a connection, says of the one message that caused it."""
    if fault_of(getattr(error, "reply_code", None)) is Fault.DESTINATION:
        return Stalled(said(error))
    return Refused(said(error))
