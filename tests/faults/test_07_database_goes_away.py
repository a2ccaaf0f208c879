"""Accident 7: the database goes away during a claim, between publish and settle, and during a commit.

P5: nothing is lost. P8: a relay that gets its database back within its lease publishes nothing twice.
P13: whether a task's commit took effect, its next delivery finds out.
"""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError

from tests.journeys.making import Making
from tests.journeys.site import Setup, Site, new_tag
from tests.support.mariadb import MariaDB
from tests.support.processes import Process
from tests.support.proxy import TcpProxy
from tests.support.servers import PostgreSQL
from tests.support.waiting import wait_until

Either = PostgreSQL | MariaDB
BATCH = 40
#: Longer than the test: what is settled is settled by the relay that has published it.
LONG: dict[str, Any] = {"outbox_lease_seconds": 300.0}
#: The shortest that a configuration may have here.
SHORT: dict[str, Any] = {"outbox_lease_seconds": 1.0, "outbox_confirm_timeout_seconds": 0.5}


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest) -> Either:
    """The shared server of each database in turn."""
    server: Either = request.getfixturevalue(f"{request.param}_server")
    return server


@pytest.fixture
def proxy(server: Either) -> Iterator[TcpProxy]:
    """The way to the shared server."""
    with TcpProxy("127.0.0.1", server.port) as proxy:
        yield proxy


@pytest.fixture(scope="module", params=[PostgreSQL, MariaDB], ids=["postgresql", "mariadb"])
def own_server(request: pytest.FixtureRequest) -> Iterator[Either]:
    """One that may be killed."""
    with request.param() as server:
        yield server


def _send(site: Site, count: int = BATCH) -> list[str]:
    tags = [new_tag(f"{number}") for number in range(count)]
    with site.Session.begin():
        for tag in tags:
            site.step(tag).delay()
    return tags


def _relay_behind(site: Site, proxy: TcpProxy) -> Process:
    """Start a relay that comes to the database through the proxy; nobody else does."""
    _, port = proxy.target
    through = site.setup.database.replace(f":{port}/", f":{proxy.port}/")
    setup = Setup(**{**vars(site.setup), "database": through})
    environment: dict[str, Any] = dict(setup.environment())
    return site.relay(**environment)


def _end_connections(site: Site, server: Either) -> None:
    """Let the database end every connection to it."""
    server.end_connections(str(make_url(site.setup.database).database))
    site.engine.dispose()


def _verify_once(site: Site, tags: list[str]) -> None:
    site.worker()
    for tag in tags:
        site.wait_effects(tag, ["done"], 60)
    site.wait_quiet()
    assert [site.runs(tag) for tag in tags] == [["done"]] * len(tags)
    assert not site.dead()


# The claim


def test_during_a_claim(sites: Making, proxy: TcpProxy, server: Either) -> None:
    """The database has got the claim, and its answer is lost; then nobody is there for a while."""
    site = sites("amqp", server.name, **LONG)
    relay = _relay_behind(site, proxy)
    first = _send(site, 1)
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    proxy.swallow_replies()
    tags = _send(site)
    wait_until(lambda: proxy.swallowed, 30, "a lost answer")
    proxy.refuse()
    proxy.cut()
    relay.wait_for_log("the database is away")
    assert site.left() == 1
    proxy.heal()
    wait_until(lambda: not site.pending(), 60, "an empty outbox")
    assert site.left() == 1 + BATCH
    _verify_once(site, first + tags)


def test_the_connection_is_ended_while_the_relay_rests(sites: Making, server: Either) -> None:
    site = sites("amqp", server.name, **LONG)
    relay = site.relay()
    first = _send(site, 1)
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    _end_connections(site, server)
    relay.wait_for_log("the database is away")
    tags = _send(site)
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    assert site.left() == 1 + BATCH
    _verify_once(site, first + tags)


def test_the_answer_to_the_claims_commit_is_lost(sites: Making, server: Either) -> None:
    """It has a lease of which nobody knows; when it is over, the messages are claimed again."""
    site = sites("amqp", server.name, **SHORT)
    tags = _send(site)
    with _losing_the_answer_to_a_commit(site), pytest.raises(OperationalError):
        site.outbox.relay_once()
    assert site.outbox.store.counts()["in_flight"] == BATCH
    site.relay_all()
    assert site.left() == BATCH
    _verify_once(site, tags)


# Between publish and settle


def test_the_connection_is_ended_before_the_settlement(sites: Making, server: Either) -> None:
    site = sites("amqp", server.name, **LONG)
    site.points.arm("published", signal.SIGSTOP)
    relay = site.relay(wait=False)
    tags = _send(site)
    site.points.wait_struck("published")
    _end_connections(site, server)
    relay.resume()
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    assert relay.log.count("to settle") == 1
    assert site.left() == BATCH
    _verify_once(site, tags)


def test_away_for_a_while_before_the_settlement(
    sites: Making, proxy: TcpProxy, server: Either
) -> None:
    site = sites("amqp", server.name, **LONG)
    site.points.arm("published", signal.SIGSTOP)
    relay = _relay_behind(site, proxy)
    tags = _send(site)
    site.points.wait_struck("published")
    proxy.refuse()
    proxy.cut()
    relay.resume()
    wait_until(lambda: relay.log.count("to settle") >= 3, 30, "three tries to settle")
    assert site.outbox.store.counts()["in_flight"] == BATCH
    proxy.accept()
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    assert site.left() == BATCH
    _verify_once(site, tags)


def test_away_for_longer_than_the_lease(sites: Making, proxy: TcpProxy, server: Either) -> None:
    """The batch is given up, and published a second time."""
    site = sites("amqp", server.name, **SHORT)
    site.points.arm("published", signal.SIGSTOP)
    relay = _relay_behind(site, proxy)
    tags = _send(site)
    site.points.wait_struck("published")
    proxy.refuse()
    proxy.cut()
    relay.resume()
    relay.wait_for_log(r"the database is away: ")
    proxy.accept()
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    assert relay.alive
    assert site.left() == 2 * BATCH
    _verify_once(site, tags)


@pytest.mark.parametrize("attempts", [1, 10])
def test_the_answer_to_the_settlements_commit_is_lost(
    sites: Making, server: Either, attempts: int
) -> None:
    """It took effect, so that the second try finds nothing: no lease was lost, nothing is doubled."""
    site = sites("amqp", server.name, outbox_max_attempts=attempts, **LONG)
    with site.Session.begin():
        site.step(new_tag("bad")).apply_async(exchange="amq.direct", routing_key="nobody")
    tags = _send(site)
    with _losing_the_answer_to_a_commit(site, skip=1):
        tally = site.outbox.relay_once()
    assert (tally.claimed, tally.confirmed, tally.lost) == (BATCH + 1, BATCH, 0)
    assert site.left() == BATCH
    assert len(site.dead()) == (attempts == 1)
    assert len(site.rows()) == (attempts != 1)
    for letter in (*site.dead(), *site.rows()):
        assert letter["attempts"] == 1
        assert "unroutable" in letter["last_error"]
    site.worker()
    for tag in tags:
        site.wait_effects(tag, ["done"])


def test_told_to_stop_while_it_is_away(sites: Making, proxy: TcpProxy, server: Either) -> None:
    """A relay that has published stays until it has settled."""
    site = sites("amqp", server.name, **LONG)
    site.points.arm("published", signal.SIGSTOP)
    relay = _relay_behind(site, proxy)
    tags = _send(site)
    site.points.wait_struck("published")
    proxy.refuse()
    proxy.cut()
    relay.resume()
    relay.wait_for_log("to settle")
    relay.signal(signal.SIGTERM)
    relay.wait_for_log("ending the batch in hand")
    proxy.accept()
    assert relay.wait() == 0
    assert site.left() == BATCH
    assert not site.rows()
    _verify_once(site, tags)


@contextmanager
def _losing_the_answer_to_a_commit(site: Site, skip: int = 0) -> Iterator[None]:
    """Let this process's next commit take effect, but for `skip`, and its answer be lost."""
    dialect: Any = site.engine.dialect
    do_commit = dialect.do_commit
    before = iter(range(skip))

    def commit(pooled: Any) -> None:
        do_commit(pooled)
        if next(before, None) is None:
            dialect.do_commit = do_commit
            with socket.socket(fileno=os.dup(_socket_of(pooled.driver_connection))) as wire:
                wire.shutdown(socket.SHUT_RDWR)
            # What the driver says of a connection that is gone is what it says now.
            pooled.cursor().execute("SELECT 1")

    dialect.do_commit = commit
    try:
        yield
    finally:
        dialect.do_commit = do_commit


def _socket_of(connection: Any) -> int:
    """Return the number of a driver's socket: psycopg's, or PyMySQL's."""
    number: int = (
        connection.pgconn.socket if hasattr(connection, "pgconn") else connection._sock.fileno()
    )
    return number


# A durable task's commit, and everything at once


@pytest.mark.slow
def test_killed_during_a_tasks_commit(sites: Making, own_server: Either) -> None:
    own_server.start()
    site = sites("amqp", database=own_server.create_database())
    worker = site.worker()
    tags = _send(site, 2)
    site.points.arm("committing", signal.SIGSTOP)
    site.relay_all()
    site.points.wait_struck("committing")
    own_server.kill()
    worker.resume()
    worker.wait_for_log("goes back: ")
    own_server.start()
    site.engine.dispose()
    for tag in tags:
        site.wait_effects(tag, ["done"], 60)
    site.wait_quiet()
    assert [site.effects(tag) for tag in tags] == [["done"]] * 2
    assert sum(len(site.runs(tag)) for tag in tags) >= 3  # one was undone
    assert worker.alive


@pytest.mark.slow
def test_killed_again_and_again_under_load(sites: Making, own_server: Either) -> None:
    own_server.start()
    site = sites("amqp", database=own_server.create_database(), outbox_batch_size=10, **SHORT)
    relay, worker = site.relay(), site.worker()
    tags = _send(site, 300)
    for done in (30, 60, 90):
        _wait_handled(site, done)
        own_server.kill()
        own_server.start()
        site.engine.dispose()
    for tag in tags:
        site.wait_effects(tag, ["done"], 60)
    site.wait_quiet(60)
    assert [site.effects(tag) for tag in tags] == [["done"]] * len(tags)
    assert not site.dead()
    assert relay.alive
    assert worker.alive


def _wait_handled(site: Site, count: int) -> None:
    wait_until(lambda: site.outbox.store.counts()["incoming"] >= count, 60, f"{count} handled")
