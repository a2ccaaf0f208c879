"""Signs of life of relays, and what is pruned, on each database."""

import pytest
import sqlalchemy as sa

from celery_outbox.storage.relays import ALIVE_SECONDS, Relays, SeenRelay
from celery_outbox.storage.rows import row_of
from celery_outbox.storage.store import Settlement, Store
from celery_outbox.testing.contract.outgoing import envelope

VALUES = {"host": "web", "pid": 7, "dead": 0, "lost": 0, "per_second": 1.5}


@pytest.fixture
def relays(store: Store) -> Relays:
    return Relays(store.engine, store.tables)


def one(relays: Relays) -> SeenRelay:
    (seen,) = relays.all()
    return seen


def later(store: Store, seconds: float) -> None:
    """Let everything that was written have happened some time ago."""
    tables, then = store.tables, store.dialect.after(-seconds)
    with store.engine.begin() as connection:
        connection.execute(sa.update(tables.relay).values(seen_at=then))
        connection.execute(sa.update(tables.dead_letter).values(died_at=then))


def test_a_relay_is_seen(relays: Relays) -> None:
    """P17."""
    assert relays.all() == []
    relays.seen("a", has_failed=False, confirmed=3, last_error=None, **VALUES)
    seen = one(relays)
    assert (seen.host, seen.pid, seen.confirmed, seen.per_second) == ("web", 7, 3, 1.5)
    assert seen.is_alive
    assert seen.last_error_at is None
    relays.seen("a", has_failed=True, confirmed=10**12, last_error="away", **VALUES)
    again = one(relays)
    assert (again.confirmed, again.last_error) == (10**12, "away")
    assert again.started_at == seen.started_at
    assert again.last_error_at == again.seen_at


def test_the_last_error_keeps_its_time(relays: Relays, store: Store) -> None:
    relays.seen("a", has_failed=True, confirmed=0, last_error="away", **VALUES)
    failed_at = one(relays).last_error_at
    later(store, 5)
    relays.seen("a", has_failed=False, confirmed=0, last_error="away", **VALUES)
    assert one(relays).last_error_at == failed_at


def test_a_relay_that_is_silent_is_not_alive(relays: Relays, store: Store) -> None:
    relays.seen("a", has_failed=False, confirmed=0, last_error=None, **VALUES)
    later(store, ALIVE_SECONDS + 1)
    assert not one(relays).is_alive
    assert one(relays).silent_seconds >= ALIVE_SECONDS


def test_the_latest_comes_first_and_one_that_ended_is_gone(relays: Relays, store: Store) -> None:
    relays.seen("a", has_failed=False, confirmed=0, last_error=None, **VALUES)
    later(store, 5)
    relays.seen("b", has_failed=False, confirmed=0, last_error=None, **VALUES)
    assert [each.id for each in relays.all()] == ["b", "a"]
    relays.gone("b")
    assert one(relays).id == "a"


def test_relays_are_forgotten_in_chunks(relays: Relays, store: Store) -> None:
    """P12."""
    for name in "abc":
        relays.seen(name, has_failed=False, confirmed=0, last_error=None, **VALUES)
    later(store, 100)
    relays.seen("new", has_failed=False, confirmed=0, last_error=None, **VALUES)
    assert [relays.forget(50, 2), relays.forget(50, 2), relays.forget(50, 2)] == [2, 1, 0]
    assert one(relays).id == "new"


def test_dead_letters_are_pruned_in_chunks(store: Store) -> None:
    """P12."""
    with store.engine.begin() as connection:
        store.stage(connection, [row_of(envelope(task_id=str(n))) for n in range(5)])
    batch = store.claim(4, 60)
    store.settle(batch, Settlement(dead={row.id: "no" for row in batch.rows[:3]}))
    later(store, 100)
    store.settle(batch, Settlement(dead={batch.rows[3].id: "no"}))
    assert [store.prune_dead_letters(50, 2) for _ in range(3)] == [2, 1, 0]
    assert store.counts()["dead"] == 1
    assert store.counts()["outgoing"] == 1
