"""Outcome: what a broker made of one message, and the rules that say whose fault it was."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

__all__ = [
    "Confirmed",
    "Fault",
    "Outcome",
    "Refused",
    "Stalled",
    "Undecided",
    "UnderWay",
    "Unknown",
    "fault_of",
]


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The broker has taken responsibility."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The broker does not take this message: an attempt that counts, and the last one is its end."""

    error: str


@dataclass(frozen=True, slots=True)
class Stalled:
    """Its destination takes nothing now: a full queue, no right to write. No fault of the message."""

    error: str
    #: Whether it was tried, or its destination is left alone for what it did before.
    tried: bool = True


@dataclass(frozen=True, slots=True)
class Undecided:
    """The broker went away, or was silent, before it said anything. No fault of the message."""

    error: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """Not sent, or not known to be, and neither the message nor the broker is at fault."""


@dataclass(frozen=True, slots=True)
class UnderWay:
    """Sent, and not answered yet, where others were: `Publisher.late` will tell what became of it."""


Outcome: TypeAlias = Confirmed | Refused | Stalled | Undecided | Unknown | UnderWay


class Fault(Enum):
    """Whom an error speaks of."""

    MESSAGE = "message"
    DESTINATION = "destination"
    BROKER = "broker"


#: The reply codes of AMQP 0-9-1 (specification, 1.7 "Constants"; RabbitMQ's "Channel and connection
#: exceptions") with which a channel or a connection ends, or a message comes back.
_FAULTS = {
    311: Fault.MESSAGE,  # content-too-large
    312: Fault.MESSAGE,  # no-route: it came back
    313: Fault.MESSAGE,  # no-consumers: it came back
    320: Fault.BROKER,  # connection-forced: a shutdown, an operator
    402: Fault.BROKER,  # invalid-path: the virtual host
    403: Fault.DESTINATION,  # access-refused: a right that an operator can give
    404: Fault.MESSAGE,  # not-found: its exchange
    405: Fault.DESTINATION,  # resource-locked: an exclusive queue of another connection
    406: Fault.MESSAGE,  # precondition-failed: its declaration, its expiration or its size
    501: Fault.MESSAGE,  # frame-error
    502: Fault.MESSAGE,  # syntax-error
    503: Fault.MESSAGE,  # command-invalid
    504: Fault.BROKER,  # channel-error
    505: Fault.MESSAGE,  # unexpected-frame
    506: Fault.BROKER,  # resource-error
    530: Fault.BROKER,  # not-allowed: the virtual host
    540: Fault.MESSAGE,  # not-implemented
    541: Fault.BROKER,  # internal-error
}


def fault_of(reply_code: int | None) -> Fault:
    """Return whose fault an AMQP error is; a code that nobody knows is no message's."""
    return _FAULTS.get(reply_code or 0, Fault.BROKER)
