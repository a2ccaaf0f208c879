"""Every flow, once, on every broker and with every result backend: what P13 and P15 promise."""

import pytest

from tests.journeys.flows import FLOWS, Flow, Run
from tests.journeys.making import Making
from tests.journeys.site import Site
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


@pytest.fixture(scope="module", params=list(PLACES.values()), ids=list(PLACES))
def runs(request: pytest.FixtureRequest, module_sites: Making) -> dict[str, Run]:
    """All flows, started at once."""
    broker, database, backend = request.param
    site = module_sites(broker, database, backend)
    site.worker()
    site.relay()
    return {flow.name: flow.start(site) for flow in FLOWS}


@pytest.mark.parametrize("flow", FLOWS, ids=[flow.name for flow in FLOWS])
def test_each_effect_and_the_result(flow: Flow, runs: dict[str, Run]) -> None:
    run = runs[flow.name]
    run.finish()
    run.verify()


def test_nothing_is_left(runs: dict[str, Run]) -> None:
    site: Site = runs["plain"].site
    site.wait_quiet()
    for run in runs.values():
        run.verify()
    counts = site.outbox.store.counts()
    assert counts["dead"] == 0
    wait_until(lambda: site.left() == 0, 10, "an empty broker")
