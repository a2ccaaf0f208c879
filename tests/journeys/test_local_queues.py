"""Local queues beside a broker: the same tasks in both, and canvas that goes from one to the other."""

import pytest
from celery import chain, chord

from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def site(module_sites: Making) -> Site:
    """A site with RabbitMQ and a local queue, a worker for each, and a relay."""
    site = module_sites("amqp", outbox_local_queues=["emails"])
    site.worker("--hostname=broker@%h")
    site.worker("--hostname=local@%h", "--queues=emails")
    site.relay()
    return site


def _wait(site: Site, tag: str, *names: str) -> None:
    site.wait_effects(tag, list(names))
    site.wait_quiet()
    wait_until(lambda: not site.outbox.store.local.counts(), 30, "empty local queues")
    assert site.effects(tag) == sorted(names)


def test_a_task_of_each(site: Site) -> None:
    tag = new_tag()
    with site.Session.begin():
        site.step(tag, "local").apply_async(queue="emails")
        site.step(tag, "broker").apply_async()
        assert site.outbox.store.local.counts() == {}
    _wait(site, tag, "local", "broker")


def test_a_chain_through_both(site: Site) -> None:
    tag = new_tag()
    steps = [site.step(tag, name) for name in "abcd"]
    for step in steps[::2]:
        step.set(queue="emails")
    assert site.send(chain(*steps)).get(timeout=30) == "d"
    _wait(site, tag, *"abcd")


def test_a_chord_of_both(site: Site) -> None:
    tag = new_tag()
    parts = [site.step(tag, name) for name in ("part 1", "part 2")]
    parts[0].set(queue="emails")
    body = site.task("total").s(tag=tag).set(queue="emails")
    assert site.send(chord(parts, body, app=site.app)).get(timeout=30) == ["part 1", "part 2"]
    _wait(site, tag, "part 1", "part 2", "total")


@pytest.mark.parametrize("task", ["retrying", "autoretrying"])
def test_a_retry_stays_in_its_queue(site: Site, task: str) -> None:
    tag = new_tag()
    result = site.send(site.task(task).s(tag=tag).set(queue="emails"))
    assert result.get(timeout=30) == "done"
    _wait(site, tag, "try 2")
    assert site.runs(tag) == ["try 0", "try 1", "try 2"]


def test_a_stock_task_in_a_local_queue(site: Site) -> None:
    """It is not captured, and is there at once."""
    tag = new_tag()
    site.task("plain").apply_async(kwargs={"tag": tag}, queue="emails")
    _wait(site, tag, "plain")


def test_a_worker_of_both_does_not_start(site: Site) -> None:
    worker = site.worker("--queues=emails,celery", ready_timeout=None)
    assert worker.wait() != 0
    assert "worker: emails is in the database and celery in the broker" in worker.log


@pytest.mark.parametrize("pool", ["threads", "solo", "gevent"])
def test_every_pool(sites: Making, pool: str) -> None:
    site = sites("local")
    tags = [new_tag(str(number)) for number in range(10)]
    with site.Session.begin():
        for tag in tags:
            site.step(tag).delay()
        site.step(tags[0], "later").apply_async(countdown=1)
    site.worker(f"--pool={pool}")
    site.wait_effects(tags[0], ["done", "later"])
    for tag in tags[1:]:
        site.wait_effects(tag, ["done"])
    site.wait_quiet()
    assert site.runs(tags[1]) == ["done"]


def test_a_commit_wakes_an_idle_worker(sites: Making) -> None:
    """PostgreSQL tells of it: the worker would look in ten minutes."""
    site = sites("local", outbox_poll_seconds=600.0)
    site.worker()
    for _ in range(3):
        tag = new_tag()
        site.send(site.step(tag))
        site.wait_effects(tag, ["done"], 30)
        wait_until(lambda: not site.left(), 30, "an empty queue")


def test_the_worker_prunes_the_inbox(sites: Making) -> None:
    """There is no relay that would (P12)."""
    site = sites("local", outbox_inbox_retention_seconds=0.01)
    code = (
        "from celery_outbox.relay import pruning\n"
        "pruning._EVERY_SECONDS = 0.1\n"
        "from celery.bin.celery import main\n"
        "import sys; sys.argv = ['celery', '-A', 'tests.journeys.worker', 'worker', '-c1', '-linfo']\n"
        "main()\n"
    )
    worker = site.python(code, C_FORCE_ROOT="1")
    worker.wait_for_log(r"\bready\.$")
    tag = new_tag()
    site.send(site.step(tag))
    site.wait_effects(tag, ["done"])
    wait_until(lambda: not site.outbox.store.counts()["incoming"], 30, "an empty inbox")
