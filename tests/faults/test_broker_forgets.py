"""Redis forgets all that it had confirmed, and nothing is lost where the outbox keeps messages.

P5 ends where a broker breaks its word; `outbox_keep_until_handled` goes on from there. P13: what was
not lost after all is a duplicate.
"""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis as Client

from tests.journeys.brokers import redis_database
from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.processes import Process
from tests.support.servers import Redis
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TASKS = 1000


@pytest.fixture
def own_redis() -> Iterator[Redis]:
    """A Redis that may be emptied, and killed."""
    with Redis() as server:
        yield server


def _published(sites: Making, redis: Redis, count: int, **settings: Any) -> tuple[Site, list[str]]:
    """Send so many tasks in one transaction; return when Redis has them all, and no worker runs."""
    site = sites(
        redis_database(redis.url), backend=None, outbox_keep_until_handled=True, **settings
    )
    tags = [new_tag(f"{number}") for number in range(count)]
    with site.Session.begin():
        for tag in tags:
            site.step(tag).delay()
    wait_until(lambda: _relay(site) == count, 60, "every message published")
    assert site.left() == count
    return site, tags


def _relay(site: Site) -> int:
    site.outbox.relay_once()
    return site.outbox.store.counts()["published"]


def _forget(redis: Redis, site: Site) -> None:
    with Client.from_url(redis.url) as client:
        client.flushall()
    assert site.left() == 0


def _verify_once(site: Site, tags: list[str]) -> None:
    """Wait until nobody keeps anything any more."""
    wait_until(lambda: not site.pending(), 300, "every task handled")
    site.wait_quiet(60)
    effects = {tag: site.effects(tag) for tag in tags}
    assert effects == {tag: ["done"] for tag in tags}
    assert {tag: site.runs(tag) for tag in tags} == effects
    assert not site.dead()


def test_flushed_before_the_workers_start(sites: Making, own_redis: Redis) -> None:
    """The relay sends again what is overdue."""
    site, tags = _published(sites, own_redis, TASKS, outbox_redeliver_after_seconds=3.0)
    _forget(own_redis, site)
    site.relay()
    site.worker("--concurrency=4")
    _verify_once(site, tags)


def test_flushed_and_an_operator_does_not_wait(sites: Making, own_redis: Redis) -> None:
    """``outbox republish`` makes all of it due now; the relay would have waited for an hour."""
    site, tags = _published(sites, own_redis, 50, outbox_redeliver_after_seconds=3600.0)
    _forget(own_redis, site)
    site.relay()
    site.worker()
    command = [sys.executable, "-m", "celery", "-A", "tests.journeys.worker", "outbox", "republish"]
    with Process(command, cwd=site.folder, env=site.setup.environment()) as republish:
        assert republish.wait(60) == 0
        assert "50 message(s)" in republish.log
    _verify_once(site, tags)


def test_killed_while_workers_are_at_work(sites: Making, own_redis: Redis) -> None:
    """Without a file it comes back empty; some were handled, some were fetched, some were not."""
    site, tags = _published(sites, own_redis, 300, outbox_redeliver_after_seconds=3.0)
    site.relay()
    site.worker("--concurrency=2")
    wait_until(
        lambda: site.outbox.store.counts()["incoming"] >= 50, 60, "the first of them handled"
    )
    own_redis.kill()
    own_redis.start()
    _verify_once(site, tags)
