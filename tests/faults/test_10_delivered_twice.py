"""Accident 10: the same message is delivered twice, in each way in which that can happen.

P13: a duplicate changes nothing. P14: it finishes the job. P16: it is not acknowledged before the
first execution has committed.
"""

from typing import Any

import pytest
from sqlalchemy import func, select, text

from tests.journeys.flows import FLOWS, Flow, Run
from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.waiting import wait_until

PLACES = {
    "amqp-postgresql": ("amqp", "postgresql"),
    "redis-postgresql": ("redis", "postgresql"),
    "filesystem-sqlite": ("filesystem", "sqlite"),
}


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
    seen: dict[str, dict[str, Any]] = {}
    run = flow.start(place)
    result = _finish_relaying(place, run, seen)
    incoming = _incoming(place)
    place.insert_again(list(seen.values()))
    _relay(place)
    place.wait_quiet()
    run.verify()
    assert _incoming(place) == incoming
    if flow.result is not None and run.result is not None:
        assert _state(run) == result


def test_at_once(sites: Making) -> None:
    """The first one is held in its body: the second neither runs nor is acknowledged."""
    site = sites("amqp")
    workers = [site.worker("--concurrency=1", "--hostname=one@%h"), site.worker("--concurrency=1")]
    tag = new_tag()
    result = site.send(site.task("held").s(tag=tag))
    site.insert_again(site.rows())
    _relay(site)
    site.wait_for_body(tag)
    for _ in range(3):
        _wait_given_back(workers)
        assert site.runs(tag) == ["done"]
        assert site.left() == 2
    site.open_gate(tag)
    assert result.get(timeout=30) == "done"
    site.wait_quiet()
    assert site.effects(tag) == ["done"]
    assert site.runs(tag) == ["done"]


def test_at_once_and_the_first_fails_to_commit(sites: Making) -> None:
    """The first one's process is killed in its body: the second one is the first."""
    site = sites("amqp", worker_lost_wait=0.1)
    workers = [site.worker("--concurrency=1", "--hostname=one@%h"), site.worker("--concurrency=1")]
    tag = new_tag()
    result = site.send(site.task("held").s(tag=tag))
    site.insert_again(site.rows())
    site.points.arm("committing")
    _relay(site)
    site.wait_for_body(tag)
    _wait_given_back(workers)
    site.open_gate(tag)
    site.points.wait_struck("committing")
    assert result.get(timeout=30) == "done"
    site.wait_quiet()
    assert site.effects(tag) == ["done"]
    assert site.runs(tag) == ["done", "done"]


def test_redelivered_by_redis_while_it_runs(sites: Making) -> None:
    """The visibility timeout is shorter than the task."""
    often = {"unacked_restore_interval": 0.2, "unacked_restore_throttle": 1}
    site = sites("redis", broker_transport_options={"visibility_timeout": 1, **often})
    worker = site.worker("--concurrency=2")
    tag = new_tag()
    result = site.send(site.task("held").s(tag=tag))
    _relay(site)
    site.wait_for_body(tag)
    _wait_given_back([worker])
    assert site.runs(tag) == ["done"]
    site.open_gate(tag)
    assert result.get(timeout=30) == "done"
    site.wait_quiet()
    assert site.effects(tag) == ["done"]
    assert site.runs(tag) == ["done"]


def test_a_day_later(place: Site) -> None:
    """The inbox still knows, and forgets after its retention only."""
    site = place
    tag = new_tag()
    result = site.send(site.task("spawning").s(tag=tag))
    rows = site.rows()
    _relay(site)
    assert result.get(timeout=30) == "parent"
    _relay(site)
    site.wait_effects(tag, ["child 1", "child 2", "parent"])
    _make_older(site, "1 day")
    site.outbox.store.prune_inbox(site.outbox.config.inbox_retention_seconds)
    site.app.backend.client.flushdb()  # the result is gone, too
    site.insert_again(rows)
    _relay(site)
    assert result.get(timeout=30) == "parent"
    site.wait_quiet()
    assert site.runs(tag) == ["child 1", "child 2", "parent"]
    _make_older(site, "7 days")
    while site.outbox.store.prune_inbox(site.outbox.config.inbox_retention_seconds):
        pass
    assert _incoming(site) == 0


def _finish_relaying(site: Site, run: Run, seen: dict[str, dict[str, Any]]) -> Any:
    """Relay, looking at each message, until the flow is over; return the state of its result."""

    def over() -> bool:
        seen.update({row["key"]: row for row in site.rows()})
        site.outbox.relay_all()
        return site.is_quiet() and len(site.effects(run.tag)) >= len(run.flow.effects)

    wait_until(over, 30, f"the end of {run.tag}")
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
        "sqlite": f"strftime('%Y-%m-%d %H:%M:%f000', handled_at, '-{by}')",
    }[site.engine.dialect.name]
    with site.engine.begin() as connection:
        connection.execute(text(f"UPDATE inbox SET handled_at = {older}"))


def _wait_given_back(workers: list[Any]) -> None:
    """Return when a worker has given a delivery back once more."""
    before = sum(worker.log.count("goes back: ") for worker in workers)
    wait_until(
        lambda: sum(worker.log.count("goes back: ") for worker in workers) > before,
        60,
        "a delivery that is given back",
    )
