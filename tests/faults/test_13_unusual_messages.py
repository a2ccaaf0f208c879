"""Accident 13: too large for the broker, expired before it was sent, due in a year, by a newer version.

P7: it counts against that message alone, and delays no other. P11: what is not due rests in the
database. P19: what this version can't read waits for one that can.
"""

import json
import re
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import redis
from celery.exceptions import TaskRevokedError
from sqlalchemy import text, update

from tests.journeys.brokers import rabbitmq, redis_database
from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.servers import RabbitMQ, Redis
from tests.support.waiting import wait_until

LIMIT = 100_000
GOOD = 20


@pytest.fixture(scope="module")
def narrow_rabbitmq() -> Iterator[RabbitMQ]:
    """A RabbitMQ that takes no large messages."""
    with RabbitMQ(config={"max_message_size": str(LIMIT)}) as server:
        yield server


@pytest.fixture(scope="module")
def narrow_redis() -> Iterator[Redis]:
    """A Redis that takes no large messages."""
    with Redis() as server, redis.Redis.from_url(server.url) as client:
        client.config_set("proto-max-bulk-len", 1024 * 1024)
        yield server


def _send(site: Site, count: int = GOOD) -> list[str]:
    tags = [new_tag(f"{number}") for number in range(count)]
    with site.Session.begin():
        for tag in tags:
            site.step(tag).delay()
    return tags


def _verify_once(site: Site, tags: list[str]) -> None:
    site.worker()
    for tag in tags:
        site.wait_effects(tag, ["done"])
    site.wait_quiet()
    assert [site.runs(tag) for tag in tags] == [["done"]] * len(tags)


# Larger than the broker takes


@pytest.mark.slow
def test_larger_than_rabbitmq_takes(sites: Making, narrow_rabbitmq: RabbitMQ) -> None:
    site = sites(rabbitmq(narrow_rabbitmq), outbox_max_attempts=2)
    relay = site.relay()
    tags = _send(site)
    site.send(site.step("x" * 2 * LIMIT))
    tags += _send(site)
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    (dead,) = site.dead()
    assert "larger than configured max size" in dead["last_error"]
    assert dead["attempts"] == 2
    assert relay.alive
    _verify_once(site, tags)


@pytest.mark.slow
def test_larger_than_redis_takes(sites: Making, narrow_redis: Redis) -> None:
    """Redis ends the connection, and may or may not be heard before: as if it went away."""
    site = sites(redis_database(narrow_redis.url), outbox_max_attempts=2)
    relay = site.relay()
    before = _send(site)
    for size in (2, 20):
        site.send(site.step("x" * size * 1024 * 1024))
    tags = _send(site)
    wait_until(lambda: site.pending() <= 2, 30, "the good ones' departure")

    def given_up() -> bool:
        # Only while others go through can it be told from a broker that goes away.
        tags.extend(_send(site, 1))
        return len(site.dead()) == 2

    wait_until(given_up, 60, "two dead letters", interval=0.2)
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    for dead in site.dead():
        assert re.search("ended the connection for it|invalid bulk length", dead["last_error"])
    assert relay.alive
    _verify_once(site, before + tags)


# Expired before it was sent


@pytest.mark.parametrize("keep", [False, True], ids=["", "keep_until_handled"])
@pytest.mark.parametrize("broker", ["amqp", "redis"])
def test_expired_before_it_was_sent(sites: Making, broker: str, keep: bool) -> None:
    """The sender is told, nothing runs, and nothing is left."""
    site = sites(broker, outbox_keep_until_handled=keep, outbox_redeliver_after_seconds=0.5)
    tag = new_tag()
    with site.Session.begin():
        result = site.step(tag).apply_async(expires=0.1)
    (row,) = site.rows()
    wait_until(lambda: _now(site) > row["expires_at"], 30, "the expiry")
    tags = _send(site)
    site.relay()
    site.worker()
    with pytest.raises(TaskRevokedError):
        result.get(timeout=30)
    for other in tags:
        site.wait_effects(other, ["done"])
    site.wait_quiet()
    assert site.runs(tag) == []
    assert not site.dead()


def _now(site: Site) -> datetime:
    with site.engine.connect() as connection:
        now: datetime = connection.execute(text("SELECT now()")).scalar_one()
        return now


# Due in a year

LATER: dict[str, dict[str, Any]] = {
    "countdown": {"countdown": 365 * 24 * 3600},
    "eta": {"eta": datetime.now(timezone.utc) + timedelta(days=365)},
    "never": {"eta": datetime(9999, 12, 31, tzinfo=timezone.utc)},
}


@pytest.mark.parametrize("when", LATER.values(), ids=LATER.keys())
@pytest.mark.parametrize("database", ["postgresql", "mariadb", "sqlite"])
def test_due_in_a_year(sites: Making, database: str, when: dict[str, Any]) -> None:
    """It rests in the database; others pass it by; when its time has come it is published."""
    site = sites("amqp", database)
    tag = new_tag("late")
    with site.Session.begin():
        site.step(tag).apply_async(**when)
    tags = _send(site)
    assert site.outbox.relay_all().confirmed == GOOD
    assert site.outbox.store.counts()["scheduled"] == 1
    (row,) = site.rows()
    assert (row["attempts"], row["lease_token"]) == (0, None)
    assert row["available_at"] == row["due_at"] > datetime.now(timezone.utc) + timedelta(days=364)
    outbox = site.outbox.tables.outbox
    with site.engine.begin() as connection:
        connection.execute(update(outbox).values(available_at=row["created_at"]))
    assert site.outbox.relay_all().confirmed == 1
    assert site.left() == GOOD + 1
    site.worker()
    for other in tags:
        site.wait_effects(other, ["done"])
    assert site.runs(tag) == []  # the worker reads the eta in the message, and waits for it


def test_due_soon(sites: Making) -> None:
    """Neither early nor forgotten."""
    site = sites("amqp")
    site.relay()
    site.worker()
    tag = new_tag()
    before = time.monotonic()
    with site.Session.begin():
        site.step(tag).apply_async(countdown=1)
    site.wait_effects(tag, ["done"])
    assert time.monotonic() - before >= 1
    site.wait_quiet()


# Written by a newer version


@pytest.mark.parametrize("database", ["postgresql", "mariadb", "sqlite"])
def test_by_a_newer_version(sites: Making, database: str) -> None:
    """It is not blamed, and never a dead letter: relays that can read it will come."""
    site = sites("amqp", database, outbox_max_attempts=1)
    tag = new_tag("newer")
    site.send(site.step(tag))
    (row,) = site.rows()
    newer = json.dumps({**json.loads(row["message"]), "format": 99, "what": "nobody knows yet"})
    _write(site, newer)
    tags = _send(site)
    relay = site.relay()
    relay.wait_for_log("stored in format 99, this version reads up to 1")
    seen = len(relay.log)
    relay.wait_for_log("stored in format 99", after=seen)
    wait_until(lambda: len(site.rows()) == 1, 30, "the others' departure")
    (waiting,) = site.rows()
    assert waiting["attempts"] <= 1  # one while it is under lease
    assert "format 99" in waiting["last_error"]
    assert not site.dead()
    _write(site, row["message"])
    _verify_once(site, [tag, *tags])


def _write(site: Site, message: str) -> None:
    with site.engine.begin() as connection:
        connection.execute(update(site.outbox.tables.outbox).values(message=message))
