"""Workers that take from Service Bus through kombu."""

import signal
import time

import pytest

from celery_outbox.servicebus.receiving import doubts
from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.servicebus import ServiceBus
from tests.support.servicebus.namespace import Namespace
from tests.support.waiting import wait_until


@pytest.fixture
def site(sites: Making) -> Site:
    return sites("servicebus", backend=None)


def _queue(site: Site) -> str:
    prefix: str = site.setup.settings["broker_transport_options"]["queue_name_prefix"]
    return f"{prefix}celery"


def test_a_task_from_the_commit_to_its_effect(
    site: Site, servicebus_namespace: ServiceBus | Namespace
) -> None:
    tag = new_tag()
    site.send(site.step(tag))
    site.relay_all()
    worker = site.worker()
    site.wait_effects(tag, ["done"])
    site.wait_quiet()
    assert "Azure Service Bus" not in worker.log
    counts = servicebus_namespace.counts(_queue(site))
    assert (counts["active"], counts["dead_letter"]) == (0, 0)


def test_a_task_that_runs_longer_than_its_lock_runs_once(site: Site) -> None:
    """The lock, of five seconds, is renewed meanwhile."""
    tag = new_tag()
    site.send(site.task("held").s(tag=tag))
    site.relay_all()
    site.worker()
    site.wait_for_body(tag)
    # That the lock is over can't be seen before it is; what is awaited is another worker's patience.
    other = site.worker()
    locked = time.monotonic() + 2.5 * 5
    wait_until(lambda: time.monotonic() > locked, 30, "what would be two ends of the lock")
    assert "received" not in other.log
    site.open_gate(tag)
    site.wait_effects(tag, ["done"])
    site.wait_quiet()
    assert site.runs(tag) == ["done"]


def test_a_process_of_the_pool_is_killed(site: Site) -> None:
    """Its message is given back: nobody renews the lock any more, though the worker lives on."""
    tag = new_tag()
    site.points.arm("committing", signal.SIGKILL)
    site.send(site.step(tag))
    site.relay_all()
    site.worker()
    site.points.wait_struck("committing")
    site.wait_effects(tag, ["done"])
    site.wait_quiet()


def test_a_worker_is_killed_after_the_commit(site: Site) -> None:
    tag = new_tag()
    site.points.arm("handled", signal.SIGKILL)
    site.send(site.step(tag))
    site.relay_all()
    site.worker()
    site.wait_effects(tag, ["done"])
    site.wait_quiet()
    assert site.effects(tag) == ["done"]


def test_a_message_that_is_not_wanted_goes_to_the_dead_letters(
    site: Site, servicebus_namespace: ServiceBus | Namespace
) -> None:
    site.send(site.task("rejecting").s(tag=new_tag()))
    site.relay_all()
    site.worker()
    wait_until(
        lambda: servicebus_namespace.counts(_queue(site))["dead_letter"] == 1, 30, "a dead letter"
    )
    site.wait_quiet()


def test_a_message_that_is_given_back_comes_again(site: Site) -> None:
    tag = new_tag()
    site.send(site.task("requeueing").s(tag=tag))
    site.relay_all()
    site.worker()
    site.wait_effects(tag, ["once more"])
    site.wait_quiet()
    assert site.runs(tag) == ["once more", "once more"]


def test_a_worker_without_lock_renewal_is_warned(sites: Making) -> None:
    site = sites("servicebus", backend=None)
    site.setup.settings["broker_transport_options"]["use_lock_renewal"] = False
    assert "use_lock_renewal" in site.worker().log


def test_doubts() -> None:
    assert list(doubts({"use_lock_renewal": True}, renews=True)) == []
    (slow,) = doubts({"peek_lock_seconds": 400}, renews=True)
    assert "300 s" in slow
    (old,) = doubts({"use_lock_renewal": True}, renews=False)
    assert "kombu 5.7" in old
