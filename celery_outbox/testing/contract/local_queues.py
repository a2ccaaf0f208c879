"""The store of local queues: put, take, drop, give back, renew."""

import threading
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import event, func, select, text, update
from sqlalchemy.exc import OperationalError

from celery_outbox.local.message import queued
from celery_outbox.storage.local import Delivery, LocalStore
from celery_outbox.storage.rows import row_of
from celery_outbox.storage.store import Store
from celery_outbox.testing.contract.database import Database
from celery_outbox.testing.contract.outgoing import envelope

NOW = datetime.now(timezone.utc)


@pytest.fixture
def local(store: Store) -> LocalStore:
    """The local queues of an empty store."""
    return store.local


def row(label: str, queue: str = "emails", **changes: Any) -> Any:
    return queued(envelope(label, **changes), queue, hold_scheduled=True)


def put(local: LocalStore, *labels: str, queue: str = "emails", **changes: Any) -> None:
    with local.engine.begin() as connection:
        local.put(connection, [row(label, queue, **changes) for label in labels])


def take(local: LocalStore, limit: int = 100, *queues: str, token: str = "one") -> list[Delivery]:
    return local.take(queues or ["emails"], limit, token=token, lease_seconds=60, max_attempts=3)


def labels_of(deliveries: list[Delivery]) -> list[str]:
    return [delivery.envelope.task_id for delivery in deliveries if delivery.envelope]


def ids_of(deliveries: list[Delivery]) -> list[int]:
    return [delivery.id for delivery in deliveries]


def end_local_leases(local: LocalStore) -> None:
    rows = local.tables.local
    with local.engine.begin() as connection:
        connection.execute(update(rows).values(available_at=NOW - timedelta(days=1)))


def count(local: LocalStore) -> int:
    with local.engine.connect() as connection:
        return len(connection.execute(select(local.tables.local.c.id)).all())


# Put


def test_a_message_is_there_with_the_callers_commit(local: LocalStore) -> None:
    """P1."""
    with local.engine.connect() as connection:
        local.put(connection, [row("gone")])
        connection.rollback()
        local.put(connection, [row("kept")])
        connection.commit()
    assert labels_of(take(local)) == ["kept"]


def test_what_is_staged_goes_where_it_belongs(store: Store) -> None:
    """One statement of the caller's for both: no relay sees what is local, no worker what is not."""
    with store.engine.begin() as connection:
        store.stage(connection, [row("local"), row_of(envelope("broker")), row("local 2")])
    assert [found.task_id for found in store.claim(10, 60).rows] == ["broker"]
    assert labels_of(take(store.local)) == ["local", "local 2"]


def test_what_was_put_is_taken_unchanged(local: LocalStore) -> None:
    """P3."""
    due, expires = NOW - timedelta(minutes=1), NOW + timedelta(hours=1)
    sent = envelope("ä☃", due_at=due, expires_at=expires, is_text=True)
    with local.engine.begin() as connection:
        local.put(connection, [queued(sent, "ä☃", hold_scheduled=True)])
    (delivery,) = take(local, 10, "ä☃")
    assert delivery.envelope == sent
    assert delivery.error is None
    assert (delivery.number, delivery.queue) == (1, "ä☃")


def test_what_a_newer_version_wrote_is_taken_with_the_error(local: LocalStore) -> None:
    """P19."""
    put(local, "m")
    with local.engine.begin() as connection:
        connection.execute(update(local.tables.local).values(message='{"format": 99}'))
    (delivery,) = take(local)
    assert delivery.envelope is None
    assert "stored in format 99" in str(delivery.error)


# Take


def test_no_more_than_the_limit_and_from_the_queues_that_are_named(local: LocalStore) -> None:
    put(local, "a", "b", "c")
    put(local, "x", queue="other")
    assert labels_of(take(local, 2)) == ["a", "b"]
    assert labels_of(take(local, 2)) == ["c"]
    assert labels_of(take(local, 2)) == []
    assert labels_of(take(local, 2, "other", "emails")) == ["x"]


@pytest.mark.parametrize(("limit", "queues"), [(0, ["emails"]), (5, [])])
def test_nothing_is_taken_without_room_or_queues(
    local: LocalStore, limit: int, queues: list[str]
) -> None:
    put(local, "m")
    assert local.take(queues, limit, token="one", lease_seconds=60, max_attempts=3) == []


def test_the_most_urgent_ones_first_over_all_queues(local: LocalStore) -> None:
    put(local, "low", priority=0)
    put(local, "none", priority=None)
    put(local, "high", priority=9, queue="other")
    put(local, "middle", priority=5)
    put(local, "beyond", priority=200)
    assert labels_of(take(local, 3, "emails", "other")) == ["high", "beyond", "middle"]
    assert labels_of(take(local, 3, "emails", "other")) == ["low", "none"]


def test_equally_urgent_queues_have_their_turns(local: LocalStore) -> None:
    """A full queue does not hold up another one."""
    put(local, *(f"a{number}" for number in range(40)), queue="a")
    put(local, *(f"b{number}" for number in range(40)), queue="b")
    taken = [labels_of(take(local, 1, "a", "b"))[0][0] for _ in range(40)]
    assert {"a", "b"} == set(taken)


def test_what_is_due_later_stays(local: LocalStore) -> None:
    """P11."""
    put(local, "tomorrow", due_at=NOW + timedelta(days=1))
    put(local, "today", due_at=NOW - timedelta(seconds=1))
    assert labels_of(take(local)) == ["today"]
    assert local.counts() == {"emails": {"due": 0, "scheduled": 1, "taken": 1}}


def test_two_at_once_take_each_message_once(local: LocalStore) -> None:
    put(local, *map(str, range(100)))
    taken: list[str] = []

    def consume(token: str) -> None:
        for _ in range(200):
            try:
                taken.extend(labels_of(take(local, 3, token=token)))
            except OperationalError as exc:
                if not local.dialect.is_busy(exc):
                    raise
            if len(taken) >= 100:
                break

    threads = [threading.Thread(target=consume, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken, key=int) == list(map(str, range(100)))


def test_a_row_that_another_transaction_holds_is_passed_over(
    local: LocalStore, database: Database
) -> None:
    put(local, "a", "b")
    with local.engine.begin() as other:
        rows = local.tables.local
        # By its key: a search by another column locks more in some databases.
        first = other.execute(select(func.min(rows.c.id))).scalar_one()
        other.execute(update(rows).where(rows.c.id == first).values(last_error="x"))
        if database.several_writers:
            assert labels_of(take(local)) == ["b"]
        else:
            with pytest.raises(Exception, match="locked") as caught:
                take(local)
            assert local.dialect.is_busy(caught.value)


def test_looking_needs_no_write_where_nothing_is_due(local: LocalStore) -> None:
    """Idle workers do not keep SQLite's one writer from writing."""
    put(local, "tomorrow", due_at=NOW + timedelta(days=1))
    with local.engine.begin() as other:
        other.execute(update(local.tables.local).values(last_error="x"))
        assert take(local) == []


# Drop, give back, renew: what proves the lease


def test_what_is_handled_is_dropped_with_the_next_take(local: LocalStore) -> None:
    put(local, "a", "b")
    (first,) = take(local, 1)
    second = local.take(
        ["emails"], 1, token="one", lease_seconds=60, max_attempts=3, handled=[first.id]
    )
    assert labels_of(second) == ["b"]
    assert count(local) == 1
    assert (
        local.take([], 0, token="one", lease_seconds=60, max_attempts=3, handled=ids_of(second))
        == []
    )
    assert count(local) == 0


def test_what_is_given_back_is_delivered_again(local: LocalStore) -> None:
    put(local, "a")
    first = take(local)
    assert local.give_back(ids_of(first), "one", error="worse luck") == 1
    (again,) = take(local, token="two")
    assert again.number == 2
    assert local.give_back([again.id], "two", 60) == 1
    assert take(local) == []


def test_a_lease_that_is_over_is_anybodys(local: LocalStore) -> None:
    """P6."""
    put(local, "a")
    first = take(local)
    assert take(local, token="two") == []
    end_local_leases(local)
    assert labels_of(take(local, token="two")) == ["a"]
    # The first one wakes up, and changes nothing.
    assert local.drop(ids_of(first), "one") == 0
    assert local.give_back(ids_of(first), "one") == 0
    assert local.renew(ids_of(first), "one", 60) == set()
    assert local.drop(ids_of(first), "two") == 1


def dead_in(local: LocalStore) -> list[Any]:
    table = local.tables.dead_letter
    with local.engine.connect() as connection:
        return list(connection.execute(select(table)))


def test_what_is_delivered_in_vain_too_often_is_a_dead_letter(local: LocalStore) -> None:
    """P7: with the true error, and nothing else stays behind."""
    put(local, "deadly", priority=7)
    for number in (1, 2, 3):
        (delivery,) = take(local, token=f"worker {number}")
        assert (delivery.number, delivery.is_dead) == (number, False)
        end_local_leases(local)
    put(local, "good")
    good, gone = sorted(take(local), key=lambda each: each.is_dead)
    error = "delivered 3 times and never handled; the last time: its worker was lost: worker 3"
    assert (gone.task_id, gone.is_dead, gone.envelope, gone.error) == ("deadly", True, None, error)
    assert labels_of([good]) == ["good"]
    (letter,) = dead_in(local)
    assert (letter.id, letter.queue, letter.priority) == (-gone.id, "emails", 7)
    assert (letter.task_id, letter.attempts, letter.last_error) == ("deadly", 3, error)
    assert count(local) == 1


def test_the_error_of_a_dead_letter_is_that_of_the_last_delivery(local: LocalStore) -> None:
    put(local, "a")
    take(local)
    end_local_leases(local)
    for error in ("signal 9", "signal 11"):
        (delivery,) = take(local)
        local.give_back([delivery.id], "one", error=error)
    assert [each.is_dead for each in take(local)] == [True]
    (letter,) = dead_in(local)
    assert letter.last_error == "delivered 3 times and never handled; the last time: signal 11"


def test_what_is_given_back_for_no_fault_of_its_own_does_not_count(local: LocalStore) -> None:
    """A worker that stops, or a duplicate of what still runs, buries nothing."""
    put(local, "a")
    for _ in range(10):
        (delivery,) = take(local)
        assert (delivery.number, delivery.is_dead) == (1, False)
        local.give_back([delivery.id], "one")


def test_a_renewed_lease_is_not_over(local: LocalStore) -> None:
    put(local, "a", "b")
    a, b = ids_of(take(local))
    end_local_leases(local)
    assert local.renew([a], "one", 60) == {a}
    assert ids_of(take(local, token="two")) == [b]
    assert local.renew([a, b], "one", 60) == {a}


def test_an_id_is_not_used_twice(local: LocalStore) -> None:
    """A worker that lost its lease must not delete another message."""
    put(local, "a")
    first = ids_of(take(local))
    local.drop(first, "one")
    put(local, "b")
    assert ids_of(take(local)) != first


# Queues


def test_size_and_purge_leave_alone_what_is_taken(local: LocalStore) -> None:
    put(local, "a", "b", "c")
    put(local, "tomorrow", due_at=NOW + timedelta(days=1))
    put(local, "x", queue="other")
    take(local, 1)
    assert local.size("emails") == 3
    assert local.purge("emails") == 3
    assert (local.size("emails"), local.size("other"), count(local)) == (0, 1, 2)


def test_counts(local: LocalStore) -> None:
    """P17."""
    assert local.counts() == {}
    put(local, "a", "b", "c")
    put(local, "tomorrow", due_at=NOW + timedelta(days=1))
    put(local, "x", queue="other")
    take(local, 1)
    assert local.counts() == {
        "emails": {"due": 2, "scheduled": 1, "taken": 1},
        "other": {"due": 1, "scheduled": 0, "taken": 0},
    }


def test_a_take_is_an_index_search_whatever_is_scheduled(local: LocalStore) -> None:
    """P12: the plan of what a take asks, where fifty thousand messages are for later."""
    if local.dialect.name not in ("postgresql", "mysql", "mariadb", "sqlite"):
        pytest.skip("how it shows a plan is not known")
    with local.engine.begin() as connection:
        later = row("later", due_at=NOW + timedelta(days=1))
        for _ in range(50):
            local.put(connection, [later] * 1000)
    with local.engine.begin() as connection:
        is_mysql = local.dialect.name in ("mysql", "mariadb")
        connection.execute(text(f"ANALYZE {'TABLE ' if is_mysql else ''}outbox_local"))
    asked: list[tuple[str, Any]] = []

    def listen(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "outbox_local" in statement:
            asked.append((statement, parameters))

    event.listen(local.engine, "before_cursor_execute", listen)
    assert take(local) == []
    event.remove(local.engine, "before_cursor_execute", listen)
    explain = "EXPLAIN QUERY PLAN" if local.dialect.name == "sqlite" else "EXPLAIN"
    with local.engine.connect() as connection:
        for statement, parameters in asked:
            steps = connection.exec_driver_sql(f"{explain} {statement}", parameters).all()
            plan = "\n".join(str(tuple(step)) for step in steps)
            assert "ix_outbox_local_available" in plan, plan
            assert "Seq Scan on outbox_local" not in plan, plan
            assert "SCAN outbox_local" not in plan, plan
            assert "Sort" not in plan, plan
            assert "Using filesort" not in plan, plan
            assert "TEMP B-TREE" not in plan, plan
