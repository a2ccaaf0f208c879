"""A worker that is the relay as well: no other process is needed."""

import signal

import pytest

from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.waiting import wait_until


def _send(site: Site, count: int) -> str:
    tag = new_tag()
    with site.Session.begin():
        for number in range(count):
            site.step(tag, f"{number:04}").delay()
    return tag


@pytest.mark.parametrize(
    ("pool", "broker", "database"),
    [
        ("prefork", "amqp", "postgresql"),
        ("threads", "redis", "postgresql"),
        ("solo", "filesystem", "sqlite"),
    ],
)
def test_one_process_does_it_all(sites: Making, pool: str, broker: str, database: str) -> None:
    site = sites(broker, database, outbox_relay_in_worker=True)
    worker = site.worker(f"--pool={pool}")
    for _ in range(3):
        tag = _send(site, 20)
        site.wait_effects(tag, [f"{number:04}" for number in range(20)])
    site.wait_quiet()
    assert worker.terminate() == 0
    assert "relay: runs in this worker" in worker.log


def test_children_that_are_forked_while_it_relays(sites: Making) -> None:
    """Every execution is killed once: the pool forks while the relay claims, publishes, settles."""
    site = sites(outbox_relay_in_worker=True, outbox_poll_seconds=0.001, worker_lost_wait=0.1)
    site.points.arm("body", each=True)
    site.worker("--concurrency=4")
    tags = [_send(site, 10) for _ in range(10)]
    for tag in tags:
        site.wait_effects(tag, [f"{number:04}" for number in range(10)], timeout=90)
    site.wait_quiet()


def test_told_to_stop_it_ends_its_batch(sites: Making) -> None:
    site = sites(outbox_relay_in_worker=True, outbox_batch_size=10)
    worker = site.worker("--queues=nothing")
    _send(site, 500)
    wait_until(lambda: site.left() > 0, 90, "a message in the broker")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert site.outbox.store.counts()["in_flight"] == 0
    assert site.left() + site.pending() == 500


def test_without_the_setting_it_does_not_relay(sites: Making) -> None:
    site = sites()
    worker = site.worker()
    tag = _send(site, 1)
    assert "relay: runs in this worker" not in worker.log
    assert site.runs(tag) == []
    assert site.pending() == 1
