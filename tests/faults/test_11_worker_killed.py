"""Accident 11: a pool process is killed, at each point, once for every execution of every flow.

P13: the effects of every task are there once. P14: no chain stalls, no chord hangs, and every result
comes.
"""

from collections.abc import Iterator

import pytest

from tests.journeys.flows import FLOWS, Flow, Run
from tests.journeys.making import Making

pytestmark = pytest.mark.slow

#: Where every execution's process is killed, in the order in which it comes by.
POINTS = {
    "handling": "before the body",
    "body": "inside the body",
    "committing": "before the commit",
    "handled": "after the commit, before the result is stored",
    "acknowledging": "after the result is stored, before the acknowledgement",
}


@pytest.fixture(scope="module", params=POINTS)
def runs(request: pytest.FixtureRequest, module_sites: Making) -> Iterator[dict[str, Run]]:
    """All flows, started at once, and over."""
    point: str = request.param
    site = module_sites("amqp", worker_lost_wait=0.1)
    site.points.arm(point, each=True)
    site.worker("--concurrency=4")
    site.relay()
    runs = {flow.name: flow.start(site) for flow in FLOWS}
    yield runs
    assert len(site.points.struck(point)) >= len(FLOWS)


@pytest.mark.parametrize("flow", FLOWS, ids=[flow.name for flow in FLOWS])
def test_once(flow: Flow, runs: dict[str, Run]) -> None:
    run = runs[flow.name]
    run.finish(60)
    run.verify()


def test_nothing_is_left(runs: dict[str, Run]) -> None:
    site = runs["plain"].site
    site.wait_quiet(60)
    for run in runs.values():
        run.verify()
    assert site.outbox.store.counts()["dead"] == 0


def test_killed_while_the_body_of_a_chord_is_sent(sites: Making) -> None:
    """The last part has taken Celery's claim to send the body, and dies with it."""
    site = sites("amqp", worker_lost_wait=0.1, broker_connection_timeout=1)  # so long is the claim
    site.points.arm("sending", only="total")
    site.worker()
    site.relay()
    chords = next(flow for flow in FLOWS if flow.name == "chord")
    run = chords.start(site)
    site.points.wait_struck("sending")
    run.finish(50)
    run.verify()
