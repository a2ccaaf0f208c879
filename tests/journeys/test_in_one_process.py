"""The memory transport, for tests of users' own: a worker thread, and relay_all() as the relay."""

from collections.abc import Iterator

import pytest
from celery.contrib.testing.worker import start_worker

from tests.journeys.making import Making
from tests.journeys.site import Effect, Site, new_tag
from tests.support.waiting import wait_until


@pytest.fixture(params=["postgresql", "sqlite"])
def site(request: pytest.FixtureRequest, sites: Making) -> Iterator[Site]:
    """A site in this process."""
    site = sites("memory", request.param, "cache+memory://")
    with start_worker(site.app, perform_ping_check=False, shutdown_timeout=90):
        yield site


def test_there_and_back(site: Site) -> None:
    tag = new_tag()
    with site.Session.begin() as session:
        session.add(Effect(tag=tag, name="app"))
        result = (site.step(tag, "a") | site.step(tag, "b")).delay()

    def relay() -> bool:
        site.outbox.relay_all()
        return len(site.effects(tag)) == 3

    wait_until(relay, 90, "three effects")
    assert result.get(timeout=90) == "b"
    assert site.effects(tag) == ["a", "app", "b"]


def test_nothing_for_a_roll_back(site: Site) -> None:
    tag = new_tag()
    with site.Session() as session:
        session.begin()
        site.step(tag, "never").delay()
        session.rollback()
    assert site.outbox.relay_all().claimed == 0
    witness = site.send(site.step(tag, "witness"))
    assert site.outbox.relay_all().confirmed == 1
    assert witness.get(timeout=90) == "witness"
    assert site.effects(tag) == ["witness"]
