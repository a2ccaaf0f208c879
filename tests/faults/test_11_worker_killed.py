"""Accident 11: the process that executes a task is killed, or its commit cut off, at each point.

P13: the effects of every task are there once. P14: no chain stalls, no chord hangs, and every result
comes. What is run where: `tests.journeys.matrix`.
"""

from collections.abc import Callable
from functools import cache

import pytest

from tests.journeys.flows import FLOWS
from tests.journeys.making import Making
from tests.journeys.matrix import PLACES, Case, Place, Story
from tests.support.record import used

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CASES = [case for place in PLACES for case in place.cases()]


@pytest.fixture(scope="module")
def stories(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Place], Story]:
    """Tell what became of all runs of a place. They are started by the first test that asks."""

    @cache
    def told(place: Place) -> Story | Exception:
        try:
            with Making(request, tmp_path_factory) as sites:
                return Story.of(place, sites)
        except Exception as error:
            return error  # for all tests: it would take as long to find it again

    def story(place: Place) -> Story:
        found = told(place)
        if isinstance(found, Exception):
            raise found
        used(found.site.setup.broker, found.site.setup.database)
        return found

    return story


@pytest.mark.parametrize("case", CASES, ids=str)
def test_once(stories: Callable[[Place], Story], case: Case) -> None:
    story = stories(case.place)
    wrong = story.wrong.get(case)
    assert wrong is None, wrong
    assert story.had_accident(case), f"{case} had no accident"


@pytest.mark.parametrize("place", PLACES, ids=[place.name for place in PLACES])
def test_nothing_is_left(stories: Callable[[Place], Story], place: Place) -> None:
    """Neither in the outbox nor in the broker, and there are no dead letters."""
    assert stories(place).left == []


def test_killed_while_the_body_of_a_chord_is_sent(sites: Making) -> None:
    """The last part has taken Celery's claim to send the body, and dies with it."""
    site = sites("amqp", worker_lost_wait=0.1, broker_connection_timeout=1)  # so long is the claim
    site.points.arm("sending", only="total")
    site.worker()
    site.relay()
    chords = next(flow for flow in FLOWS if flow.name == "chord")
    run = chords.start(site)
    site.points.wait_struck("sending")
    run.finish(90)
    run.verify()
