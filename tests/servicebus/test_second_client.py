"""The emulator, spoken to by Qpid Proton: an AMQP 1.0 client that has nothing to do with Azure.

It is strict where the SDK lets things pass, which keeps the emulator honest.
"""

from typing import Any

import pytest
from proton import Message, SSLDomain
from proton.reactor import AtLeastOnce
from proton.utils import BlockingConnection, LinkDetached, SendException

from tests.support.servicebus import Emulator
from tests.support.servicebus.emulator import POLICY


@pytest.mark.parametrize("scheme", ["amqp", "amqps"])
def test_an_unrelated_client_sends_and_receives(emulator: Emulator, scheme: str) -> None:
    emulator.create_queue("q")
    key = emulator.policies.keys[POLICY]
    domain = SSLDomain(SSLDomain.MODE_CLIENT)
    domain.set_trusted_ca_db(str(emulator.certificate))
    # Proton compares names, not addresses.
    domain.set_peer_authentication(SSLDomain.VERIFY_PEER)
    connection = BlockingConnection(
        f"{scheme}://{POLICY}:{key}@{emulator.host}:{emulator.port}",
        allowed_mechs="PLAIN",
        heartbeat=2,
        timeout=10,
        ssl_domain=domain if scheme == "amqps" else None,
    )
    sender = connection.create_sender("q", options=AtLeastOnce())
    text = "x" * 100_000
    sender.send(Message(body={"text": text}, id="m1", properties={"k": "v"}))
    receiver = connection.create_receiver("q", credit=1)
    got: Any = receiver.receive(timeout=5)
    assert (got.body["text"], got.id, got.properties) == (text, "m1", {"k": "v"})
    assert (got.delivery_count, got.annotations["x-opt-sequence-number"]) == (0, 1)
    receiver.release()
    assert receiver.receive(timeout=5).id == "m1"
    receiver.accept()
    with pytest.raises(SendException):
        sender.send(Message(body="x" * 300_000))
    with pytest.raises(LinkDetached):
        connection.create_sender("nowhere")
    connection.close()
    assert emulator.counts("q")["completed"] == 1
