"""The pools in which a worker may run its tasks."""

import pytest

from tests.journeys.flows import FLOWS, Flow, Runs
from tests.journeys.making import Making

POOLS = {
    "threads": ("amqp", "--pool=threads", "--concurrency=3"),
    "solo": ("amqp", "--pool=solo"),
    "solo-filesystem": ("filesystem", "--pool=solo"),
}


@pytest.fixture(scope="module", params=list(POOLS.values()), ids=list(POOLS))
def runs(request: pytest.FixtureRequest, module_sites: Making) -> Runs:
    """All flows, in this pool."""
    broker, *arguments = request.param
    site = module_sites(broker)
    site.worker(*arguments)
    site.relay()
    return Runs(site, FLOWS)


@pytest.mark.parametrize("flow", FLOWS, ids=[flow.name for flow in FLOWS])
def test_each_effect_and_the_result(flow: Flow, runs: Runs) -> None:
    runs.finish(flow.name).verify()


def test_nothing_is_left(runs: Runs) -> None:
    runs.site.wait_quiet()
    for run in runs.values():
        run.verify()
