"""The processes that send publish by themselves: web, workers of each pool. No relay runs."""

import asyncio
import signal

import pytest
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.waiting import wait_until

FLOW = ["a", "b", "c"]


def _send_chain(site: Site, tag: str) -> None:
    first, second, third = (site.step(tag, name) for name in FLOW)
    site.send(first | second | third)


@pytest.mark.parametrize(
    ("pool", "broker", "database"),
    [
        ("prefork", "amqp", "postgresql"),
        ("prefork", "redis", "postgresql"),
        ("threads", "redis", "postgresql"),
        ("gevent", "amqp", "postgresql"),
        ("solo", "filesystem", "sqlite"),
    ],
)
def test_chains_without_a_relay(sites: Making, pool: str, broker: str, database: str) -> None:
    site = sites(broker, database, outbox_publish_after_commit=True)
    worker = site.worker(f"--pool={pool}")
    tags = [new_tag() for _ in range(5)]
    for tag in tags:
        _send_chain(site, tag)
    for tag in tags:
        site.wait_effects(tag, FLOW)
    site.wait_quiet()
    assert [site.runs(tag) for tag in tags] == [FLOW] * len(tags)
    assert worker.alive


def test_a_worker_that_is_told_to_stop_leaves_nothing_leased(sites: Making) -> None:
    """A pool's process ends without what Python does at an exit."""
    site = sites("amqp", outbox_publish_after_commit=True)
    worker = site.worker("--concurrency=4", "--max-tasks-per-child=3")
    tags = [new_tag() for _ in range(20)]
    for tag in tags:
        _send_chain(site, tag)
    wait_until(lambda: site.runs(tags[0]), 30, "a body")
    worker.signal(signal.SIGTERM)
    assert worker.wait(90) == 0
    site.outbox.fast_path.stop()
    assert site.outbox.store.counts()["in_flight"] == 0
    site.relay()
    site.worker()
    for tag in tags:
        site.wait_effects(tag, FLOW, timeout=60)
    site.wait_quiet()
    assert [site.runs(tag) for tag in tags] == [FLOW] * len(tags)


def test_an_asyncio_app(sites: Making) -> None:
    site = sites("amqp", outbox_publish_after_commit=True)
    tag = new_tag()

    async def app() -> None:
        engine = create_async_engine(site.setup.database)
        make = async_sessionmaker(engine)
        for name in FLOW:
            async with make.begin() as session:
                await session.connection()
                with site.outbox.using(session):
                    site.step(tag, name).apply_async()
        await engine.dispose()

    asyncio.run(app())
    wait_until(lambda: site.left() == len(FLOW), 30, "messages in the broker")
    site.worker()
    site.wait_effects(tag, FLOW)
    site.wait_quiet()


def test_what_needs_a_relay_waits_for_one(sites: Making) -> None:
    site = sites("amqp", outbox_publish_after_commit=True)
    tag = new_tag()
    with site.Session.begin():
        site.step(tag, "later").apply_async(countdown=1)
        site.step(tag, "now").apply_async()
    site.worker()
    site.wait_effects(tag, ["now"])
    assert site.pending() == 1
    site.relay()
    site.wait_effects(tag, ["later", "now"])
    site.wait_quiet()
