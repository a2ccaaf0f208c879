"""Accident 10: the same message is delivered twice, in each way in which that can happen.

P13: a duplicate changes nothing. P14: it finishes the job. P16: it is not acknowledged before the
first execution has committed.
"""

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import func, select, text

from tests.journeys.flows import FLOWS, Flow, Run
from tests.journeys.making import Making
from tests.journeys.memory import Memory
from tests.journeys.site import Site, new_tag
from tests.support.processes import Process
from tests.support.proxy import TcpProxy
from tests.support.servers import RabbitMQ
from tests.support.waiting import wait_until

PLACES = {
    "amqp-postgresql": ("amqp", "postgresql"),
    "redis-postgresql": ("redis", "postgresql"),
    "amqp-mariadb": ("amqp", "mariadb"),
    "filesystem-sqlite": ("filesystem", "sqlite"),
}


DATABASES = pytest.mark.parametrize("database", ["postgresql", "mariadb", "sqlite"])
POOLS = pytest.mark.parametrize("pool", ["prefork", "threads"])


@pytest.fixture(scope="module", params=list(PLACES.values()), ids=list(PLACES))
def place(request: pytest.FixtureRequest, module_sites: Making) -> Site:
    """A site with a worker, whose relay is the test."""
    broker, database = request.param
    site = module_sites(broker, database)
    site.worker("--concurrency=3")
    return site


def _relay(site: Site) -> None:
    site.relay_all()


@pytest.mark.parametrize("flow", FLOWS, ids=[flow.name for flow in FLOWS])
def test_one_after_the_other(place: Site, flow: Flow) -> None:
    """Every message of the flow is delivered a second time when the flow is over."""
    memory = Memory(place)
    run = flow.start(place)
    result = _finish_relaying(place, run)
    incoming = _incoming(place)
    assert memory.deliver_again()
    _relay(place)
    place.wait_quiet()
    run.verify()
    assert _incoming(place) == incoming
    if flow.result is not None and run.result is not None:
        assert _state(run) == result


@DATABASES
@POOLS
def test_at_once(sites: Making, database: str, pool: str) -> None:
    """The first one is held in its body: the second neither runs nor is acknowledged."""
    site = sites("amqp", database)
    tag = new_tag()
    result = _send_copies(site, tag, 2)
    workers = [_worker(site, pool, 1, "one"), _worker(site, pool, 1, "two")]
    site.wait_for_body(tag)
    for _ in range(2):
        _wait_given_back(workers)
        assert site.runs(tag) == ["done"]
        assert site.left() == 2
    site.open_gate(tag)
    assert result.get(timeout=90) == "done"
    site.wait_quiet()
    assert site.effects(tag) == ["done"]
    assert site.runs(tag) == ["done"]


@DATABASES
def test_at_once_and_the_first_fails_to_commit(sites: Making, database: str) -> None:
    """The first one's process is killed in its body: the second one is the first."""
    site = sites("amqp", database, worker_lost_wait=0.1)
    tag = new_tag()
    result = _send_copies(site, tag, 2)
    site.points.arm("committing")
    workers = [_worker(site, "prefork", 1, "one"), _worker(site, "prefork", 1, "two")]
    site.wait_for_body(tag)
    _wait_given_back(workers)
    site.open_gate(tag)
    site.points.wait_struck("committing")
    assert result.get(timeout=90) == "done"
    site.wait_quiet()
    assert site.effects(tag) == ["done"]
    assert site.runs(tag) == ["done", "done"]


@POOLS
@pytest.mark.parametrize(
    ("broker", "database", "slots"),
    [
        ("redis", "postgresql", 2),
        ("amqp", "postgresql", 2),
        ("redis", "sqlite", 2),
        ("amqp", "sqlite", 6),
    ],
)
def test_many_copies_leave_a_slot(
    sites: Making, broker: str, database: str, slots: int, pool: str
) -> None:
    """Five copies: what else there is to do is done while the first one runs.

    On SQLite a copy can't be told from whoever waits for the one writer, and waits in its slot; Redis
    puts what is given back behind the rest, RabbitMQ puts it before.
    """
    site = sites(broker, database)
    tag = new_tag()
    result = _send_copies(site, tag, 5)
    worker = _worker(site, pool, slots, "one")
    site.wait_for_body(tag)
    others = [_without_effects(site, number) for number in range(3)]
    assert [other.get(timeout=90) for other in others] == [0, 1, 2]
    assert site.runs(tag) == ["done"]
    _wait_given_back([worker])
    site.open_gate(tag)
    assert result.get(timeout=90) == "done"
    site.wait_quiet()
    assert site.effects(tag) == ["done"]
    assert site.runs(tag) == ["done"]


@DATABASES
@POOLS
def test_redelivered_by_redis_while_it_runs(sites: Making, database: str, pool: str) -> None:
    """The visibility timeout is shorter than the task."""
    often = {"unacked_restore_interval": 0.2, "unacked_restore_throttle": 1}
    options = {"visibility_timeout": 1, **often}
    site = sites("redis", database, broker_transport_options=options)
    tag = new_tag()
    result = _send_copies(site, tag, 1)
    worker = _worker(site, pool, 2, "one")
    site.wait_for_body(tag)
    _wait_given_back([worker])
    assert site.runs(tag) == ["done"]
    site.open_gate(tag)
    assert result.get(timeout=90) == "done"
    site.wait_quiet()
    assert site.effects(tag) == ["done"]
    assert site.runs(tag) == ["done"]


@DATABASES
@POOLS
def test_redelivered_by_rabbitmq_while_it_runs(
    sites: Making, rabbitmq_server: RabbitMQ, database: str, pool: str
) -> None:
    """The first one's worker is cut off from the broker, which gives the message to the other one."""
    site = sites("amqp", database)
    tag = new_tag()
    result = _send_copies(site, tag, 1)
    with TcpProxy("127.0.0.1", rabbitmq_server.port) as proxy:
        vhost = site.setup.broker.rpartition("/")[2]
        behind = replace(site.setup, broker=f"amqp://guest:guest@127.0.0.1:{proxy.port}/{vhost}")
        first = _worker(site, pool, 1, "one", env=behind.environment())
        site.wait_for_body(tag)
        second = _worker(site, pool, 1, "two")
        proxy.refuse()
        proxy.cut()
        _wait_given_back([second])
        assert site.runs(tag) == ["done"]
        assert site.left() == 1
        proxy.accept()
        site.open_gate(tag)
        assert result.get(timeout=90) == "done"
        site.wait_quiet()
        assert first.alive
    assert site.effects(tag) == ["done"]
    assert site.runs(tag) == ["done"]


def test_a_day_later(place: Site) -> None:
    """The inbox still knows, and forgets after its retention only."""
    site = place
    tag = new_tag()
    result = site.send(site.task("spawning").s(tag=tag))
    rows = site.rows()
    _relay(site)
    assert result.get(timeout=90) == "parent"
    _relay(site)
    site.wait_effects(tag, ["child 1", "child 2", "parent"])
    _make_older(site, "1 day")
    site.outbox.store.prune_inbox(site.outbox.config.inbox_retention_seconds)
    site.app.backend.client.flushdb()  # the result is gone, too
    site.insert_again(rows)
    _relay(site)
    assert result.get(timeout=90) == "parent"
    site.wait_quiet()
    assert site.runs(tag) == ["child 1", "child 2", "parent"]
    _make_older(site, "7 days")
    while site.outbox.store.prune_inbox(site.outbox.config.inbox_retention_seconds):
        pass
    assert _incoming(site) == 0


def _send_copies(site: Site, tag: str, number: int) -> Any:
    """Give the broker copies of a message whose execution will be held.

    Before there is a worker: on SQLite the relay can't settle while a durable task is executed.
    """
    result = site.send(site.task("held").s(tag=tag))
    if number > 1:
        site.insert_again(site.rows() * (number - 1))
    _relay(site)
    return result


def _without_effects(site: Site, number: int) -> Any:
    """Send one of Celery's own tasks, which returns the number, and needs no database."""
    return site.app.tasks["celery.accumulate"].delay(number, index=0)


def _worker(site: Site, pool: str, slots: int, name: str, **options: Any) -> Process:
    arguments = (f"--pool={pool}", f"--concurrency={slots}", f"--hostname={name}@%h")
    return site.worker(*arguments, **options)


def _finish_relaying(site: Site, run: Run) -> Any:
    """Relay until the flow is over; return the state of its result."""

    def over() -> bool:
        site.outbox.relay_all()
        return site.is_quiet() and run.is_over()

    wait_until(over, 90, f"the end of {run.tag}")
    run.finish()
    site.wait_quiet()
    return _state(run)


def _state(run: Run) -> Any:
    return run.result.backend and [run.result.ready(), getattr(run.result, "state", None)]


def _incoming(site: Site) -> int:
    inbox = site.outbox.tables.inbox
    with site.engine.connect() as connection:
        return int(connection.execute(select(func.count()).select_from(inbox)).scalar_one())


def _make_older(site: Site, by: str) -> None:
    older = {
        "postgresql": f"handled_at - interval '{by}'",
        "mariadb": f"handled_at - interval {by.removesuffix('s')}",
        "sqlite": f"strftime('%Y-%m-%d %H:%M:%f000', handled_at, '-{by}')",
    }[site.engine.dialect.name]
    with site.engine.begin() as connection:
        connection.execute(text(f"UPDATE inbox SET handled_at = {older}"))


def _wait_given_back(workers: list[Any]) -> None:
    """Return when a worker has given a delivery back once more."""
    before = sum(worker.log.count("goes back: ") for worker in workers)
    wait_until(
        lambda: sum(worker.log.count("goes back: ") for worker in workers) > before,
        90,
        "a delivery that is given back",
    )
