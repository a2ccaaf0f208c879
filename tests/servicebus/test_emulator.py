"""The emulator, spoken to by the real SDK."""

import time
from typing import Any

import pytest
from azure.core.exceptions import (
    ClientAuthenticationError,
    ResourceExistsError,
    ResourceNotFoundError,
)
from azure.servicebus import (
    ServiceBusClient,
    ServiceBusMessage,
    ServiceBusReceiveMode,
    ServiceBusSubQueue,
)
from azure.servicebus import exceptions as sdk
from azure.servicebus.management import ServiceBusAdministrationClient

from tests.support.servicebus import Emulator, Fault
from tests.support.servicebus import values as v
from tests.support.servicebus.emulator import POLICY


def send(client: ServiceBusClient, *bodies: str | bytes, queue: str = "q") -> None:
    with client.get_queue_sender(queue) as sender:
        for body in bodies:
            sender.send_messages(ServiceBusMessage(body))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        v.UByte(7),
        v.UShort(300),
        v.UInt(0),
        v.UInt(9),
        v.UInt(70000),
        v.ULong(0),
        v.ULong(2**40),
        v.Int(-5),
        v.Long(-(2**40)),
        1.5,
        v.Timestamp(1_700_000_000_000),
        b"x" * 300,
        "é" * 200,
        v.Symbol("amqp:x"),
        [1, "a", None],
        [],
        {"k": [v.UInt(1)], v.Symbol("s"): b""},
        v.Array([v.Symbol("a"), v.Symbol("b")]),
        v.Array([v.Long(1), v.Long(2)]),
        list(range(400)),
    ],
    ids=repr,
)
def test_what_is_encoded_can_be_read_and_skipped(value: Any) -> None:
    encoded = v.encode(value)
    assert v.decode(encoded) == (value, len(encoded))
    assert v.skip(encoded, 0) == len(encoded)


def test_queues_are_administered(emulator: Emulator) -> None:
    admin = ServiceBusAdministrationClient.from_connection_string(emulator.connection_string)
    made: Any = admin.create_queue(
        "one", lock_duration="PT30S", requires_duplicate_detection=True, max_delivery_count=3
    )
    assert made.name == "one"
    assert made.lock_duration.total_seconds() == 30
    assert made.requires_duplicate_detection
    with pytest.raises(ResourceExistsError):
        admin.create_queue("one")
    with pytest.raises(ResourceNotFoundError):
        admin.get_queue("two")
    assert [queue.name for queue in admin.list_queues()] == ["one"]
    assert admin.get_queue_runtime_properties("one").total_message_count == 0
    made.max_delivery_count = 20
    admin.update_queue(made)
    assert admin.get_queue("one").max_delivery_count == 20
    admin.delete_queue("one")
    with pytest.raises(ResourceNotFoundError):
        admin.delete_queue("one")
    emulator.policies.keys[POLICY] = "changed"
    with pytest.raises(ClientAuthenticationError):
        admin.create_queue("two")


def test_a_message_is_locked_until_it_is_settled(
    emulator: Emulator, client: ServiceBusClient
) -> None:
    emulator.create_queue("q", lock_seconds=2, max_delivery_count=2)
    send(client, *"abcd")
    with client.get_queue_receiver("q") as receiver:
        done, given_back, bad, slow = receiver.receive_messages(4, max_wait_time=3)
        assert done.delivery_count == 0
        receiver.complete_message(done)
        receiver.abandon_message(given_back)
        receiver.dead_letter_message(bad, reason="r", error_description="d")
        before: Any = slow.locked_until_utc
        time.sleep(0.2)
        assert receiver.renew_message_lock(slow) > before
        time.sleep(2.3)
        with pytest.raises(sdk.MessageLockLostError):
            receiver.complete_message(slow)
        again = receiver.receive_messages(2, max_wait_time=3)
        assert [(str(m), m.delivery_count) for m in again] == [("b", 1), ("d", 1)]
        receiver.abandon_message(again[0])  # the second time is the last
        receiver.complete_message(again[1])
    with client.get_queue_receiver("q", sub_queue=ServiceBusSubQueue.DEAD_LETTER) as receiver:
        dead = receiver.receive_messages(2, max_wait_time=3)
        reasons = [(str(message), message.dead_letter_reason) for message in dead]
        assert reasons == [("c", "r"), ("b", "MaxDeliveryCountExceeded")]


def test_a_lock_survives_its_connection(emulator: Emulator, client: ServiceBusClient) -> None:
    emulator.create_queue("q", lock_seconds=1.5)
    send(client, "x")
    receiver = client.get_queue_receiver("q")
    assert receiver.receive_messages(max_wait_time=3)
    emulator.call(lambda: emulator.end_connections(None))
    with client.get_queue_receiver("q") as other:
        assert other.receive_messages(max_wait_time=0.5) == []
        (again,) = other.receive_messages(max_wait_time=4)
        assert again.delivery_count == 1
        other.complete_message(again)


def test_what_is_received_and_deleted_is_gone(emulator: Emulator, client: ServiceBusClient) -> None:
    emulator.create_queue("q")
    send(client, "x")
    mode = ServiceBusReceiveMode.RECEIVE_AND_DELETE
    with client.get_queue_receiver("q", receive_mode=mode) as receiver:
        assert len(receiver.receive_messages(max_wait_time=3)) == 1
    assert emulator.counts("q")["active"] == 0


def test_a_batch_is_many_messages_and_duplicates_are_dropped(
    emulator: Emulator, client: ServiceBusClient
) -> None:
    emulator.create_queue("q", duplicate_detection=True)
    with client.get_queue_sender("q") as sender:
        for _ in range(2):
            batch = sender.create_message_batch()
            for number in range(10):
                batch.add_message(ServiceBusMessage("x", message_id=f"id-{number}"))
            sender.send_messages(batch)
    counts = emulator.counts("q")
    assert (counts["stored"], counts["duplicates_dropped"], counts["transfers"]) == (10, 10, 2)


def test_a_large_message_goes_in_frames_and_a_larger_one_not_at_all(
    emulator: Emulator, client: ServiceBusClient
) -> None:
    emulator.create_queue("q")
    body = bytes(range(256)) * 900
    send(client, body)
    with client.get_queue_receiver("q") as receiver:
        (got,) = receiver.receive_messages(max_wait_time=3)
        assert b"".join(got.body) == body
        receiver.complete_message(got)
    with pytest.raises(sdk.MessageSizeExceededError):
        send(client, b"x" * 270_000)


def test_rights_and_keys(emulator: Emulator) -> None:
    emulator.create_queue("q")
    emulator.policies.keys["listen"] = "k"
    emulator.policies.rights["listen"] = frozenset({"Listen"})
    string = emulator.connection_string.replace(POLICY, "listen").replace("emulator-key=", "k")
    with ServiceBusClient.from_connection_string(string, retry_total=0) as client:
        with pytest.raises(sdk.ServiceBusAuthorizationError):
            send(client, "x")
        assert client.get_queue_receiver("q").receive_messages(max_wait_time=2) == []
    wrong = string.replace("Key=k", "Key=other")
    with (
        ServiceBusClient.from_connection_string(wrong, retry_total=0) as client,
        pytest.raises(sdk.ServiceBusAuthenticationError),
    ):
        send(client, "x")


def refused(condition: str) -> Fault:
    return Fault("send", "reject", condition=condition)


@pytest.mark.parametrize(
    ("fault", "error", "stored"),
    [
        (refused("amqp:resource-limit-exceeded"), sdk.ServiceBusQuotaExceededError, 0),
        (refused("com.microsoft:server-busy"), sdk.ServiceBusServerBusyError, 0),
        (Fault("send", "cut"), sdk.ServiceBusConnectionError, 0),
        (Fault("send", "store_cut"), sdk.ServiceBusConnectionError, 1),
        (Fault("send", "detach"), sdk.ServiceBusConnectionError, 0),
        (Fault("send", "store_close"), sdk.ServiceBusConnectionError, 1),
        (Fault("cbs", "status", status=401), sdk.ServiceBusAuthenticationError, 0),
        (
            Fault("attach", "detach", condition="com.microsoft:entity-disabled"),
            sdk.MessagingEntityDisabledError,
            0,
        ),
    ],
    ids=lambda value: f"{value.where}-{value.action}" if isinstance(value, Fault) else "",
)
def test_a_fault_hits_once(
    emulator: Emulator,
    client: ServiceBusClient,
    fault: Fault,
    error: type[Exception],
    stored: int,
) -> None:
    emulator.create_queue("q")
    emulator.faults.planned.append(fault)
    with pytest.raises(error):
        send(client, "x")
    assert emulator.counts("q")["stored"] == stored
    send(client, "y")
    assert emulator.counts("q")["stored"] == stored + 1


def test_silence_lasts_as_long_as_the_sender_waits(
    emulator: Emulator, client: ServiceBusClient
) -> None:
    emulator.create_queue("q")
    emulator.faults.planned.append(Fault("send", "store_silence"))
    with client.get_queue_sender("q") as sender, pytest.raises(sdk.OperationTimeoutError):
        sender.send_messages(ServiceBusMessage("x"), timeout=1)
    assert emulator.counts("q")["stored"] == 1
