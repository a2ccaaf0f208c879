"""Accident 5: the broker is there, and does not take the message.

P5: a returned message is not a sent one. P7: what belongs to one message delays no other; what
belongs to the broker (it blocks its connections) is no message's fault.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from kombu import Connection, Exchange, Queue
from redis import Redis as Client

from tests.journeys.brokers import rabbitmq, redis_database
from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.servers import RabbitMQ, Redis
from tests.support.waiting import wait_until

#: Tried until the test has put right what was wrong.
PATIENT: dict[str, Any] = {"outbox_max_attempts": 10_000}
ROOM = 5


@pytest.fixture(scope="module")
def own_rabbitmq() -> Iterator[RabbitMQ]:
    """A RabbitMQ that may block its connections."""
    with RabbitMQ() as server:
        yield server


@pytest.fixture
def own_redis() -> Iterator[Redis]:
    """A Redis that may be told to take nothing."""
    with Redis() as server:
        yield server


def _send(site: Site, count: int, **address: Any) -> list[str]:
    tags = [new_tag(f"{number}") for number in range(count)]
    with site.Session.begin():
        for tag in tags:
            site.step(tag).apply_async(**address)
    return tags


def _declare(site: Site, entity: Any) -> None:
    with Connection(site.setup.broker) as connection:
        entity(connection.default_channel).declare()


def _verify_once(site: Site, tags: list[str], timeout: float = 30.0) -> None:
    for tag in tags:
        site.wait_effects(tag, ["done"], timeout)
    site.wait_quiet()
    assert [site.effects(tag) for tag in tags] == [["done"]] * len(tags)
    assert not site.dead()


@pytest.mark.parametrize(
    ("exchange", "error"), [("late", "no exchange 'late'"), ("amq.direct", "unroutable")]
)
def test_what_the_message_needs_is_declared_later(sites: Making, exchange: str, error: str) -> None:
    """There is no such exchange; no queue is bound to it: confirmed, but returned."""
    site = sites("amqp", **PATIENT)
    site.worker("--queues=celery")
    site.relay()
    early = _send(site, 3, exchange=exchange, exchange_type="direct", routing_key="late")
    good = _send(site, 20)
    for tag in good:
        site.wait_effects(tag, ["done"])
    wait_until(lambda: all(error in (row["last_error"] or "") for row in site.rows()), 30, error)
    assert len(site.rows()) == len(early)
    _declare(site, Queue("late", Exchange(exchange, type="direct"), routing_key="late"))
    site.worker("--queues=late")
    _verify_once(site, early + good)
    assert [site.runs(tag) for tag in early] == [["done"]] * len(early)


def test_the_queue_is_full_and_refuses(sites: Making) -> None:
    site = sites("amqp", outbox_batch_size=10, **PATIENT)
    vhost = site.setup.broker.rpartition("/")[2]
    limits = f'{{"max-length": {ROOM}, "overflow": "reject-publish"}}'
    sites.rabbitmq.rabbitmqctl("set_policy", "--vhost", vhost, "limits", "^full$", limits)
    site.worker("--queues=celery")
    site.relay()
    tags = _send(site, 20, queue="full")
    good = _send(site, 20)
    for tag in good:
        site.wait_effects(tag, ["done"])
    wait_until(lambda: site.left() == ROOM, 30, "a full queue")
    wait_until(lambda: site.pending() == 20 - ROOM, 30, "the others in the outbox")
    wait_until(lambda: all("nack" in (row["last_error"] or "") for row in site.rows()), 30, "nacks")
    site.worker("--queues=full")
    _verify_once(site, tags + good, 60)


@pytest.mark.slow
def test_the_broker_blocks_its_connections(sites: Making, own_rabbitmq: RabbitMQ) -> None:
    """Memory runs out: the relay pauses, blames no message, and goes on when it is over."""
    batch = 50
    site = sites(
        rabbitmq(own_rabbitmq),
        outbox_batch_size=batch,
        outbox_confirm_timeout_seconds=1.0,
        outbox_max_attempts=1,
    )
    relay = site.relay()
    before = _send(site, 1)
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    own_rabbitmq.raise_memory_alarm()
    try:
        tags = _send(site, 4 * batch)
        relay.wait_for_log("confirms nothing")
        seen = len(relay.log)
        relay.wait_for_log("confirms nothing", after=seen)
        counts = site.outbox.store.counts()
        assert (counts["outgoing"], counts["in_flight"], counts["dead"]) == (4 * batch, 0, 0)
        assert {row["attempts"] for row in site.rows()} == {0}
        assert relay.log.count("were not confirmed in time") == 1
    finally:
        own_rabbitmq.clear_memory_alarm()
    wait_until(lambda: not site.pending(), 60, "an empty outbox")
    # P8: what was written when it was blocked arrives as well, and no more than that.
    assert site.left() <= 1 + 5 * batch
    assert relay.alive
    site.worker()
    _verify_once(site, before + tags)
    assert [site.runs(tag) for tag in tags] == [["done"]] * len(tags)


@pytest.mark.slow
def test_a_relay_meets_a_broker_that_is_blocked_already(
    sites: Making, own_rabbitmq: RabbitMQ
) -> None:
    """Several relays as well: each may write one batch."""
    site = sites(rabbitmq(own_rabbitmq), outbox_confirm_timeout_seconds=1.0, outbox_batch_size=10)
    tags = _send(site, 30)
    own_rabbitmq.raise_memory_alarm()
    try:
        relays = [site.relay() for _ in range(2)]
        for relay in relays:
            relay.wait_for_log("confirms nothing")
        assert site.pending() == 30
    finally:
        own_rabbitmq.clear_memory_alarm()
    wait_until(lambda: not site.pending(), 60, "an empty outbox")
    assert site.left() <= 30 + 2 * 10
    site.worker()
    _verify_once(site, tags)


def _snapshot(client: Client) -> str:
    status: str = client.info("persistence")["rdb_last_bgsave_status"]
    return status


@contextmanager
def _without_a_disk(redis: Redis) -> Iterator[None]:
    """A snapshot fails: its file can't be written."""
    with Client.from_url(redis.url) as client:
        (redis.folder / "dump.rdb").mkdir()
        client.bgsave()
        wait_until(lambda: _snapshot(client) == "err", 30, "a failed snapshot")
        client.config_set("save", "3600 1")
        yield
        client.config_set("save", "")


@contextmanager
def _set(redis: Redis, name: str, value: int) -> Iterator[None]:
    with Client.from_url(redis.url) as client:
        client.config_set(name, value)
        yield
        client.config_set(name, 0)


@contextmanager
def _as_a_replica(redis: Redis) -> Iterator[None]:
    with Client.from_url(redis.url) as client:
        client.replicaof("127.0.0.1", 1)
        yield
        client.replicaof("NO", "ONE")


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        (lambda redis: _set(redis, "maxmemory", 1), "used memory > 'maxmemory'"),
        (lambda redis: _set(redis, "min-replicas-to-write", 1), "NOREPLICAS"),
        (_as_a_replica, "read only replica"),
        (_without_a_disk, "MISCONF"),
    ],
    ids=["full", "no replicas", "a replica itself", "no disk"],
)
def test_redis_takes_nothing(
    sites: Making, own_redis: Redis, trouble: Callable[[Redis], Any], error: str
) -> None:
    """No message is to blame, and each goes when that is over."""
    site = sites(redis_database(own_redis.url), backend=None, outbox_max_attempts=1)
    relay = site.relay()
    before = _send(site, 1)
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    with trouble(own_redis):
        tags = _send(site, 20)
        for _ in range(2):
            seen = len(relay.log)
            relay.wait_for_log(error, after=seen)
        counts = site.outbox.store.counts()
        assert (counts["outgoing"] + counts["in_flight"], counts["dead"]) == (20, 0)
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    assert site.left() == 21
    site.worker()
    _verify_once(site, before + tags)


def _refused(site: Site) -> list[tuple[bool, int]]:
    return [(bool(row["last_error"]), row["attempts"]) for row in site.rows()]


def test_redis_forbids_a_queue(sites: Making, own_redis: Redis) -> None:
    """A right that is missing is no message's fault; other queues go on."""
    site = sites(redis_database(own_redis.url), backend=None, outbox_max_attempts=1)
    site.worker("--queues=celery")
    site.relay()
    with Client.from_url(own_redis.url) as client:
        keys = ["celery*", "_kombu*", "unacked*"]
        client.acl_setuser("default", enabled=True, reset_keys=True, keys=keys)
    tags = _send(site, 5, queue="forbidden")
    good = _send(site, 5)
    for tag in good:
        site.wait_effects(tag, ["done"])
    # An attempt is counted while a row is under lease, and given back with the error.
    wait_until(
        lambda: _refused(site) == [(True, 0)] * 5, 30, "an error, and no attempt, in each row"
    )
    with Client.from_url(own_redis.url) as client:
        client.acl_setuser("default", enabled=True, keys=["*"])
    site.worker("--queues=forbidden")
    _verify_once(site, tags + good)
