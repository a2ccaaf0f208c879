"""Accident 14: ten million rows wait; a reporting transaction holds an old snapshot for an hour.

Scaled down. P12: a claim reads an index, and as much of it as it takes, however many rows wait or are
scheduled. While a snapshot keeps what was claimed before from going away, claims begin behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from celery_outbox.storage import low_water
from celery_outbox.storage.store import Settlement
from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

PAGE, KEYS = 500, 5

#: One stored message, as many times over: each a microsecond after the one before.
_COPIES = text(
    """
    INSERT INTO outbox
        (key, task, task_id, destination, ordering_key, body, message, attempts,
         created_at, available_at)
    SELECT key || ':' || n, task, task_id, destination, n % :keys, body, message, 0, stored, stored
    FROM template, generate_series(1, :count) AS n,
        LATERAL (SELECT now() + make_interval(secs => :due) + n * interval '1 microsecond') AS t(stored)
    """
)


@pytest.fixture
def site(sites: Making) -> Site:
    """A site with a message to copy, and none that waits."""
    site = sites("amqp")
    site.send(site.step(new_tag()))
    with site.engine.begin() as connection:
        connection.execute(text("CREATE TABLE template AS TABLE outbox"))
        connection.execute(text("TRUNCATE outbox"))
    return site


def _store(site: Site, waiting: int, scheduled: int = 0) -> None:
    """Let so many more rows wait, and others be due in a day; the planner knows of them."""
    _insert(site, waiting, scheduled)
    with site.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE outbox"))


def _insert(site: Site, waiting: int, scheduled: int = 0, ordered: int = 0) -> None:
    with site.engine.begin() as connection:
        connection.execute(_COPIES, {"count": waiting, "due": -3600, "keys": None})
        connection.execute(_COPIES, {"count": scheduled, "due": 86_400, "keys": None})
        connection.execute(_COPIES, {"count": ordered, "due": -3600, "keys": KEYS})


@contextmanager
def _old_snapshot(site: Site) -> Iterator[Connection]:
    """As a report holds it: until it ends, no dead row goes away."""
    with site.engine.connect().execution_options(isolation_level="REPEATABLE READ") as report:
        report.execute(text("SELECT count(*) FROM template"))
        yield report


@dataclass(frozen=True)
class _Look:
    """How many rows a claim reads by indexes, how many pages, and how many rows are expected of it."""

    rows: int
    pages: int
    expected: int


def _look(site: Site) -> _Look:
    """Ask PostgreSQL how the next claim would find its rows; nothing is claimed."""
    store = site.outbox.store

    def claim(connection: Connection) -> None:
        start = store._low_water.start()
        how: dict[str, Any] = {"limit": PAGE, "lease_seconds": 60, "token": "t", "start": start}
        assert store.dialect.claim(connection, store.tables.outbox, **how)

    return _explained(site, claim)


def _explained(site: Site, run: Callable[[Connection], Any]) -> _Look:
    """Ask PostgreSQL about the first statement that `run` executes, and undo it."""
    statements: list[tuple[str, Any]] = []

    def see(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    with site.engine.connect() as connection, connection.begin() as transaction:
        event.listen(site.engine, "before_cursor_execute", see)
        try:
            run(connection)
        finally:
            event.remove(site.engine, "before_cursor_execute", see)
        transaction.rollback()
        (statement, parameters) = statements[0]
    with site.engine.connect() as connection, connection.begin() as transaction:
        explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}"
        (plan,) = connection.exec_driver_sql(explain, parameters).scalar_one()
        transaction.rollback()
    nodes = [node for node in _nodes(plan["Plan"]) if node.get("Relation Name") == "outbox"]
    scans = [node for node in nodes if node["Node Type"] != "ModifyTable"]
    assert all(node["Node Type"].startswith(("Index", "Bitmap")) for node in scans), plan
    return _Look(
        sum(node["Actual Rows"] * node["Actual Loops"] for node in scans),
        sum(node["Shared Hit Blocks"] + node["Shared Read Blocks"] for node in scans),
        plan["Plan"]["Plan Rows"],
    )


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from _nodes(part)


def _relay_pages(site: Site, pages: int) -> None:
    """Do to some pages what a relay does, but for the publish."""
    store = site.outbox.store
    for _ in range(pages):
        batch = store.claim(PAGE, 60)
        assert len(batch.rows) == PAGE
        assert store.settle(batch, Settlement(confirmed=[row.id for row in batch.rows])) == 0


def test_a_claim_reads_no_more_where_more_wait(site: Site) -> None:
    _store(site, 5_000)
    few = _look(site)
    _store(site, 60_000, scheduled=20_000)
    many = _look(site)
    assert many.rows == few.rows
    assert many.pages < few.pages * 1.2
    # What PostgreSQL takes for expensive it compiles (JIT), for a second.
    assert many.expected <= PAGE


def test_a_claim_reads_an_index_where_the_planner_knows_nothing(site: Site) -> None:
    """A table that was empty when it was last analysed has no statistics."""
    with site.engine.begin() as connection:
        connection.execute(text("ALTER TABLE outbox SET (autovacuum_enabled = false)"))
    _insert(site, 5_000)
    few = _look(site)
    _insert(site, 60_000, scheduled=20_000)
    many = _look(site)
    assert many.rows == few.rows
    assert many.pages < few.pages * 1.2


def test_a_claim_finds_ordering_keys_by_their_index(site: Site) -> None:
    """Whether the planner has been told of them or not."""
    _store(site, 5_000)
    _insert(site, 0, ordered=10_000)
    untold = _look(site)
    _store(site, 0)
    assert _look(site).rows == untold.rows


def test_claims_begin_behind_what_an_old_snapshot_keeps(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    _store(site, 25_000)
    _relay_pages(site, 5)
    before = _look(site)
    with _old_snapshot(site):
        _relay_pages(site, 30)
        # The accident: all that was claimed since is read again.
        assert _look(site).pages > 2 * before.pages
        # As if that took long: how long it takes is the machine's affair.
        for name, value in {"_SLOW": -1.0, "_OFTEN": 1, "_SHARE": 1e9, "_RARELY": 3600.0}.items():
            monkeypatch.setattr(low_water, name, value)
        _relay_pages(site, 1)
        for _ in range(3):
            look = _look(site)
            assert look.rows == before.rows
            assert look.pages < 1.2 * before.pages
            # A relay that has nothing to do asks for when it will have.
            asked = _explained(site, lambda _: site.outbox.store.seconds_until_available())
            assert asked.pages < before.pages
            _relay_pages(site, 3)


@contextmanager
def _sending(site: Site) -> Iterator[list[str]]:
    """Let the app send meanwhile; its inserts fail if they wait for a lock."""
    tags, stop = list[str](), Event()

    def send() -> None:
        while not stop.is_set():
            tag = new_tag()
            with site.Session.begin() as session:
                session.execute(text("SET LOCAL lock_timeout = '1s'"))
                site.step(tag).delay()
            tags.append(tag)

    with ThreadPoolExecutor(1) as app:
        sending = app.submit(send)
        try:
            yield tags
        finally:
            stop.set()
        sending.result()


def test_relays_go_on_behind_an_old_snapshot(site: Site) -> None:
    waiting, scheduled = 20_000, 10_000
    _store(site, waiting, scheduled)
    with _old_snapshot(site):
        with _sending(site) as tags:
            relays = [site.relay() for _ in range(2)]
            wait_until(lambda: site.left() >= waiting, 90, "the backlog in the queue")
        wait_until(lambda: site.pending() == scheduled, 90, "nothing but what is scheduled")
    assert all(relay.alive for relay in relays)
    # None is lost, and none is sent twice.
    assert site.left() == waiting + len(tags)
