"""Accident 4: the broker dies, or the connection drops, after the bytes left and before the confirm.

P5: nothing is lost. P8: at most one batch is published twice, for the inbox to absorb.
"""

from collections.abc import Iterator

import pytest

from tests.journeys.brokers import rabbitmq, redis_database
from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.proxy import TcpProxy
from tests.support.servers import RabbitMQ
from tests.support.waiting import wait_until

BATCH = 50


@pytest.fixture(scope="module")
def mortal_rabbitmq() -> Iterator[RabbitMQ]:
    """A RabbitMQ that may be killed."""
    with RabbitMQ() as server:
        yield server


@pytest.fixture
def proxy(rabbitmq_server: RabbitMQ) -> Iterator[TcpProxy]:
    """The way to the shared RabbitMQ."""
    with TcpProxy("127.0.0.1", rabbitmq_server.port) as proxy:
        yield proxy


def _site_behind(sites: Making, proxy: TcpProxy, server: RabbitMQ, timeout: float = 20.0) -> Site:
    """A site whose relay has published a first message, through the proxy."""
    broker = rabbitmq(server, f"amqp://guest:guest@127.0.0.1:{proxy.port}")
    site = sites(
        broker,
        outbox_batch_size=BATCH,
        outbox_confirm_timeout_seconds=timeout,
        # Longer than the test: what is released is released by its own relay.
        outbox_lease_seconds=200.0,
    )
    site.relay()
    site.send(site.step(new_tag("first")))
    wait_until(lambda: not site.pending() and site.left() == 1, 30, "the first message")
    return site


def _send_batch(site: Site) -> list[str]:
    tags = [new_tag(f"batch{number}") for number in range(BATCH)]
    with site.Session.begin():
        for tag in tags:
            site.step(tag).delay()
    return tags


def _verify_once(site: Site, tags: list[str]) -> None:
    site.worker()
    for tag in tags:
        site.wait_effects(tag, ["done"])
    site.wait_quiet()
    assert [site.effects(tag) for tag in tags] == [["done"]] * len(tags)
    assert [site.runs(tag) for tag in tags] == [["done"]] * len(tags)
    assert site.outbox.store.counts()["dead"] == 0


def test_the_connection_drops_before_the_confirm(
    sites: Making, proxy: TcpProxy, rabbitmq_server: RabbitMQ
) -> None:
    site = _site_behind(sites, proxy, rabbitmq_server)
    proxy.swallow_replies()
    tags = _send_batch(site)
    wait_until(lambda: site.left() == 1 + BATCH and proxy.swallowed, 30, "the batch in the queue")
    assert site.pending() == BATCH
    proxy.heal()  # which cuts what has lost bytes
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    assert site.left() == 1 + 2 * BATCH
    _verify_once(site, tags)


def test_the_confirm_does_not_come_in_time(
    sites: Making, proxy: TcpProxy, rabbitmq_server: RabbitMQ
) -> None:
    site = _site_behind(sites, proxy, rabbitmq_server, timeout=1.0)
    proxy.swallow_replies()
    tags = _send_batch(site)
    wait_until(lambda: proxy.connections > 1, 30, "a connection after the first one")
    assert site.pending() == BATCH
    assert site.left() == 1 + BATCH
    proxy.heal()
    wait_until(lambda: not site.pending(), 60, "an empty outbox")
    assert site.left() == 1 + 2 * BATCH
    _verify_once(site, tags)


def test_the_connection_drops_before_the_bytes_arrive(
    sites: Making, proxy: TcpProxy, rabbitmq_server: RabbitMQ
) -> None:
    site = _site_behind(sites, proxy, rabbitmq_server)
    proxy.swallow_requests()
    tags = _send_batch(site)
    wait_until(lambda: proxy.swallowed, 30, "lost bytes")
    proxy.heal()
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    assert site.left() <= 1 + 2 * BATCH
    _verify_once(site, tags)


@pytest.mark.slow
def test_the_broker_is_killed_before_the_confirm(sites: Making, mortal_rabbitmq: RabbitMQ) -> None:
    with TcpProxy("127.0.0.1", mortal_rabbitmq.port) as proxy:
        site = _site_behind(sites, proxy, mortal_rabbitmq)
        proxy.swallow_replies()
        tags = _send_batch(site)
        wait_until(lambda: site.left() == 1 + BATCH, 30, "the batch in the queue")
        mortal_rabbitmq.kill()
        proxy.heal()
        mortal_rabbitmq.restart()
        wait_until(lambda: not site.pending(), 60, "an empty outbox")
        _verify_once(site, tags)


def test_redis_does_not_answer(sites: Making) -> None:
    url = sites.redis_url()
    with TcpProxy("127.0.0.1", sites.redis.port) as proxy:
        direct = redis_database(url)
        broker = type(direct)(url.replace(f":{sites.redis.port}/", f":{proxy.port}/"), direct.left)
        site = sites(broker, outbox_batch_size=BATCH)
        site.relay()
        site.send(site.step(new_tag("first")))
        wait_until(lambda: not site.pending() and site.left() == 1, 30, "the first message")
        proxy.swallow_replies()
        tags = _send_batch(site)
        wait_until(lambda: site.left() > 1, 30, "a message of the batch in the queue")
        assert site.pending() == BATCH
        proxy.heal()
        wait_until(lambda: not site.pending(), 30, "an empty outbox")
        assert BATCH < site.left() <= 1 + 2 * BATCH
        _verify_once(site, tags)
