"""Accident 9: a transaction with a lower id commits after one with a higher id was relayed."""

import threading
from typing import Any

import pytest

from celery_outbox import events
from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def site(module_sites: Making) -> Site:
    """A site with a worker and a relay."""
    site = module_sites("amqp")
    site.worker()
    site.relay()
    return site


def test_both_arrive_from_connections(site: Site) -> None:
    late, early = new_tag("late"), new_tag("early")
    with site.engine.begin() as connection:
        with site.outbox.using(connection):
            site.step(late).delay()
        with connection.begin_nested():
            pass  # before a savepoint, what is staged is inserted
        lower = _newest_id(site, connection)
        with site.engine.begin() as other:
            with site.outbox.using(other):
                site.step(early).delay()
            with other.begin_nested():
                higher = _newest_id(site, other)
        assert lower < higher
        site.wait_effects(early, ["done"])
        wait_until(lambda: not site.pending(), 30, "an empty outbox")
        assert site.effects(late) == []
    site.wait_effects(late, ["done"])
    site.wait_quiet()


def test_both_arrive_from_sessions(site: Site) -> None:
    late, early = new_tag("late"), new_tag("early")
    inserted, relayed = threading.Event(), threading.Event()

    def hold(name: str, details: dict[str, Any]) -> None:
        if name == events.STAGED and threading.current_thread() is slow:
            inserted.set()
            assert relayed.wait(60)

    slow = threading.Thread(target=site.send, args=(site.step(late),))
    with events.listening(hold):
        slow.start()
        try:
            assert inserted.wait(30)
            site.send(site.step(early))
            site.wait_effects(early, ["done"])
            assert site.effects(late) == []
        finally:
            relayed.set()
            slow.join()
    site.wait_effects(late, ["done"])
    site.wait_quiet()


def _newest_id(site: Site, connection: Any) -> int:
    outbox = site.outbox.tables.outbox
    ids = connection.execute(outbox.select().order_by(outbox.c.id.desc())).scalars().all()
    return int(ids[0])
