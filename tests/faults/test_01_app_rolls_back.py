"""Accident 1: the app rolls back, rolls back a savepoint, or dies before the commit."""

import signal
from contextlib import suppress

import pytest

from tests.journeys.making import Making
from tests.journeys.site import Effect, Site, new_tag


@pytest.fixture(scope="module")
def site(module_sites: Making) -> Site:
    """A site with a relay and a worker that would publish and handle whatever is there."""
    site = module_sites("amqp")
    site.worker()
    site.relay()
    return site


def test_nothing_is_published_for_a_roll_back(site: Site) -> None:
    tag = new_tag()
    with site.Session() as session:
        session.add(Effect(tag=tag, name="app"))
        site.step(tag).delay()
        session.flush()
        session.rollback()
    with suppress(ZeroDivisionError), site.Session.begin():
        site.step(tag).delay()
        _ = 1 / 0
    _verify_only(site, tag, [])


def test_a_savepoint_takes_along_what_was_sent_in_it_alone(site: Site) -> None:
    tag = new_tag()
    with site.Session.begin() as session:
        site.step(tag, "before").delay()
        with session.begin_nested() as savepoint:
            site.step(tag, "inside").delay()
            with session.begin_nested():
                site.step(tag, "deeper").delay()
            savepoint.rollback()
        with session.begin_nested():
            site.step(tag, "released").delay()
        site.step(tag, "after").delay()
    _verify_only(site, tag, ["after", "before", "released"])


def test_a_roll_back_takes_along_what_a_released_savepoint_sent(site: Site) -> None:
    tag = new_tag()
    with site.Session() as session:
        session.begin()
        with session.begin_nested():
            site.step(tag).delay()
        session.rollback()
    _verify_only(site, tag, [])


@pytest.mark.parametrize("moment", ["after the call", "after the insert"])
def test_nothing_is_published_when_the_app_is_killed_before_the_commit(
    site: Site, moment: str
) -> None:
    tag = new_tag()
    app = site.python(
        """
import os, signal
from sqlalchemy import event
from tests.journeys.site import Effect
site.create()
if os.environ["MOMENT"] == "after the insert":
    event.listen(site.engine, "commit", lambda connection: os.kill(os.getpid(), signal.SIGKILL))
with site.Session.begin() as session:
    session.add(Effect(tag=os.environ["TAG"], name="app"))
    session.flush()
    site.step(os.environ["TAG"]).delay()
    if os.environ["MOMENT"] == "after the call":
        os.kill(os.getpid(), signal.SIGKILL)
""",
        TAG=tag,
        MOMENT=moment,
    )
    assert app.wait() == -signal.SIGKILL
    _verify_only(site, tag, [])


def _verify_only(site: Site, tag: str, expected: list[str]) -> None:
    """A message that is sent after the accident arrives, and of the accident only `expected`."""
    witness = site.send(site.step(tag, "~witness"))
    assert witness.get(timeout=30) == "~witness"
    site.wait_quiet()
    assert site.effects(tag) == [*expected, "~witness"]
    assert site.runs(tag) == [*expected, "~witness"]
