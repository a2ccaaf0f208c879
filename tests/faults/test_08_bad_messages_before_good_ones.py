"""Accident 8: two rows that can never be published stand before a hundred good ones.

P7: the good ones are not delayed, and not blamed; the bad ones end as dead letters that say why.
"""

import math
import time

import pytest
from kombu import Queue

from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.waiting import wait_until

GOOD = 100
#: What kombu's virtual transports and RabbitMQ say of a message that leads nowhere.
UNROUTABLE = "unroutable"
NO_EXCHANGE = {"amqp": "no exchange 'nowhere'", "redis": UNROUTABLE, "filesystem": UNROUTABLE}


def _send(site: Site) -> list[str]:
    tags = [new_tag(f"{number}") for number in range(GOOD)]
    bad = [
        {"exchange": "amq.direct", "exchange_type": "direct", "routing_key": "nobody"},
        {"exchange": "nowhere", "exchange_type": "direct", "routing_key": "nobody"},
    ]
    with site.Session.begin():
        for address in bad:
            site.step(new_tag("bad")).apply_async(**address)
        for tag in tags:
            site.step(tag).delay()
    return tags


def _verify_dead(site: Site, broker: str) -> None:
    unroutable, no_exchange = site.dead()
    assert UNROUTABLE in unroutable["last_error"]
    assert NO_EXCHANGE[broker] in no_exchange["last_error"]
    assert unroutable["destination"] == "amq.direct/nobody"
    assert no_exchange["destination"] == "nowhere/nobody"
    assert (unroutable["attempts"], no_exchange["attempts"]) == (3, 3)


@pytest.mark.parametrize("broker", ["amqp", "redis", "filesystem"])
def test_in_one_batch(sites: Making, broker: str) -> None:
    site = sites(broker, outbox_max_attempts=3)
    tags = _send(site)
    tally = site.outbox.relay_once()
    assert (tally.claimed, tally.confirmed, tally.retried) == (GOOD + 2, GOOD, 2)
    assert (tally.dead, tally.released, tally.lost) == (0, 0, 0)
    assert [row["attempts"] for row in site.rows()] == [1, 1]
    site.relay_all()
    _verify_dead(site, broker)
    site.worker()
    for tag in tags:
        site.wait_effects(tag, ["done"])
    site.wait_quiet()
    assert [site.runs(tag) for tag in tags] == [["done"]] * GOOD


@pytest.mark.parametrize("broker", ["amqp", "redis", "filesystem"])
def test_with_a_relay_of_small_batches(sites: Making, broker: str) -> None:
    """The bad ones come back again and again, and the good ones pass them by."""
    site = sites(broker, outbox_max_attempts=3, outbox_batch_size=2, outbox_backoff_cap_seconds=30)
    _send(site)
    relay = site.relay(wait=False)
    relay.wait_for_log("was not taken")
    start = time.monotonic()
    wait_until(lambda: site.left() >= GOOD, 30, "the good ones in the queue")
    assert time.monotonic() - start < 10
    wait_until(lambda: len(site.dead()) == 2, 60, "two dead letters")
    _verify_dead(site, broker)
    relay.wait_for_log("is a dead letter after 3 attempts")
    assert not site.pending()


def test_a_message_for_which_the_broker_ends_the_connection(sites: Making) -> None:
    """It looks like a broker that goes away, and must not hold up the others for ever."""
    site = sites("amqp", outbox_max_attempts=2, outbox_backoff_cap_seconds=0.1)
    # RabbitMQ can't take infinity in an argument of a queue, and drops the connection.
    killer = Queue("killer", queue_arguments={"x-max-length": math.inf})
    tags = [new_tag(f"{number}") for number in range(5)]
    with site.Session.begin():
        site.step(new_tag("bad")).apply_async(queue=killer)
        for tag in tags:
            site.step(tag).delay()

    def done() -> bool:
        site.outbox.relay_once()
        return not site.pending()

    wait_until(done, 60, "an empty outbox", interval=0.1)
    (dead,) = site.dead()
    assert "ended the connection" in dead["last_error"]
    site.worker()
    for tag in tags:
        site.wait_effects(tag, ["done"])
    site.wait_quiet()
