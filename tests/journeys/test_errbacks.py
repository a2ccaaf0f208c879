"""Error callbacks that are canvases, of a task and of a chord with a part that fails."""

from typing import Any

import pytest
from celery import chain, chord, group

from tests.journeys.flows import Flow, Runs
from tests.journeys.making import Making
from tests.journeys.site import Site


def _of_a_task(site: Site, tag: str, errback: Any) -> Any:
    return site.task("failing").s(tag=tag).set(link_error=[errback])


def _of_a_chord(site: Site, tag: str, errback: Any) -> Any:
    body = site.task("total").s(tag=tag).set(link_error=[errback])
    return chord([site.step(tag, "part"), site.task("failing").s(tag=tag)], body, app=site.app)


def _canvas(kind: Any, site: Site, tag: str) -> Any:
    steps = [site.task("step").si(tag=tag, name=name) for name in ("one", "two")]
    return kind(steps, app=site.app)


FLOWS = [
    Flow(
        f"{kind.__name__} {place.__name__.strip('_')}",
        lambda site, tag, kind=kind, place=place: place(site, tag, _canvas(kind, site, tag)),  # type: ignore[misc]
        ("one", "two") if place is _of_a_task else ("one", "part", "two"),
        error="as told",
        joins=place is _of_a_chord,
    )
    for place in (_of_a_task, _of_a_chord)
    for kind in (chain, group)
]


@pytest.fixture(scope="module", params=["redis", "database"])
def runs(request: pytest.FixtureRequest, module_sites: Making) -> Runs:
    """The flows, with this result backend."""
    site = module_sites(backend=request.param)
    site.worker()
    site.relay()
    return Runs(site, FLOWS)


@pytest.mark.parametrize("flow", FLOWS, ids=[flow.name for flow in FLOWS])
def test_each_is_sent_once(flow: Flow, runs: Runs) -> None:
    runs.finish(flow.name).verify()
