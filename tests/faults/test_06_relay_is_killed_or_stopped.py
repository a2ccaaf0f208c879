"""Accident 6: the relay is killed or stopped at its worst moments.

P5: nothing is lost. P6: a relay that was stopped beyond its lease writes nothing. P8: at most one
batch is published twice.
"""

import signal
from typing import Any

import pytest

from tests.journeys.making import Making
from tests.journeys.site import Setup, Site, new_tag
from tests.support.processes import Process
from tests.support.waiting import wait_until

BATCH = 40
#: The shortest lease that a configuration may have here, so that a dead relay's ends soon.
LEASE: dict[str, Any] = {"outbox_lease_seconds": 1.0, "outbox_confirm_timeout_seconds": 0.5}


def _send(site: Site, count: int = BATCH) -> list[str]:
    tags = [new_tag(f"{number}") for number in range(count)]
    with site.Session.begin():
        for tag in tags:
            site.step(tag).delay()
    return tags


def _verify_once(site: Site, tags: list[str]) -> None:
    site.worker()
    for tag in tags:
        site.wait_effects(tag, ["done"])
    site.wait_quiet()
    assert [site.effects(tag) for tag in tags] == [["done"]] * len(tags)
    assert [site.runs(tag) for tag in tags] == [["done"]] * len(tags)


@pytest.mark.parametrize(
    ("point", "skip", "copies"),
    [
        ("claimed", 0, 0),  # before the publish
        ("publishing", BATCH // 2, BATCH),  # in the middle of the batch
        ("published", 0, BATCH),  # after the publish, before its delete
        ("settled", 0, 0),  # after the delete
    ],
)
@pytest.mark.parametrize("broker", ["amqp", "redis"])
def test_killed(sites: Making, broker: str, point: str, skip: int, copies: int) -> None:
    site = sites(broker, outbox_batch_size=BATCH, **LEASE)
    tags = _send(site, 2 * BATCH)
    site.points.arm(point, skip=skip)
    relay = site.relay(wait=False)
    assert relay.wait() == -signal.SIGKILL
    site.points.wait_struck(point)
    site.relay()
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    assert 2 * BATCH <= site.left() <= 2 * BATCH + copies
    if point == "published":
        assert site.left() == 3 * BATCH
    _verify_once(site, tags)


def test_stopped_beyond_its_lease_when_another_has_finished(sites: Making) -> None:
    site = sites("amqp", outbox_batch_size=BATCH, **LEASE)
    tags = _send(site)
    site.points.arm("published", signal.SIGSTOP)
    first = site.relay(wait=False)
    site.points.wait_struck("published")
    site.relay()
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    more = _send(site, 5)
    first.resume()
    first.wait_for_log(rf"the lease of {BATCH} message\(s\) was over")
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    assert site.left() == 2 * BATCH + 5
    _verify_once(site, tags + more)


FATES = {
    # What the stopped relay would do: to whom it was addressed, and after how many attempts it dies.
    "delete": ({}, 10),
    "delay": ({"exchange": "amq.direct", "routing_key": "nobody"}, 10),
    "dead_letter": ({"exchange": "amq.direct", "routing_key": "nobody"}, 1),
}


@pytest.mark.parametrize(("address", "attempts"), FATES.values(), ids=FATES.keys())
def test_stopped_beyond_its_lease_while_another_works(
    sites: Making, address: dict[str, str], attempts: int
) -> None:
    """It can neither delete, delay nor dead-letter what another has taken since."""
    site = sites("amqp", outbox_max_attempts=attempts, **LEASE)
    with site.Session.begin():
        for _ in range(3):
            site.step(new_tag()).apply_async(**address)
    site.points.arm("published", signal.SIGSTOP)
    first = site.relay(wait=False)
    site.points.wait_struck("published")
    # The second relay takes over, and stops with the batch in its hands, for as long as we look.
    second_lease = {"outbox_lease_seconds": 100.0}
    second = _relay_with(site, second_lease)
    before = site.rows()
    assert len(before) == 3
    first.resume()
    first.wait_for_log(r"the lease of 3 message\(s\) was over")
    assert site.rows() == before
    assert not site.dead()
    first.kill()
    second.resume()
    if not address:
        wait_until(lambda: not site.pending(), 30, "an empty outbox")
    elif attempts == 1:
        wait_until(lambda: len(site.dead()) == 3, 30, "three dead letters")
        assert not site.rows()
    else:
        wait_until(lambda: all(row["last_error"] for row in site.rows()), 30, "three errors")


def _relay_with(site: Site, settings: dict[str, float]) -> Process:
    """Start a relay with other settings, and let it stop when it has claimed."""
    changed = Setup(**{**vars(site.setup), "settings": {**site.setup.settings, **settings}})
    site.points.arm("claimed", signal.SIGSTOP)
    relay = site.relay(wait=False, **changed.environment())
    site.points.wait_struck("claimed")
    return relay
