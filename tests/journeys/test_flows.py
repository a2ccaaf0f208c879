"""Every flow, once, on every broker and with every result backend: what P13 and P15 promise."""

import pytest

from tests.journeys.flows import FLOWS, Flow, Runs
from tests.journeys.making import Making
from tests.support.waiting import wait_until

PLACES = {
    "amqp-postgresql-redis": ("amqp", "postgresql", "redis"),
    "amqp-mariadb-redis": ("amqp", "mariadb", "redis"),
    "redis-postgresql-redis": ("redis", "postgresql", "redis"),
    "filesystem-postgresql-database": ("filesystem", "postgresql", "database"),
    "filesystem-sqlite-redis": ("filesystem", "sqlite", "redis"),
    "sqlalchemy-postgresql-redis": ("sqlalchemy", "postgresql", "redis"),
    "local-postgresql-redis": ("local", "postgresql", "redis"),
    "local-postgresql-database": ("local", "postgresql", "database"),
    "local-sqlite-redis": ("local", "sqlite", "redis"),
}

#: kombu's SQLAlchemy transport has one session for the thread that reads and the one that gives a
#: prefork pool's rejected messages back: that ends the worker.
SOLO = {"sqlalchemy"}


@pytest.fixture(scope="module", params=list(PLACES.values()), ids=list(PLACES))
def runs(request: pytest.FixtureRequest, module_sites: Making) -> Runs:
    """All flows, on this broker and database."""
    broker, database, backend = request.param
    site = module_sites(broker, database, backend)
    site.worker(*(["--pool=solo"] if broker in SOLO else []))
    site.relay()
    return Runs(site, FLOWS)


@pytest.mark.parametrize("flow", FLOWS, ids=[flow.name for flow in FLOWS])
def test_each_effect_and_the_result(flow: Flow, runs: Runs) -> None:
    runs.finish(flow.name).verify()


def test_nothing_is_left(runs: Runs) -> None:
    site = runs.site
    site.wait_quiet()
    for run in runs.values():
        run.verify()
    counts = site.outbox.store.counts()
    assert counts["dead"] == 0
    wait_until(lambda: site.left() == 0, 10, "an empty broker")
