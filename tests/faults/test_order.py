"""P10: messages with one ordering key reach the broker in commit order, whatever becomes of relays.

Several relays work, are killed and stopped, and several processes send under the same keys.
"""

import random
from collections import defaultdict
from typing import Any

import pytest
from kombu import Connection

from tests.journeys.making import Making
from tests.journeys.site import Site
from tests.support.waiting import wait_until

KEYS = 5
SENDERS = 3
EACH = 60
LEASE: dict[str, Any] = {"outbox_lease_seconds": 1.0, "outbox_confirm_timeout_seconds": 0.5}

DATABASES = pytest.mark.parametrize("database", ["postgresql", "mariadb"])

SEND = """
import random
site.app.loader.import_default_modules()
for number in range({each}):
    with site.Session.begin() as session:
        key = str(random.randrange({keys}))
        signature = site.task("step").s(tag=key, name="{sender}:" + str(number))
        signature.apply_async(outbox_ordering_key=key)
"""


def _read(site: Site) -> list[tuple[str, str]]:
    """Take every message from the queue, in its order, as (tag, name)."""
    found = []
    with Connection(site.setup.broker) as connection:
        queue = site.app.amqp.queues["celery"](connection.default_channel)
        while (message := queue.get(no_ack=True)) is not None:
            _, kwargs, _ = message.decode()
            found.append((kwargs["tag"], kwargs["name"]))
    return found


def _in_order(seen: list[tuple[str, str]]) -> None:
    """Each sender's messages of a key come in the order in which it has committed them."""
    last: dict[tuple[str, str], int] = defaultdict(lambda: -1)
    for key, name in seen:
        sender, number = name.split(":")
        # A message may be sent twice (P8), but none comes before it once more.
        assert int(number) >= last[key, sender], (key, name)
        last[key, sender] = int(number)


@pytest.mark.slow
@DATABASES
def test_relays_are_killed(sites: Making, database: str) -> None:
    """After the claim, after the publish and after the settlement."""
    site = sites("amqp", database, outbox_batch_size=20, **LEASE)
    senders = [
        site.python(SEND.format(each=EACH, keys=KEYS, sender=sender)) for sender in range(SENDERS)
    ]
    for point in random.sample(["claimed", "published", "settled"], 3):
        site.points.arm(point, skip=random.randint(1, 3))
        relays = [site.relay(wait=False) for _ in range(2)]
        site.points.wait_struck(point, timeout=60)
        for relay in relays:
            relay.kill()
    site.relay()
    for sender in senders:
        assert sender.wait(60) == 0
    wait_until(lambda: not site.pending(), 60, "an empty outbox")
    seen = _read(site)
    assert len(set(seen)) == SENDERS * EACH
    _in_order(seen)


@DATABASES
def test_a_failing_message_holds_its_own_key_only(sites: Making, database: str) -> None:
    site = sites("amqp", database, outbox_max_attempts=10_000)
    site.relay()
    with site.Session.begin():
        site.step("a", "0:0").apply_async(
            outbox_ordering_key="a", exchange="late", exchange_type="direct", routing_key="x"
        )
        site.step("a", "0:1").apply_async(outbox_ordering_key="a")
        for number in range(10):
            site.step("b", f"0:{number}").apply_async(outbox_ordering_key="b")
    wait_until(lambda: site.pending() == 2, 30, "what may go at the broker")
    assert [row["ordering_key"] for row in site.rows()] == ["a", "a"]
    wait_until(lambda: site.left() == 10, 30, "all of them in the queue")
    assert _read(site) == [("b", f"0:{number}") for number in range(10)]
    (first, _) = site.rows()
    with site.engine.begin() as connection:
        outbox = site.outbox.tables.outbox
        connection.execute(outbox.delete().where(outbox.c.id == first["id"]))
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    assert _read(site) == [("a", "0:1")]
