"""Accident 3: the broker is down when the app sends, at the commit, and when the relay publishes."""

from collections.abc import Iterator

import pytest

from tests.journeys.brokers import Broker, rabbitmq, redis_database
from tests.journeys.making import Making
from tests.journeys.site import new_tag
from tests.support.servers import RabbitMQ, Redis
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["rabbitmq", "redis"])
def server(request: pytest.FixtureRequest) -> Iterator[RabbitMQ | Redis]:
    """A broker of its own, which keeps what it has taken."""
    with RabbitMQ() if request.param == "rabbitmq" else Redis(appendonly=True) as server:
        yield server


@pytest.fixture
def broker(server: RabbitMQ | Redis) -> Broker:
    """A part of the broker."""
    server.start()
    if isinstance(server, RabbitMQ):
        return rabbitmq(server)
    server.flush(0)
    return redis_database(server.url)


def test_messages_wait_in_the_database(
    sites: Making, server: RabbitMQ | Redis, broker: Broker
) -> None:
    site = sites(broker)
    relay = site.relay()
    before = new_tag("before")
    site.send(site.step(before))
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    server.kill()
    tags = [new_tag(f"away{number}") for number in range(30)]
    # P4: nobody asks the broker.
    for tag in tags:
        site.send(site.step(tag))
    relay.wait_for_log("the broker is away")
    assert site.pending() == len(tags)
    assert site.outbox.relay_once().confirmed == 0
    assert site.pending() == len(tags)
    server.restart()
    wait_until(lambda: not site.pending(), 60, "an empty outbox")
    site.worker()
    for tag in [before, *tags]:
        site.wait_effects(tag, ["done"])
    # P7: no message was blamed for the broker.
    assert site.outbox.store.counts()["dead"] == 0
    assert relay.alive
    site.wait_quiet()
    assert [site.effects(tag) for tag in [before, *tags]] == [["done"]] * 31


def test_the_broker_goes_between_the_send_and_the_commit(
    sites: Making, server: RabbitMQ | Redis, broker: Broker
) -> None:
    site = sites(broker)
    tag = new_tag()
    with site.Session.begin():
        site.step(tag, "up").delay()
        server.kill()
        site.step(tag, "down").delay()
    assert site.outbox.relay_all().confirmed == 0
    with site.Session.begin():
        site.step(tag, "still down").delay()
        server.restart()
    site.relay_all(60)
    site.worker()
    site.wait_effects(tag, ["down", "still down", "up"])


def test_a_silent_broker_is_an_absent_one(sites: Making, server: RabbitMQ | Redis) -> None:
    server.start()
    broker = rabbitmq(server) if isinstance(server, RabbitMQ) else redis_database(server.url)
    options = {} if isinstance(server, RabbitMQ) else {"socket_timeout": 1.0}
    site = sites(broker, outbox_confirm_timeout_seconds=1.0, broker_transport_options=options)
    tag = new_tag()
    site.send(site.step(tag, "first"))
    assert site.outbox.relay_all().confirmed == 1
    server.pause()
    try:
        site.send(site.step(tag, "second"))
        tally = site.outbox.relay_once()
        assert (tally.confirmed, tally.retried, tally.dead) == (0, 0, 0)
    finally:
        server.resume()
    site.relay_all(60)
    site.worker()
    site.wait_effects(tag, ["first", "second"])
