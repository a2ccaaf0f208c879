"""P10: messages with one ordering key are claimed one by one, in the order of their commits."""

import threading
from datetime import timedelta

import pytest
from sqlalchemy import Engine

from celery_outbox.storage.rows import row_of
from celery_outbox.storage.store import Batch, Settlement, Store
from celery_outbox.testing.contract.database import Database
from celery_outbox.testing.contract.outgoing import (
    NOW,
    claim,
    envelope,
    ids,
    make_due,
    numbers,
    stage,
)


def settle(store: Store, batch: Batch, **outcomes: object) -> None:
    assert store.settle(batch, Settlement(**outcomes)) == 0  # type: ignore[arg-type]


def test_only_the_first_of_each_key_goes(store: Store) -> None:
    for label in ("a1", "b1", "a2", "free", "b2", "a3"):
        stage(store, label, ordering_key=None if label == "free" else label[0])
    seen = []
    for _ in range(3):
        batch = claim(store)
        seen.append(ids(batch))
        settle(store, batch, confirmed=numbers(batch))
    assert seen == [["a1", "b1", "free"], ["a2", "b2"], ["a3"]]


def test_the_key_comes_back_with_the_envelope(store: Store) -> None:
    stage(store, "m", ordering_key="customer 7")
    (row,) = claim(store).rows
    assert row.envelope is not None
    assert row.envelope.ordering_key == "customer 7"


@pytest.mark.parametrize("outcome", ["retried", "postponed"])
def test_a_failing_message_holds_its_own_key_only(store: Store, outcome: str) -> None:
    stage(store, "a1", "a2", ordering_key="a")
    stage(store, "b1", "b2", ordering_key="b")
    batch = claim(store)
    first, other = numbers(batch)
    settle(store, batch, confirmed=[other], **{outcome: {first: (60.0, "no exchange")}})
    batch = claim(store)
    assert ids(batch) == ["b2"]
    settle(store, batch, confirmed=numbers(batch))
    make_due(store)
    assert ids(claim(store)) == ["a1"]


def test_a_message_that_is_being_published_holds_its_key(store: Store) -> None:
    stage(store, "a1", "a2", ordering_key="a")
    first = claim(store)
    assert claim(store).rows == []
    make_due(store)
    # Its relay is dead: another one begins with the same message.
    assert ids(claim(store)) == ["a1"]
    assert store.settle(first, Settlement(confirmed=numbers(first))) == 1
    assert claim(store).rows == []


def test_a_message_that_is_not_due_holds_its_key(store: Store) -> None:
    stage(store, "a1", ordering_key="a", due_at=NOW + timedelta(hours=1))
    stage(store, "a2", ordering_key="a")
    assert claim(store).rows == []


def test_a_dead_letter_holds_nobody(store: Store) -> None:
    stage(store, "a1", "a2", ordering_key="a")
    batch = claim(store)
    settle(store, batch, dead={numbers(batch)[0]: "no exchange"})
    assert ids(claim(store)) == ["a2"]


def test_a_message_that_is_kept_until_it_is_handled_holds_nobody(store: Store) -> None:
    stage(store, "a1", "a2", ordering_key="a")
    batch = claim(store)
    settle(store, batch, kept={numbers(batch)[0]: 60.0})
    assert ids(claim(store)) == ["a2"]


def test_neither_kind_starves_the_other(store: Store) -> None:
    for number in range(10):
        stage(store, f"k{number}", ordering_key=f"{number}")
    stage(store, *(f"f{number}" for number in range(10)))
    assert sorted(label[0] for label in ids(claim(store, 4))) == ["f", "f", "k", "k"]


def test_with_room_for_one_each_kind_gets_its_turn(store: Store) -> None:
    for number in range(40):
        stage(store, f"k{number}", ordering_key=f"{number}")
        stage(store, f"f{number}")
    first = [ids(claim(store, 1)) for _ in range(40)]
    assert {label[0][0] for label in first if label} == {"k", "f"}


def test_one_key_with_a_long_backlog_does_not_hold_up_the_rest(store: Store) -> None:
    stage(store, *(f"a{number}" for number in range(500)), ordering_key="a")
    stage(store, "free")
    assert ids(claim(store, 10)) == ["a0", "free"]


def test_the_order_is_that_of_the_commits(store: Store, database: Database, engine: Engine) -> None:
    """Who sends first commits first: another one with the same key waits for that."""
    if not database.several_writers:
        pytest.skip("one writer at a time")
    order: list[str] = []

    def send_second() -> None:
        with engine.begin() as connection:
            store.stage(connection, [row_of(envelope("second", ordering_key="a"))])
        order.append("second")

    with engine.connect() as connection:
        store.stage(connection, [row_of(envelope("first", ordering_key="a"))])
        other = threading.Thread(target=send_second)
        other.start()
        other.join(0.3)
        assert other.is_alive(), "it did not wait"
        with engine.begin() as third:
            store.stage(third, [row_of(envelope("third", ordering_key="b"))])
        order.append("first")
        connection.commit()
    other.join(30)
    assert order == ["first", "second"]
    assert ids(claim(store)) == ["first", "third"]


def test_transactions_with_the_same_keys_do_not_deadlock(
    store: Store, database: Database, engine: Engine
) -> None:
    if not database.several_writers:
        pytest.skip("one writer at a time")
    start = threading.Barrier(4)
    failed: list[Exception] = []

    def send(keys: str) -> None:
        start.wait()
        try:
            for _ in range(25):
                with engine.begin() as connection:
                    rows = [row_of(envelope(key, ordering_key=key)) for key in keys]
                    store.stage(connection, rows)
        except Exception as exc:
            failed.append(exc)

    threads = [threading.Thread(target=send, args=[keys]) for keys in ("abc", "cba", "bca", "acb")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# How long it is until there is something to do


def test_seconds_until_a_row_is_available(store: Store) -> None:
    assert store.seconds_until_available() is None
    stage(store, "a1", "a2", ordering_key="a")
    batch = claim(store, lease_seconds=60)
    # The second waits for the first, however long it has been available.
    left = store.seconds_until_available()
    assert left is not None
    assert 50 < left <= 60
    stage(store, "m")
    left = store.seconds_until_available()
    assert left is not None
    assert left <= 0
    settle(store, batch, confirmed=numbers(batch))


# Leases that are prolonged


def test_a_lease_can_be_prolonged_by_its_owner_alone(store: Store) -> None:
    """P6."""
    stage(store, "1", "2")
    batch = claim(store, lease_seconds=0.0)
    assert store.renew(batch, 60.0) == 2
    assert claim(store).rows == []
    make_due(store)
    thief = claim(store, 1)
    assert store.renew(batch, 60.0) == 1
    assert store.settle(thief, Settlement(confirmed=numbers(thief))) == 0
