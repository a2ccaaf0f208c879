"""Accident 12: a relay, a worker or a beat is told to stop (TERM) under load: it drains, loses nothing.

A prefork worker of Celery's may take half a minute longer than its tasks: a pool process that exits
waits up to 30 seconds for the main process to count its results, which then reads them no more. So
it does with stock tasks as well; `WARM` leaves room for it.
"""

import pytest

from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.waiting import wait_until

#: How long a warm shutdown may take.
WARM = 90.0
LOAD = 200

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def _send(site: Site, count: int = LOAD) -> list[str]:
    tags = [new_tag(f"{number}") for number in range(count)]
    with site.Session.begin():
        for tag in tags:
            site.step(tag).delay()
    return tags


def _verify_once(site: Site, tags: list[str]) -> None:
    wait_until(lambda: all(site.runs(tag) for tag in tags), 60, "every body")
    for tag in tags:
        site.wait_effects(tag, ["done"])
    site.wait_quiet()
    assert [site.runs(tag) for tag in tags] == [["done"]] * len(tags)
    assert not site.dead()


def _wait_left(site: Site, count: int) -> None:
    wait_until(lambda: site.left() >= count, 30, f"{count} messages in the broker")


def _handled(site: Site) -> int:
    return site.outbox.store.counts()["incoming"]


@pytest.mark.parametrize("broker", ["amqp", "redis"])
def test_relays(sites: Making, broker: str) -> None:
    """One after the other: each ends its batch, and nothing is sent twice."""
    site = sites(broker, outbox_batch_size=5)
    tags = _send(site)
    for _ in range(3):
        before = site.left()
        relay = site.relay()
        _wait_left(site, before + 1)
        assert relay.terminate() == 0
        counts = site.outbox.store.counts()
        assert counts["in_flight"] == 0
        assert site.left() + counts["outgoing"] == LOAD
    site.relay_all()
    assert site.left() == LOAD
    site.worker("--loglevel=ERROR", ready_timeout=None)
    _verify_once(site, tags)


@pytest.mark.parametrize("broker", ["amqp", "redis"])
def test_a_worker(sites: Making, broker: str) -> None:
    """It ends what it handles; the rest is the next worker's."""
    site = sites(broker)
    tags = _send(site)
    site.relay_all()
    worker = site.worker("--loglevel=ERROR", ready_timeout=None)
    wait_until(lambda: _handled(site) > 0, 60, "the worker at work")
    assert worker.terminate(WARM) == 0
    assert 0 < _handled(site) < LOAD
    site.worker("--loglevel=ERROR", ready_timeout=None)
    _verify_once(site, tags)


def test_a_worker_with_a_relay_in_it(sites: Making) -> None:
    site = sites(outbox_relay_in_worker=True, outbox_batch_size=5)
    tags = _send(site)
    worker = site.worker()
    wait_until(lambda: _handled(site) > 0, 60, "the worker at work")
    assert worker.terminate(WARM) == 0
    assert site.outbox.store.counts()["in_flight"] == 0
    site.worker()
    _verify_once(site, tags)


def test_a_beat_and_the_worker_that_it_drives(sites: Making) -> None:
    site = sites(outbox_relay_tick_seconds=0.2, outbox_batch_size=5)
    tags = _send(site)
    beat, worker = site.beat(), site.worker()
    wait_until(lambda: _handled(site) > 0, 60, "the worker at work")
    assert beat.terminate() == 0
    assert worker.terminate(WARM) == 0
    assert site.outbox.store.counts()["in_flight"] == 0
    site.beat()
    site.worker()
    _verify_once(site, tags)
