"""VirtualPublisher: Redis and kombu's embedded transports."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from kombu import Connection

from celery_outbox.envelope import Envelope
from celery_outbox.relay.outcome import Confirmed, Outcome, Refused, Stalled, Undecided, Unknown
from celery_outbox.relay.publishers.base import Meanwhile, Publisher, nothing, said

__all__ = ["VirtualPublisher"]

#: Where an error in Redis's own words begins: redis-py takes the code away where it has a class.
_REPLY = r"^(ResponseError: )?(Command .* caused error: )?"
#: Redis takes nothing, from nobody: it is full, lacks its replicas or its disk, or is a replica.
_OF_THE_BROKER = re.compile(
    _REPLY + r"(OutOfMemoryError|ReadOnlyError|MasterDownError|ClusterDownError"
    r"|OOM|READONLY|MASTERDOWN|CLUSTERDOWN|NOREPLICAS|MISCONF|BUSY)\b",
    re.DOTALL,
)
#: It takes nothing for this key.
_OF_THE_DESTINATION = re.compile(_REPLY + r"(NoPermissionError|NOPERM|WRONGTYPE)\b", re.DOTALL)


class VirtualPublisher(Publisher):
    """Redis and kombu's embedded transports: a publish that returns was written.

    That is the strongest answer that they give. There is no mandatory flag, so whether an exchange
    leads anywhere is looked up before.

    What Redis says of its own state is no message's fault: the batch is given up, and the connection,
    for the next one may lead to another Redis.

    A message that a broker can't take (too large for Redis) may make it end the connection, as if it
    went away. What lost the connection is passed over the next time; if others go through, it is to
    blame.
    """

    def __init__(self, connect: Callable[[], Connection], confirm_timeout: float) -> None:
        super().__init__(connect, confirm_timeout)
        #: The messages with which the connection was lost.
        self._suspects: set[int] = set()

    def publish(
        self, batch: Sequence[tuple[int, Envelope]], meanwhile: Meanwhile = nothing
    ) -> dict[int, Outcome]:
        outcomes: dict[int, Outcome] = {}
        passed_over: dict[int, str] = {}
        for number, envelope in batch:
            if not meanwhile():
                outcomes[number] = Unknown()
                continue
            try:
                self.open()
                outcome = self._publish_one(envelope)
            except Exception as exc:
                self.close()
                return self._give_up(batch, outcomes, said(exc))
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
            self._declare(channel, envelope)
            if envelope.mandatory and not self._leads_anywhere(channel, envelope):
                return Refused(f"unroutable: no queue is bound for {envelope.destination!r}")
            channel.basic_publish(
                self._message(channel, envelope),
                exchange=envelope.exchange,
                routing_key=envelope.routing_key,
            )
        except away as exc:
            return Undecided(said(exc))
        except Exception as exc:
            error = said(exc)
            if _OF_THE_BROKER.match(error):
                raise
            return Stalled(error) if _OF_THE_DESTINATION.match(error) else Refused(error)
        return Confirmed()

    @staticmethod
    def _leads_anywhere(channel: Any, envelope: Envelope) -> bool:
        if not envelope.exchange:
            return True
        try:
            return bool(channel._lookup(envelope.exchange, envelope.routing_key))
        except LookupError:
            return False
