"""What each error of the SDK means for the relay: a table."""

import pytest
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError
from azure.servicebus import exceptions as sdk

from celery_outbox.servicebus.errors import Concern, Verdict, verdict_on

MESSAGE = Verdict(Concern.MESSAGE)
QUEUE = Verdict(Concern.QUEUE)
BROKER = Verdict(Concern.BROKER)
DOUBT = Verdict(Concern.BROKER, in_doubt=True)


def other(condition: str) -> sdk.ServiceBusError:
    """Return an error for which the SDK has no class, as its AMQP side makes it."""
    error = sdk.ServiceBusError("said the service", error=None)
    error._condition = condition
    return error


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (sdk.MessageSizeExceededError(message="too large"), MESSAGE),
        (other("com.microsoft:argument-error"), MESSAGE),
        (other("com.microsoft:argument-out-of-range"), MESSAGE),
        (other("amqp:decode-error"), MESSAGE),
        (other("amqp:invalid-field"), MESSAGE),
        (other("amqp:not-allowed"), MESSAGE),
        (other("amqp:precondition-failed"), MESSAGE),
        (sdk.MessagingEntityNotFoundError(), QUEUE),
        (sdk.MessagingEntityDisabledError(), QUEUE),
        (sdk.ServiceBusAuthorizationError(message="no Send claim"), QUEUE),
        (sdk.ServiceBusQuotaExceededError(), QUEUE),
        (sdk.ServiceBusAuthenticationError(message="wrong key"), BROKER),
        (ClientAuthenticationError("no managed identity"), BROKER),
        (sdk.ServiceBusServerBusyError(), Verdict(Concern.BROKER, peace=2.0)),
        (sdk.OperationTimeoutError(), DOUBT),
        (sdk.ServiceBusConnectionError(message="detached, or cut"), DOUBT),
        (sdk.ServiceBusCommunicationError(), DOUBT),
        (other("amqp:internal-error"), DOUBT),
        (other("com.microsoft:operation-cancelled"), DOUBT),
        (HttpResponseError("503"), DOUBT),
        (ValueError("The handler has already been shutdown."), DOUBT),
        (ConnectionResetError(), DOUBT),
        (RuntimeError("that nobody has seen yet"), DOUBT),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, '_condition', '')}",
)
def test_verdict(error: Exception, verdict: Verdict) -> None:
    assert verdict_on(error) == verdict
