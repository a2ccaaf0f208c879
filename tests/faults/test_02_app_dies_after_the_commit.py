"""Accident 2: the app dies right after the commit."""

import signal

import pytest

from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag


@pytest.fixture(scope="module")
def site(module_sites: Making) -> Site:
    """A site with a worker and a relay."""
    site = module_sites("amqp")
    site.worker()
    site.relay()
    return site


@pytest.mark.parametrize("session", ["session", "connection", "none"])
def test_everything_is_published(site: Site, session: str) -> None:
    tag = new_tag()
    app = site.python(
        """
import os, signal
site.create()
tag = os.environ["TAG"]
def send():
    for number in range(20):
        site.step(tag, f"{number:02}").delay()
match os.environ["SESSION"]:
    case "session":
        with site.Session.begin():
            send()
    case "connection":
        with site.engine.begin() as connection, site.outbox.using(connection):
            send()
    case "none":
        send()
os.kill(os.getpid(), signal.SIGKILL)
""",
        TAG=tag,
        SESSION=session,
    )
    assert app.wait() == -signal.SIGKILL
    expected = [f"{number:02}" for number in range(20)]
    site.wait_effects(tag, expected)
    site.wait_quiet()
    assert site.effects(tag) == expected
    assert site.runs(tag) == expected
