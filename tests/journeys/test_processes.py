"""Relays as daemons, once, by beat, and several at a time; stopped under load."""

import re

import pytest

from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.waiting import wait_until


def _send(site: Site, count: int) -> list[str]:
    tags = [new_tag(f"{number}") for number in range(count)]
    with site.Session.begin():
        for tag in tags:
            site.step(tag).delay()
    return tags


def _verify_once(site: Site, tags: list[str]) -> None:
    for tag in tags:
        site.wait_effects(tag, ["done"])
    site.wait_quiet()
    assert [site.runs(tag) for tag in tags] == [["done"]] * len(tags)


@pytest.mark.parametrize(
    ("broker", "database"),
    [("amqp", "postgresql"), ("redis", "postgresql"), ("filesystem", "sqlite")],
)
def test_beat_drives_the_relay(sites: Making, broker: str, database: str) -> None:
    site = sites(broker, database, outbox_relay_tick_seconds=0.3)
    site.worker()
    site.beat()
    _verify_once(site, _send(site, 10))
    _verify_once(site, _send(site, 1))


def test_beat_drives_the_relay_in_a_queue_of_its_own(sites: Making) -> None:
    site = sites(outbox_relay_tick_seconds=0.3, outbox_relay_queue="relays")
    tags = _send(site, 3)
    site.worker("--queues=relays")
    site.beat()
    wait_until(lambda: not site.pending(), 90, "an empty outbox")
    assert not site.runs(tags[0])
    site.worker("--queues=celery")
    for tag in tags:
        site.wait_effects(tag, ["done"])


def test_once(sites: Making) -> None:
    site = sites(outbox_batch_size=5)
    _send(site, 7)
    for claimed in (5, 2, 0):
        relay = site.relay("--once", wait=False)
        assert relay.wait() == 0
        sentence = f"claimed {claimed}, confirmed {claimed}, retried 0, dead 0, released 0"
        assert sentence in relay.log
    assert site.left() == 7


def test_several_relays_share_the_work(sites: Making) -> None:
    site = sites(outbox_batch_size=10)
    tags = _send(site, 300)
    relays = [site.relay(wait=False) for _ in range(3)]
    for relay in relays:
        relay.wait_for_log("relay: ready")
    tags += _send(site, 300)
    wait_until(lambda: not site.pending(), 90, "an empty outbox")
    assert site.left() == 600
    for relay in relays:
        assert relay.terminate() == 0
    site.worker("--loglevel=ERROR", ready_timeout=None)
    wait_until(lambda: all(site.runs(tag) for tag in tags), 60, "every body")
    _verify_once(site, tags)


@pytest.mark.parametrize("broker", ["amqp", "redis"])
def test_a_relay_that_is_told_to_stop_ends_its_batch(sites: Making, broker: str) -> None:
    """P5, under load (accident 12): nothing is lost, and nothing is sent twice."""
    site = sites(broker, outbox_batch_size=20)
    with site.Session.begin():
        for number in range(2000):
            site.step(f"load{number}").delay()
    relay = site.relay()
    wait_until(lambda: site.left() > 100, 90, "the relay at work")
    assert relay.terminate() == 0
    assert re.search("relay: SIGTERM, ending the batch in hand", relay.log)
    assert re.search("relay: stopped", relay.log)
    counts = site.outbox.store.counts()
    assert counts["in_flight"] == 0
    assert 0 < counts["outgoing"] < 2000
    assert site.left() + counts["outgoing"] == 2000
