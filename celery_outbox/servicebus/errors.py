"""Verdict: what an error of the SDK says about a message, its queue or the namespace."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from azure.core.exceptions import ClientAuthenticationError
from azure.servicebus.exceptions import (
    MessageSizeExceededError,
    MessagingEntityDisabledError,
    MessagingEntityNotFoundError,
    OperationTimeoutError,
    ServiceBusAuthenticationError,
    ServiceBusAuthorizationError,
    ServiceBusCommunicationError,
    ServiceBusConnectionError,
    ServiceBusError,
    ServiceBusQuotaExceededError,
    ServiceBusServerBusyError,
)

__all__ = ["Concern", "Verdict", "verdict_on"]

#: Microsoft asks for so many seconds of peace when it throttles a namespace.
_PEACE: Final = 2.0

#: Conditions with which the service speaks of what it was sent.
_OF_THE_MESSAGE = frozenset(
    {
        "amqp:decode-error",
        "amqp:invalid-field",
        "amqp:link:message-size-exceeded",
        "amqp:not-allowed",
        "amqp:precondition-failed",
        "com.microsoft:argument-error",
        "com.microsoft:argument-out-of-range",
    }
)


class Concern(Enum):
    """Whom an error speaks of."""

    #: The message; or, of a batch, one of its messages.
    MESSAGE = "message"
    #: The queue: it is missing, disabled or full, or may not be written to. No message's fault.
    QUEUE = "queue"
    #: The namespace, or the way to it.
    BROKER = "broker"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an error means."""

    concern: Concern
    #: Whether the broker may have stored the message all the same.
    in_doubt: bool = False
    #: For how many seconds the namespace asks to be left alone.
    peace: float = 0.0


_MESSAGE = Verdict(Concern.MESSAGE)
_QUEUE = Verdict(Concern.QUEUE)
_BROKER = Verdict(Concern.BROKER)
_DOUBT = Verdict(Concern.BROKER, in_doubt=True)

#: The SDK's classes; a subclass stands before its base.
_VERDICTS: tuple[tuple[type[Exception], Verdict], ...] = (
    (MessageSizeExceededError, _MESSAGE),
    (MessagingEntityNotFoundError, _QUEUE),
    (MessagingEntityDisabledError, _QUEUE),
    (ServiceBusAuthorizationError, _QUEUE),
    (ServiceBusQuotaExceededError, _QUEUE),
    (ServiceBusAuthenticationError, _BROKER),
    (ClientAuthenticationError, _BROKER),
    (ServiceBusServerBusyError, Verdict(Concern.BROKER, peace=_PEACE)),
    (OperationTimeoutError, _DOUBT),
    # Also a link that the service detached while a message was under way, whatever for.
    (ServiceBusConnectionError, _DOUBT),
    (ServiceBusCommunicationError, _DOUBT),
)


def verdict_on(error: BaseException) -> Verdict:
    """Return what an error of the SDK means.

    Its own idea of what can be tried again is no guide: it says no to a full queue, and yes to a wrong
    key. What nobody knows is in doubt.
    """
    for kind, verdict in _VERDICTS:
        if isinstance(error, kind):
            return verdict
    condition = getattr(error, "_condition", None)
    if isinstance(error, ServiceBusError) and _name(condition) in _OF_THE_MESSAGE:
        return _MESSAGE
    return _DOUBT


def _name(condition: object) -> str:
    value = getattr(condition, "value", condition)
    return value.decode() if isinstance(value, bytes) else str(value)
