"""Result backends, where they differ."""

import pytest

from tests.journeys.flows import FLOWS, Flow, Runs
from tests.journeys.making import Making
from tests.journeys.site import new_tag

_NAMES = ["plain", "chain", "group", "chord", "retry", "failure", "spawn"]
DATABASE_FLOWS = [flow for flow in FLOWS if flow.name in _NAMES]


@pytest.fixture(scope="module")
def database_runs(module_sites: Making) -> Runs:
    """Flows whose results are in a database, on RabbitMQ."""
    site = module_sites("amqp", backend="database")
    site.worker()
    site.relay()
    return Runs(site, DATABASE_FLOWS)


@pytest.mark.parametrize("flow", DATABASE_FLOWS, ids=_NAMES)
def test_a_database(flow: Flow, database_runs: Runs) -> None:
    database_runs.finish(flow.name).verify()


def test_rpc(sites: Making) -> None:
    """Replies go to a queue of the sender's own."""
    site = sites("amqp", backend="rpc://")
    site.worker()
    site.relay()
    tag = new_tag()
    result = site.send(site.step(tag))
    assert result.get(timeout=90) == "done"
    failed = site.send(site.task("failing").s(tag=tag))
    with pytest.raises(Exception, match="as told"):
        failed.get(timeout=90)
    assert site.effects(tag) == ["done"]


def test_none(sites: Making) -> None:
    site = sites("amqp", backend=None)
    site.worker()
    site.relay()
    tag = new_tag()
    site.send(site.step(tag, "a") | site.step(tag, "b"))
    site.wait_effects(tag, ["a", "b"])
    site.wait_quiet()
