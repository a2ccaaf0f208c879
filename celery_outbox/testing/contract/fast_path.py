"""The store's part in the fast path: it tells of what it stages, and claims the newest first."""

import select
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import Connection, update
from sqlalchemy import select as select_

from celery_outbox.storage.rows import row_of
from celery_outbox.storage.store import FreshestFirst, Settlement, Store
from celery_outbox.testing.contract.outgoing import claim, envelope, ids, stage, stored

NOW = datetime.now(timezone.utc)


@pytest.fixture
def freshest(store: Store) -> FreshestFirst:
    """A second store on the same tables."""
    return FreshestFirst(store.engine, store.tables)


def claim_freshest(store: FreshestFirst, wanted: int, limit: int = 100) -> list[str]:
    store.wanted = wanted
    return ids(store.claim(limit, 60))


def let_wait(store: Store, **seconds: float) -> None:
    """Let rows have been available for so long."""
    outbox = store.tables.outbox
    with store.engine.begin() as connection:
        for label, since in seconds.items():
            connection.execute(
                update(outbox)
                .where(outbox.c.task_id == label)
                .values(available_at=NOW - timedelta(seconds=since))
            )


def test_the_newest_are_claimed_first(store: Store, freshest: FreshestFirst) -> None:
    stage(store, "a", "b", "c", "d")
    let_wait(store, a=40, b=10, c=30, d=20)
    assert claim_freshest(freshest, 1) == ["b"]
    assert claim_freshest(freshest, 2) == ["c", "d"]  # as ever in the order of their ids
    assert claim_freshest(freshest, 5) == ["a"]
    assert claim_freshest(freshest, 5) == []


def test_no_more_are_claimed_than_are_wanted_or_fit_into_a_batch(
    store: Store, freshest: FreshestFirst
) -> None:
    stage(store, *"abcdef")
    assert len(claim_freshest(freshest, 2)) == 2
    assert len(claim_freshest(freshest, 10, limit=3)) == 3


def test_a_claim_is_a_lease_as_any_other(store: Store, freshest: FreshestFirst) -> None:
    """P6."""
    stage(store, "m")
    freshest.wanted = 1
    batch = freshest.claim(10, 60)
    (row,) = batch.rows
    assert row.envelope == envelope("m")
    assert row.attempts == 1
    assert ids(claim(store)) == []
    assert store.counts()["in_flight"] == 1
    assert freshest.settle(batch, Settlement(confirmed=[row.id])) == 0
    assert stored(store) == []


def test_what_is_leased_delayed_or_not_due_is_left_alone(
    store: Store, freshest: FreshestFirst
) -> None:
    stage(store, "leased")
    claim(store)
    stage(store, "later", due_at=NOW + timedelta(hours=1))
    assert claim_freshest(freshest, 10) == []


def test_what_has_a_turn_is_left_to_the_relays(store: Store, freshest: FreshestFirst) -> None:
    """P10."""
    stage(store, "first", "second", ordering_key="k")
    assert claim_freshest(freshest, 10) == []
    assert ids(claim(store)) == ["first"]


def test_the_store_tells_of_what_could_be_published_at_once(store: Store) -> None:
    told: list[tuple[Any, int]] = []

    def hear(connection: Connection, count: int) -> bool:
        told.append((connection.get_transaction(), count))
        return True

    store.on_stage = hear
    with store.engine.connect() as connection:
        transaction = connection.begin()
        later = envelope("later", due_at=NOW + timedelta(hours=1))
        ordered = envelope("ordered", ordering_key="k")
        rows = [row_of(each) for each in (envelope("a"), later, envelope("b"), ordered)]
        store.stage(connection, rows)
        assert told == [(transaction, 2)]
        store.stage(connection, [row_of(later), row_of(ordered)])
        assert told == [(transaction, 2)]
        transaction.rollback()
    store.stage_alone(row_of(envelope("alone")))
    assert [count for _, count in told] == [2, 1]


@pytest.mark.parametrize(
    ("taken", "rows", "woken"),
    [
        (True, ["a", "b"], False),
        (True, ["a", "later"], True),
        (True, ["ordered"], True),
        (False, ["a"], True),
    ],
)
def test_no_relay_is_woken_for_what_this_process_publishes(
    store: Store, taken: bool, rows: list[str], woken: bool
) -> None:
    """P9. Only PostgreSQL tells of commits at all."""
    listener = store.listen()
    if listener is None:
        assert store.dialect.name != "postgresql"
        return
    changes: dict[str, dict[str, Any]] = {
        "later": {"due_at": NOW + timedelta(hours=1)},
        "ordered": {"ordering_key": "k"},
    }
    store.on_stage = lambda connection, count: taken
    with store.engine.begin() as connection:
        envelopes = [envelope(label, **changes.get(label, {})) for label in rows]
        store.stage(connection, [row_of(each) for each in envelopes])
    readable, _, _ = select.select([listener], [], [], 1.0 if not woken else 20.0)
    assert bool(readable) is woken
    listener.close()


def test_it_begins_after_the_others_end_where_the_backlog_is_long(
    store: Store, freshest: FreshestFirst
) -> None:
    """A relay and a fast path meet in the middle, and share no row."""
    stage(store, *(f"{number:03}" for number in range(60)))
    outbox = store.tables.outbox
    with store.engine.begin() as connection:
        for number, row in enumerate(connection.execute(select_(outbox.c.id)).scalars().all()):
            connection.execute(
                update(outbox)
                .where(outbox.c.id == row)
                .values(available_at=NOW - timedelta(seconds=100 - number))
            )
    old, new = ids(claim(store, limit=20)), claim_freshest(freshest, 20)
    assert old == [f"{number:03}" for number in range(20)]
    assert new == [f"{number:03}" for number in range(40, 60)]
